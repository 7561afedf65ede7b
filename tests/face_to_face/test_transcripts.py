"""One story per promise of design §7, and of S3 and A11: what happens, to whom, and what the caller sees of it.

`world` has the parties, real but for sockets, processes and time. `test_conversations` has the ordinary days, `test_links` the network's
own faults, `storm` all that is here at once and at random. What only the programs know (signals, stderr, `health()`, CUDA
errors) is proved in tests/worker and tests/shell. Past 400 lines, because there is one such page for whoever asks what is promised.
"""

from __future__ import annotations

from typing import Any

import msgpack
import pytest

from forge_contract.errors import RemoteError, from_wire
from forge_contract.messages import RAISED, show_request
from tests.face_to_face.world import OK, Reply, SimClient, SimWorker, World

# Words that the stories share.


def seconds(worker: SimWorker, method: int, payload: bytes) -> tuple[float, int, bytes]:
    """An actor whose calls say how long they take, behind a colon: b"who:1.5"."""
    return float(payload.rpartition(b":")[2] or 0.01), OK, payload


def replica_of(world: World, service: dict[str, Any], idx: int = 0) -> dict[str, Any]:
    """What `forge status` shows of one replica now."""
    found = next(one for one in world.peers.values() if isinstance(one, SimClient) and one.alive)
    replicas = found.ask("state", service=service["service"])["replicas"]
    return next(replica for replica in replicas if replica["idx"] == idx)


def until_started(world: World, count: int) -> None:
    """Until so many attempts have started, of all calls."""
    world.run_until(lambda: len(world.history) == count)


def home_of(world: World, client: SimClient, service: dict[str, Any], session: str) -> SimWorker:
    """The worker that a session is pinned to."""
    idx = client.ask("state", service=service["service"])["session_replica_map"][session]
    return world.workers_of(f"{service['name']}/{idx}")[0]


def answers_of(world: World, *calls: Reply) -> list[bytes]:
    """Wait for these, and read them: every one was answered once, and well."""
    world.run_until(lambda: all(call.done for call in calls))
    assert [(call.replies, call.error) for call in calls] == [(1, None)] * len(calls)
    return [bytes(call.payload) for call in calls]


def open_session(client: SimClient, service: dict[str, Any], session: str = "s") -> None:
    client.ask("open_session", service=service["service"], session=session, hints={})


def ran(world: World, payload: bytes) -> list[int]:
    """The attempts of the call with these arguments, as they started."""
    workers = [peer for peer in world.peers.values() if isinstance(peer, SimWorker)]
    return sorted(attempt for worker in workers for _, attempt, text, _ in worker.started if text == payload)


# F1: who is dead.


@pytest.mark.parametrize("by_hand", [False, True])
def test_f1_the_kernel_says_who_is_dead_and_the_call_runs_elsewhere_within_milliseconds(by_hand: bool) -> None:
    """F1: SIGKILL of a worker of this machine, whoever started it."""
    world = World(max_workers=0 if by_hand else 2)
    world.actor = seconds
    if by_hand:
        for _ in range(2):
            world.worker()
    client = world.client()
    service = client.deploy(num_replicas=2)
    call = client.call(service, payload=b"precious:1")
    until_started(world, 1)
    victim = world.peers[world.history[0][0]]
    killed_at = world.clock.now
    victim.die()
    until_started(world, 2)
    assert world.clock.now - killed_at < 0.02
    assert world.history[1][0] != victim.link.name
    assert answers_of(world, call) == [b"precious:1"]


def test_f1_a_silent_worker_of_another_host_keeps_its_gpu_until_it_is_heard_from() -> None:
    """F1: there, silence of `liveness` heartbeats is death for its calls; but nobody knows what its process does with the GPU."""
    world = World(max_workers=0, heartbeat_s=0.5, liveness=10)
    world.actor = seconds
    silent = world.worker(host="far", gpus=("0",))
    client = world.client()
    service = client.deploy(num_replicas=1, with_gpus=True)
    call = client.call(service, payload=b"needs a GPU:1")
    until_started(world, 1)
    silent.pause()
    world.run_for(6.0)
    assert [one["state"] for one in client.ask("workers")["workers"]] == ["LOST"]
    assert "GPU" in replica_of(world, service)["pending"]
    silent.resume()  # its reply comes too late: it is fenced, and the worker is told to stop
    world.run_until(lambda: not silent.alive)
    assert not call.done
    world.worker(host="far", gpus=("0",))  # its supervisor starts another
    assert answers_of(world, call) == [b"needs a GPU:1"]
    assert ran(world, b"needs a GPU:1") == [1, 2]


# F2, F3: what becomes of the calls.


def test_f2_the_calls_of_a_lost_replica_go_to_the_front_of_the_queue_in_their_old_order() -> None:
    """F2: attempt + 1, and nobody who came later overtakes them."""
    world = World()
    world.actor = seconds
    client = world.client()
    service = client.deploy(num_replicas=1, replica_max_concurrent_requests=3)
    calls = [client.call(service, payload=b"%d:1" % n) for n in range(6)]
    until_started(world, 3)
    world.workers_of("Sim/0")[0].die()
    answers_of(world, *calls)
    started = [(request - world.history[0][1], attempt) for _, request, attempt in world.history]
    assert started == [(0, 1), (1, 1), (2, 1), (0, 2), (1, 2), (2, 2), (3, 1), (4, 1), (5, 1)]


def test_f3_a_call_that_may_have_run_is_tried_again_or_its_outcome_is_unknown_as_it_was_declared() -> None:
    """F3: `delivery=` decides for what was in flight; what only waited is always tried."""
    world = World()
    world.actor = seconds
    client = world.client()
    service = client.deploy(
        num_replicas=1, replica_max_concurrent_requests=2, endpoints={"echo": {}, "pay": {"delivery": "at_most_once"}}
    )
    again, once = client.call(service, "echo", b"again:1"), client.call(service, "pay", b"once:1")
    queued = client.call(service, "pay", b"queued:1")
    until_started(world, 2)
    world.workers_of("Sim/0")[0].die()
    assert answers_of(world, again, queued) == [b"again:1", b"queued:1"]
    assert (once.replies, once.error) == (1, "OutcomeUnknown")
    assert (ran(world, b"again:1"), ran(world, b"once:1"), ran(world, b"queued:1")) == ([1, 2], [1], [1])


# F4: poison.


def test_f4_a_call_that_kills_its_replicas_is_convicted_alone_and_its_companions_are_acquitted() -> None:
    """F4: two deaths make a suspect, which runs its third attempt alone; that is the proof, and its caller's error."""
    world = World()
    client = world.client()
    service = client.deploy(num_replicas=2)
    companions: list[int] = []  # of the poison, each time

    def act(worker: SimWorker, method: int, payload: bytes) -> tuple[float, int, bytes]:
        if payload == b"poison":
            companions.append(len(worker.link.running) - 1)
            world.clock.at(world.clock.now + 0.05, worker.die)
        return 0.5, OK, payload

    world.actor = act
    *innocent, poison = [client.call(service, payload=text) for text in [*(b"%d" % n for n in range(12)), b"poison"]]
    answers_of(world, *innocent)
    world.run_until(lambda: poison.done)
    assert (poison.replies, poison.error) == (1, "PoisonedRequest")
    assert ran(world, b"poison") == [1, 2, 3]
    assert companions[0] > 0
    assert companions[2] == 0
    (dead,) = client.ask("dead_list")["dead"]
    assert (dead["id"], dead["endpoint"]) == (show_request((client.link.client << 40) + poison.sequence), "echo")
    story = "\n".join(client.ask("dead_show", id=dead["id"])["story"])
    assert [f"after attempt {attempt}" in story for attempt in (1, 2, 3)] == [True] * 3
    assert "its next attempt runs alone" in story


def test_f4_a_death_that_the_broker_chose_convicts_nobody() -> None:
    """F4: drained away from four workers in mid-call, it is run a fifth time."""
    world = World(drain_grace_s=0.2)
    world.actor = seconds
    client = world.client()
    service = client.deploy(num_replicas=1)
    call = client.call(service, payload=b"long:5")
    for attempt in (1, 2, 3, 4):
        until_started(world, attempt)
        client.ask("drain", target=world.workers_of("Sim/0")[0].link.name)
    assert answers_of(world, call) == [b"long:5"]
    assert ran(world, b"long:5") == [1, 2, 3, 4, 5]
    assert client.ask("dead_list")["dead"] == []


def test_f4_a_call_that_hangs_is_the_only_suspect_of_the_death_it_brings() -> None:
    """F4, §9: `hang_timeout_s` kills the replica and tries the call again, thrice; who only ran beside it is no suspect."""
    world = World()
    world.actor = seconds
    client = world.client()
    service = client.deploy(num_replicas=1, endpoints={"echo": {}, "slow": {"hang_timeout_s": 1.0}})
    hanging, beside = client.call(service, "slow", b"hangs:999"), client.call(service, "echo", b"beside:3")
    assert answers_of(world, beside) == [b"beside:3"]
    world.run_until(lambda: hanging.done)
    assert hanging.error == "PoisonedRequest"
    assert (ran(world, b"hangs:999"), ran(world, b"beside:3")) == ([1, 2, 3], [1, 2, 3])
    suspects = [
        "a suspect" in "\n".join(client.ask("explain", subject=show_request(request))["story"])
        for request in ((client.link.client << 40) + call.sequence for call in (hanging, beside))
    ]
    assert suspects == [True, False]
    assert [one["endpoint"] for one in client.ask("dead_list")["dead"]] == ["slow"]


# F5, F6: callers, and processes that are broken.


def test_f5_a_caller_that_gives_up_harms_no_replica_and_its_room_comes_back_when_the_work_has_ended() -> None:
    """F5: what was queued never starts; what runs is left to finish, and only then the next one starts."""
    world = World()
    world.actor = seconds
    client = world.client()
    service = client.deploy(num_replicas=1, replica_max_concurrent_requests=1)
    running, queued, next_one = (client.call(service, payload=text) for text in (b"running:2", b"queued:2", b"next:1"))
    until_started(world, 1)
    began = world.clock.now
    client.link.cancel(running.sequence)
    client.link.cancel(queued.sequence)
    client.flush()
    until_started(world, 2)
    assert 1.9 < world.clock.now - began < 2.1
    assert answers_of(world, next_one) == [b"next:1"]
    assert (running.replies, queued.replies, ran(world, b"queued:2")) == (0, 0, [])
    assert (replica_of(world, service)["state"], replica_of(world, service)["restarts"]) == ("HEALTHY", 0)


def test_f6_an_error_that_breaks_the_process_is_raised_at_its_caller_and_restarts_the_replica() -> None:
    """F6: the worker says so behind the reply, and leaves; who ran beside it is tried again, and nobody is convicted."""
    world = World()
    client = world.client()
    service = client.deploy(num_replicas=1)

    def act(worker: SimWorker, method: int, payload: bytes) -> tuple[float, int, bytes]:
        if payload != b"illegal access":
            return 1.0, OK, payload
        broken = RemoteError(type_name="AcceleratorError", message="CUDA error: an illegal memory access")
        world.clock.at(world.clock.now + 0.1, lambda: worker.link.unready(broken))
        world.clock.at(world.clock.now + 0.2, worker.die)
        return 0.1, RAISED, b"the user's CUDA error"

    world.actor = act
    beside, guilty = client.call(service, payload=b"beside"), client.call(service, payload=b"illegal access")
    assert answers_of(world, guilty) == [b"the user's CUDA error"]
    assert guilty.status == RAISED
    assert replica_of(world, service)["state"] == "RECOVERING"
    assert "illegal memory access" in replica_of(world, service)["last_error"]
    assert answers_of(world, beside) == [b"beside"]
    assert (ran(world, b"illegal access"), ran(world, b"beside")) == ([1], [1, 2])
    assert replica_of(world, service)["restarts"] == 1


# F7, F8: coming back, and doing without.


def test_f7_a_replica_that_keeps_dying_is_tried_ever_more_slowly_and_comes_back_by_itself() -> None:
    """F7: UNHEALTHY after three deaths in a row, with the signal and the last lines; healthy again without anyone's help."""
    world = World()
    client = world.client()
    service = client.deploy(num_replicas=1, restart_backoff_s=0.5, restart_backoff_at_most_s=4.0)
    waits, states = [], []
    for _ in range(6):
        world.run_until(lambda: bool(world.workers_of("Sim/0")))
        world.workers_of("Sim/0")[0].die()
        died_at = world.clock.now
        world.run_for(0.01)
        states.append(replica_of(world, service)["state"])
        world.run_until(lambda: bool(world.launched))
        waits.append(world.clock.now - died_at)
    assert states == ["RECOVERING", "RECOVERING", "UNHEALTHY", "UNHEALTHY", "UNHEALTHY", "UNHEALTHY"]
    assert waits[0] < 0.05  # the first death may have been chance
    for base, wait in zip((0.5, 1.0, 2.0, 4.0, 4.0), waits[1:], strict=True):
        assert base <= wait <= 1.2 * base + 0.05
    shown = replica_of(world, service)
    assert shown["failed"]
    assert "signal SIGKILL" in shown["last_error"]
    assert "last line" in shown["last_error"]
    world.run_until(lambda: replica_of(world, service)["state"] == "HEALTHY")
    assert answers_of(world, client.call(service, payload=b"back")) == [b"back"]


def test_f8_the_others_keep_serving_while_one_cannot_start() -> None:
    """F8: no call waits for the replica that is missing, and `state` says why it is."""
    world = World(max_workers=0)
    for _ in range(2):
        world.worker()
    client = world.client()
    service = client.deploy(num_replicas=2)
    left = world.workers_of("Sim/1")[0]
    world.workers_of("Sim/0")[0].die()
    world.run_for(1.0)
    assert replica_of(world, service, 0)["state"] == "RECOVERING"
    assert "worker" in replica_of(world, service, 0)["pending"]
    began = world.clock.now
    answers_of(world, *[client.call(service, payload=b"%d" % n) for n in range(20)])
    assert world.clock.now - began < 0.2
    assert {name for name, _, _ in world.history} == {left.link.name}


def test_f8_with_none_healthy_calls_wait_for_the_grace_and_then_say_what_each_replica_is_doing() -> None:
    """F8: a replica that comes back within `no_replica_grace_s` costs nobody an error; a longer absence is explained."""
    world = World(max_workers=0)
    world.worker()
    client = world.client()
    service = client.deploy(num_replicas=1, no_replica_grace_s=5.0)
    world.workers_of("Sim/0")[0].die()
    patient = client.call(service, payload=b"patient")
    world.run_for(3.0)
    assert not patient.done
    world.worker()
    assert answers_of(world, patient) == [b"patient"]
    world.workers_of("Sim/0")[0].die()
    asked_at = world.clock.now
    forlorn = client.call(service, payload=b"forlorn")
    world.run_until(lambda: forlorn.done)
    assert 4.9 < world.clock.now - asked_at < 5.2
    assert forlorn.error == "NoHealthyReplicas"
    text = str(from_wire(msgpack.unpackb(forlorn.payload)))
    assert "Sim/0 is RECOVERING (needs 1 worker" in text


# F9: leaving in order.


def test_f9_a_drained_worker_ends_what_runs_gives_back_the_rest_and_leaves() -> None:
    """F9, X2: nothing fails, nothing is run twice, and the process ends."""
    world = World()
    world.actor = seconds
    client = world.client()
    service = client.deploy(num_replicas=2, replica_max_concurrent_requests=2)
    calls = [client.call(service, payload=b"%d:1" % n) for n in range(10)]
    until_started(world, 4)
    leaving = world.workers_of("Sim/0")[0]
    drained = client.control("drain", {"target": leaving.link.name})
    answers_of(world, *calls)
    world.run_until(lambda: drained.done)
    assert drained.ok
    assert not leaving.alive
    assert len(leaving.started) == 2
    assert sorted(world.starts()) == [(request, 1) for request in sorted({request for request, _ in world.starts()})]


def test_f9_a_broker_that_is_told_to_end_finishes_what_runs_and_takes_nothing_new() -> None:
    """F9: the queued and the new call say why; the running one is answered; then no process is left, and the broker exits."""
    world = World()
    world.actor = seconds
    client = world.client()
    service = client.deploy(num_replicas=1, replica_max_concurrent_requests=1, stop_grace_s=5.0)
    running, queued = client.call(service, payload=b"running:2"), client.call(service, payload=b"queued:2")
    until_started(world, 1)
    world.terminate()
    late = client.call(service, payload=b"late:2")
    assert answers_of(world, running) == [b"running:2"]
    world.run_until(lambda: world.exited)
    assert (queued.error, late.error) == ("ServiceStopped", "ServiceStopped")
    assert (world.launched, len(world.history)) == ({}, 1)


# F10: the broker itself.


def test_f10_the_successor_of_a_killed_broker_finds_service_session_pin_and_call_again() -> None:
    """F10: killed in mid-call, with nothing on disk; the call is not run twice, and the session knows what it knew."""
    world = World()
    world.actor = seconds
    client = world.client()
    service = client.deploy(num_replicas=3, exports=True)
    open_session(client, service)
    assert answers_of(world, *(client.call(service, payload=b":0.1", session="s") for _ in range(2))) == [b"1", b"2"]
    home = home_of(world, client, service, "s")
    calls = [client.call(service, payload=b"third:2", session="s"), client.call(service, payload=b"stateless:2")]
    until_started(world, 4)

    world.kill_broker()

    assert answers_of(world, *calls) == [b"3", b"stateless:2"]
    assert (ran(world, b"third:2"), ran(world, b"stateless:2")) == ([1], [1])
    assert home_of(world, client, service, "s") is home
    assert answers_of(world, client.call(service, payload=b":0.1", session="s")) == [b"4"]
    assert [replica_of(world, service, idx)["restarts"] for idx in (0, 1, 2)] == [0, 0, 0]


def test_f10_a_call_that_ended_while_the_broker_was_away_is_answered_from_what_its_worker_kept() -> None:
    """F10: replies are kept until the client has them. One more call is made meanwhile: it waits, and is served."""
    world = World(recovery_s=1.0)
    world.actor = seconds
    client = world.client()
    service = client.deploy(num_replicas=1)
    ended = client.call(service, payload=b"ends meanwhile:0.3")
    until_started(world, 1)
    world.kill_broker(back_after_s=2.0)
    world.run_for(1.0)
    meanwhile = client.call(service, payload=b"asked meanwhile:0.1")
    assert answers_of(world, ended, meanwhile) == [b"ends meanwhile:0.3", b"asked meanwhile:0.1"]
    assert (ran(world, b"ends meanwhile:0.3"), ran(world, b"asked meanwhile:0.1")) == ([1], [1])


def test_f10_worker_and_broker_die_together_and_what_nobody_claims_is_tried_again_or_unknown() -> None:
    """F10, F3: the window ends without its worker; the service starts anew from what its client declares."""
    world = World()
    world.actor = seconds
    client = world.client()
    service = client.deploy(num_replicas=1, endpoints={"echo": {}, "pay": {"delivery": "at_most_once"}})
    again, once = client.call(service, "echo", b"again:1"), client.call(service, "pay", b"once:1")
    until_started(world, 2)
    world.workers_of("Sim/0")[0].die()
    world.kill_broker()
    assert answers_of(world, again) == [b"again:1"]
    world.run_until(lambda: once.done)
    assert (once.replies, once.error) == (1, "OutcomeUnknown")
    assert (len(ran(world, b"again:1")), len(ran(world, b"once:1"))) == (2, 1)


def test_f10_in_its_window_a_broker_launches_nothing_and_says_what_it_is_missing() -> None:
    """F10: `forge status` is answered at once, by a broker that waits for a worker which never comes; another dies meanwhile."""
    world = World(recovery_s=3.0)
    client = world.client()
    service = client.deploy(num_replicas=3)
    world.workers_of("Sim/1")[0].die()
    world.kill_broker()
    processes = len(world.peers)
    world.run_for(2.0)
    assert client.ask("status")["recovering"]["missing"] == ["1 replicas of Sim"]
    world.workers_of("Sim/0")[0].die()
    world.run_for(0.5)
    assert client.ask("status")["recovering"]["missing"] == ["rank 0 of Sim/0", "1 replicas of Sim"]
    assert (len(world.peers), world.launched) == (processes, {})
    world.run_until(lambda: client.ask("status")["recovering"] is None)
    world.run_until(
        lambda: {replica_of(world, service, idx)["state"] for idx in (0, 1, 2)} == {"HEALTHY"}, within_s=5.0
    )


def test_f10_a_detached_service_that_died_with_its_broker_is_lost_and_said_to_be() -> None:
    """F10: nobody is left who knows it; who waits for it hears so, and the broker serves others."""
    world = World()
    world.actor = seconds
    client = world.client()
    service = client.deploy(num_replicas=1, name="lonely", detached=True)
    call = client.call(service, payload=b"forgotten:5")
    until_started(world, 1)
    world.workers_of("lonely/0")[0].die()
    world.kill_broker()
    world.run_until(lambda: call.done)
    assert (call.replies, call.error) == (1, "UnknownService")
    other = client.deploy(num_replicas=1)
    assert answers_of(world, client.call(other, payload=b"other:1")) == [b"other:1"]


# S3: sessions that survive, A11: weights that do.


@pytest.mark.parametrize("how", ["killed", "drained", "restarted"])
def test_s3_a_session_with_state_moves_with_what_it_knows(how: str) -> None:
    """S3: every call counts one further, wherever it runs; a hundred of them, and their replica goes after the tenth."""
    world = World()
    world.actor = lambda worker, method, payload: (0.02, OK, payload)
    client = world.client()
    service = client.deploy(num_replicas=2, exports=True)
    open_session(client, service)
    calls = [client.call(service, session="s") for _ in range(100)]
    world.run_until(lambda: calls[9].done)
    before = home_of(world, client, service, "s")
    if how == "killed":
        before.die()
    elif how == "drained":
        client.control("drain", {"target": before.link.name})
    else:
        client.control("restart", {"service": "Sim"})
    assert answers_of(world, *calls) == [b"%d" % n for n in range(1, 101)]
    assert home_of(world, client, service, "s") is not before


def test_s3_without_hooks_a_session_starts_afresh_or_is_lost_as_its_service_says() -> None:
    """S3: `on_session_loss="raise"` tells the caller; the default goes on in another replica."""
    world = World()
    client = world.client()
    services = [
        client.deploy(num_replicas=2, mesh_name="fresh"),
        client.deploy(num_replicas=2, mesh_name="strict", on_session_loss="raise"),
    ]
    for service in services:
        open_session(client, service, service["name"])
        answers_of(world, client.call(service, session=service["name"]))
        home_of(world, client, service, service["name"]).die()
    world.run_for(0.01)
    fresh, strict = (client.call(service, payload=b"on", session=service["name"]) for service in services)
    assert answers_of(world, fresh) == [b"on"]
    world.run_until(lambda: strict.done)
    assert strict.error == "SessionLost"
    open_session(client, services[1], "anew")
    assert answers_of(world, client.call(services[1], payload=b"anew", session="anew")) == [b"anew"]


def test_a11_a_replica_that_comes_back_has_the_last_weights_before_it_is_healthy() -> None:
    """A11: of two fan-outs the later one is played, and no call comes before it."""
    world = World()
    client = world.client()
    service = client.deploy(num_replicas=2, endpoints={"echo": {}, "load": {"replay_last": True}})
    loaded = [client.fanout(service, "load", weights) for weights in (b"of monday", b"of tuesday")]
    world.run_until(lambda: all(one.done for one in loaded))
    world.workers_of("Sim/0")[0].die()
    calls = [client.call(service, payload=b"%d" % n) for n in range(20)]
    world.run_until(lambda: bool(world.replays))
    assert replica_of(world, service, 0)["state"] == "RECOVERING"
    world.run_until(lambda: replica_of(world, service, 0)["state"] == "HEALTHY")
    successor = world.workers_of("Sim/0")[0]
    assert world.replays == [(successor.link.name, b"of tuesday")]
    answers_of(world, *calls)


def test_a11_a_replica_that_starts_while_weights_are_sent_has_them_before_it_is_healthy() -> None:
    """A11: the fan-out goes to those that are healthy; who is loading meanwhile is ready before it ends, and waits for the replay."""
    world = World()
    client = world.client()
    service = client.deploy(num_replicas=2, endpoints={"echo": {}, "load": {"replay_last": True}})
    world.actor = lambda worker, method, payload: (2.0, OK, payload)
    world.workers_of("Sim/0")[0].die()
    world.run_for(0.01)
    loaded = client.fanout(service, "load", b"of today")
    world.run_for(1.0)
    assert replica_of(world, service, 0)["state"] == "RECOVERING"
    world.run_until(lambda: bool(world.replays))
    assert loaded.points == [[1, 0]]
    assert not world.broker.state.services[service["service"]].replicas[0].healthy
    world.run_until(lambda: replica_of(world, service, 0)["state"] == "HEALTHY")
    assert world.replays == [(world.workers_of("Sim/0")[0].link.name, b"of today")]


def test_the_last_weights_outlive_the_broker() -> None:
    """A11, F10: a replica that dies after the broker came back has them again before it is HEALTHY."""
    world = World()
    client = world.client()
    service = client.deploy(num_replicas=2, endpoints={"echo": {}, "load": {"replay_last": True}})
    loaded = client.fanout(service, "load", b"weights")
    world.run_until(lambda: loaded.done)
    world.kill_broker()
    world.run_for(6.0)
    world.workers_of("Sim/0")[0].die()
    world.run_until(lambda: replica_of(world, service)["restarts"] == 1 and bool(replica_of(world, service)["healthy"]))
    assert [arguments for _, arguments in world.replays] == [b"weights"]
