"""Whole conversations between client, broker and workers under a virtual clock (see `world`)."""

from __future__ import annotations

from functools import partial

import pytest

from forge_contract.messages import request_id
from tests.face_to_face.world import OK, Reply, SimWorker, World


def test_a_call_travels_and_its_reply_comes_back() -> None:
    """§2, the life of a call."""
    world = World()
    client = world.client()
    service = client.deploy(num_replicas=2)
    call = client.call(service, payload=b"hello")
    world.run_until(lambda: call.done)
    assert (call.status, call.payload, call.trusted) == (OK, b"hello", True)
    assert world.starts() == [(request_id(client.link.client, 1), 1)]


def test_calls_of_one_turn_travel_in_one_envelope() -> None:
    """W1."""
    world = World()
    client = world.client()
    service = client.deploy(num_replicas=1, replica_max_concurrent_requests=100)
    sent = client.link.channel.sent
    calls = [client.call(service, payload=str(n).encode(), flush=False) for n in range(100)]
    client.flush()
    world.run_until(lambda: all(call.done for call in calls))
    assert client.link.channel.sent == sent + 1
    assert [call.payload for call in calls] == [str(n).encode() for n in range(100)]


def test_a_stateless_call_waits_until_some_replica_has_room() -> None:
    """R1: late binding. Three calls on two replicas of one slot each: the third starts where the first ends."""
    world = World()
    world.actor = lambda worker, method, payload: (float(payload), OK, payload)
    client = world.client()
    service = client.deploy(num_replicas=2, replica_max_concurrent_requests=1)
    slow, quick, third = (client.call(service, payload=text) for text in (b"5", b"1", b"1"))
    world.run_until(lambda: third.done)
    assert quick.done
    assert not slow.done


def test_a_killed_worker_costs_nobody_a_result() -> None:
    """F2 (the ledger's part): what a lost replica held is answered by another, attempt 2."""
    world = World()
    world.actor = lambda worker, method, payload: (1.0, OK, payload)
    client = world.client()
    service = client.deploy(num_replicas=2)
    calls = [client.call(service, payload=str(n).encode()) for n in range(20)]
    world.run_until(lambda: len(world.history) == 20)
    world.workers_of("Sim/0")[0].die()
    world.run_until(lambda: all(call.done for call in calls))
    assert [call.payload for call in calls] == [str(n).encode() for n in range(20)]
    assert all(call.replies == 1 for call in calls)
    assert sorted(attempt for _, attempt in world.starts()) == [1] * 20 + [2] * 10


def test_a_late_reply_of_a_worker_thought_dead_is_refused_and_counted() -> None:
    """W3, and known mistake 14: a paused worker on another host is taken for dead, its work is done elsewhere, and it wakes."""
    world = World(max_workers=0)
    world.actor = lambda worker, method, payload: (1.0, OK, worker.link.name.encode())
    workers = [world.worker(host="far-a"), world.worker(host="far-b")]
    client = world.client()
    service = client.deploy(num_replicas=2, replica_max_concurrent_requests=1)
    calls = [client.call(service), client.call(service)]
    world.run_until(lambda: len(world.history) == 2)
    paused = workers[0]
    paused.pause()
    world.run_until(lambda: all(call.done for call in calls))
    assert {call.payload for call in calls} == {workers[1].link.name.encode()}
    paused.resume()
    world.run_for(10.0)
    assert all(call.replies == 1 for call in calls)
    assert not paused.alive  # asked who it is, it said what it holds, and was told to stop


@pytest.mark.parametrize("seed", range(8))
def test_reconnects_and_half_open_connections_lose_nothing_and_run_nothing_twice(seed: int) -> None:
    """W4: ZeroMQ's own faults, on every side, while calls go on. No worker dies, so each call starts exactly once."""
    world = World(seed)
    world.actor = lambda worker, method, payload: (world.random.random() * 0.2, OK, payload)
    client = world.client()
    service = client.deploy(num_replicas=3)
    calls: list[Reply] = []

    def call(n: int) -> None:
        calls.append(client.call(service, payload=str(n).encode()))

    def disturb() -> None:
        peer = world.random.choice([peer for peer in world.peers.values() if peer.alive])
        if peer.connection.up:
            kind = world.random.randrange(3)
            if kind == 0:
                peer.connection.reconnect(world.random.random() * 0.5)
            elif kind == 1:
                peer.connection.half_open(to_broker=True, seconds=2.0)
            else:
                peer.connection.half_open(to_broker=False, seconds=2.0)

    for n in range(200):
        world.clock.at(world.clock.now + n * 0.05, partial(call, n))
        if n % 5 == 0:
            world.clock.at(world.clock.now + n * 0.05, disturb)
    world.run_until(lambda: len(calls) == 200 and all(call.done for call in calls))
    assert [call.payload for call in calls] == [str(n).encode() for n in range(200)]
    assert all(call.replies == 1 for call in calls)
    starts = world.starts()
    assert len(starts) == len(set(starts)) == 200
    assert world.faults["reconnect"] > 10


def test_a_connection_that_comes_back_after_a_long_time_still_delivers() -> None:
    """W4: kept envelopes wait for the acknowledgement, not for a number of tries."""
    world = World()
    client = world.client()
    service = client.deploy(num_replicas=1)
    client.connection.reconnect(after=20.0)
    call = client.call(service, payload=b"patience")
    world.run_until(lambda: call.done)
    assert call.payload == b"patience"


def test_sessions_stick_and_their_calls_start_in_order() -> None:
    """S2, A6."""
    world = World()
    world.actor = lambda worker, method, payload: (0.05, OK, worker.link.name.encode())
    client = world.client()
    service = client.deploy(num_replicas=4, replica_max_concurrent_requests=2)
    for sid in ("a", "b", "c"):
        client.ask("open_session", service=service["service"], session=sid, hints={})
    calls = {
        sid: [client.call(service, payload=f"{sid}{n:02}".encode(), session=sid) for n in range(10)] for sid in "abc"
    }
    world.run_until(lambda: all(call.done for group in calls.values() for call in group))
    for group in calls.values():
        assert len({call.payload for call in group}) == 1
    assert len({group[0].payload for group in calls.values()}) == 3  # to the least loaded, one each
    for worker in world.peers.values():
        if isinstance(worker, SimWorker):
            for sid in "abc":
                started = [payload for _, _, payload, session in worker.started if session == sid]
                assert started == sorted(started)


def test_a_session_moves_when_its_replica_dies_and_keeps_its_order() -> None:
    """S3 (without state), F2."""
    world = World()
    world.actor = lambda worker, method, payload: (0.5, OK, payload)
    client = world.client()
    service = client.deploy(num_replicas=2, replica_max_concurrent_requests=1)
    client.ask("open_session", service=service["service"], session="s", hints={})
    calls = [client.call(service, payload=str(n).encode(), session="s") for n in range(5)]
    world.run_until(lambda: len(world.history) == 1)
    pinned = client.ask("state", service=service["service"])["session_replica_map"]["s"]
    world.workers_of(f"Sim/{pinned}")[0].die()
    world.run_until(lambda: all(call.done for call in calls))
    order = [request & 0xFFFFFFFFFF for request, _ in world.starts()]
    assert order == [order[0], *range(order[0], order[0] + 5)]  # the first ran twice, then all in order


def test_a_mesh_gets_each_call_on_every_rank_in_the_same_order() -> None:
    """A7."""
    world = World()
    client = world.client()
    service = client.deploy(num_replicas=1, procs=3)
    calls = [client.call(service, payload=str(n).encode()) for n in range(10)]
    world.run_until(lambda: all(call.done for call in calls))
    orders = [[payload for _, _, payload, _ in worker.started] for worker in world.workers_of("Sim/0")]
    assert len(orders) == 3
    assert orders[0] == orders[1] == orders[2] == [str(n).encode() for n in range(10)]


def test_losing_one_rank_loses_the_replica_and_all_ranks_start_anew() -> None:
    """A7, F2: the next epoch has a new rendezvous."""
    world = World()
    world.actor = lambda worker, method, payload: (0.5, OK, payload)
    client = world.client()
    service = client.deploy(num_replicas=1, procs=2)
    call = client.call(service, payload=b"once more")
    world.run_until(lambda: len(world.history) == 2)
    before = world.workers_of("Sim/0")
    before[1].die()
    world.run_until(lambda: call.done)
    after = world.workers_of("Sim/0")
    assert call.payload == b"once more"
    assert not set(before) & set(after)
    assert {worker.assignment.epoch for worker in after} == {2}


def test_a_fan_out_reaches_every_healthy_replica_once_and_tells_who_died() -> None:
    """A5."""
    world = World()
    world.actor = lambda worker, method, payload: (0.5, OK, str(worker.assignment.replica).encode())
    client = world.client()
    service = client.deploy(num_replicas=3)
    call = client.fanout(service)
    world.run_until(lambda: len(world.history) == 3)
    world.workers_of("Sim/1")[0].die()
    world.run_until(lambda: call.done)
    assert call.points == [[0, 0], [1, 0], [2, 0]]
    assert [status for status, _ in call.payload] == [OK, 2, OK]
    assert len(world.history) == 3


def test_a_client_that_dies_frees_queue_and_workers_and_ends_what_it_started() -> None:
    """A10, F5, and known mistake 1."""
    world = World()
    world.actor = lambda worker, method, payload: (20.0, OK, payload)
    keeper, dying = world.client(), world.client(host="far")
    shared = keeper.deploy(num_replicas=1, replica_max_concurrent_requests=2, name="shared")
    own = dying.deploy(num_replicas=1, name="own")
    for _ in range(6):
        dying.call(shared)
    world.run_until(lambda: len(world.history) == 2)
    dying.die()
    call = keeper.call(shared, payload=b"mine")
    world.run_until(lambda: call.done)
    assert call.payload == b"mine"
    world.run_until(lambda: "own" not in world.broker.state.names)
    assert [service["name"] for service in keeper.ask("status")["services"]] == ["shared"]
    assert len(world.history) == 3  # the two that ran, and the keeper's: what was queued never started
    assert own["name"] == "own"


def test_a_timeout_answers_at_once_and_gives_the_room_back_only_when_the_call_has_ended() -> None:
    """F5, and known mistake 1: a caller's timeout never marks a replica failed."""
    world = World()
    world.actor = lambda worker, method, payload: (float(payload), OK, payload)
    client = world.client()
    service = client.deploy(num_replicas=1, replica_max_concurrent_requests=1)
    began = world.clock.now
    slow = client.call(service, payload=b"5", timeout=1.0)
    queued = client.call(service, payload=b"0.1", timeout=2.0)
    later = client.call(service, payload=b"0.1")
    world.run_until(lambda: slow.done and queued.done)
    assert (slow.error, queued.error) == ("CallTimeout", "CallTimeout")
    assert world.clock.now - began < 2.1
    world.run_until(lambda: later.done)
    assert 5.0 < world.clock.now - began < 5.5
    state = client.ask("state", service=service["service"])
    assert [(replica["state"], replica["restarts"]) for replica in state["replicas"]] == [("HEALTHY", 0)]


def test_a_busy_worker_of_this_machine_is_not_taken_for_dead() -> None:
    """F1: where the kernel tells, silence alone is *busy*: here a C call holds the GIL for a minute, and not even heartbeats come."""
    world = World()
    world.actor = lambda worker, method, payload: (0.1, OK, payload)
    client = world.client()
    service = client.deploy(num_replicas=1)
    worker = world.workers_of("Sim/0")[0]
    worker.pause(stopped=False)
    call = client.call(service, payload=b"wait")
    world.run_for(60.0)
    assert not call.done
    assert worker.alive
    worker.resume()
    world.run_until(lambda: call.done)
    assert call.replies == 1
    assert world.starts() == [(request_id(client.link.client, 1), 1)]


def test_a_stopped_worker_of_this_machine_is_killed_and_its_calls_run_elsewhere() -> None:
    """F1: SIGSTOP for longer than `liveness` heartbeats is no way to be busy. A shorter stop is forgiven."""
    world = World(heartbeat_s=0.5, liveness=10)
    world.actor = lambda worker, method, payload: (0.1, OK, payload)
    client = world.client()
    service = client.deploy(num_replicas=2)
    worker = world.workers_of("Sim/0")[0]
    worker.pause()
    calls = [client.call(service, payload=b"move"), client.call(service, payload=b"stay")]
    world.run_for(3.0)
    assert world.workers_of("Sim/0") == [worker]
    world.run_until(lambda: all(call.done for call in calls), within_s=8.0)
    assert not worker.alive
    assert [call.payload for call in calls] == [b"move", b"stay"]
    assert len(world.history) == 2  # the stopped one never began its call


def test_a_silent_worker_of_another_host_is_dead_after_liveness_heartbeats() -> None:
    """F1."""
    world = World(max_workers=0, heartbeat_s=0.5, liveness=10)
    world.actor = lambda worker, method, payload: (0.1, OK, payload)
    first, _second = world.worker(host="far-a"), world.worker(host="far-b")
    client = world.client()
    service = client.deploy(num_replicas=1)
    holder = first if first.assignment is not None else _second
    holder.pause()
    began = world.clock.now
    call = client.call(service, payload=b"move")
    world.run_until(lambda: call.done)
    assert 4.0 < world.clock.now - began < 7.0


def test_an_actor_that_dies_says_outcome_unknown_and_serves_the_queued_calls_anew() -> None:
    """A12."""
    world = World()
    world.actor = lambda worker, method, payload: (0.5, OK, payload)
    client = world.client()
    actor = client.deploy(kind="actor", replica_max_concurrent_requests=1)
    calls = [client.call(actor, payload=str(n).encode()) for n in range(4)]
    world.run_until(lambda: len(world.history) == 1)
    world.workers_of("Sim/0")[0].die()
    world.run_until(lambda: all(call.done for call in calls))
    assert [call.error for call in calls] == ["OutcomeUnknown", None, None, None]
    assert client.ask("state", service=actor["service"])["state_epoch"] == 2


def test_idle_workers_are_used_before_new_ones_are_launched() -> None:
    """X2, A3."""
    world = World(max_workers=1)
    by_hand = world.worker()
    client = world.client()
    client.deploy(num_replicas=2)
    assert by_hand.assignment is not None
    assert len(world.launched) == 1


def test_a_replica_that_cannot_be_placed_is_pending_and_says_why_and_starts_when_a_worker_comes() -> None:
    """A3."""
    world = World(max_workers=0, gpus=())
    client = world.client()
    answer = client.deploy(wait=False, num_replicas=1, with_gpus=True)
    world.run_until(lambda: any(topic == "pending" for topic, _ in client.notices))
    why = next(fields["why"] for topic, fields in client.notices if topic == "pending")
    assert "1 GPU" in why
    assert not answer.done
    world.worker(gpus=("0",), host="far")
    world.run_until(lambda: answer.done)
    assert answer.ok


def test_stopping_a_service_finishes_what_runs_and_leaves_no_process() -> None:
    """A2, X2."""
    world = World()
    world.actor = lambda worker, method, payload: (0.5, OK, payload)
    client = world.client()
    service = client.deploy(num_replicas=2, replica_max_concurrent_requests=1)
    calls = [client.call(service) for _ in range(4)]
    world.run_until(lambda: len(world.history) == 2)
    stopped = client.control("stop", {"service": service["service"]})
    world.run_until(lambda: stopped.done)
    assert stopped.ok
    assert not world.launched
    assert sorted(call.error or "answered" for call in calls)[:2] == ["ServiceStopped", "ServiceStopped"]


def test_a_setup_that_raises_reaches_the_deployer_and_leaves_nothing_half_started() -> None:
    """A2, and known mistake 15."""
    world = World()
    world.load_failure = b"the user's exception"
    client = world.client()
    answer = client.deploy(wait=False, num_replicas=3)
    world.run_until(lambda: answer.done)
    assert not answer.ok
    assert answer.payload == b"the user's exception"
    assert world.broker.state.services == {}
    assert world.broker.state.names == {}
    assert world.launched == {}


def test_terminating_stops_everything_and_then_exits() -> None:
    """F9 (the broker's end): no process is left."""
    world = World()
    client = world.client()
    client.deploy(num_replicas=2)
    world.terminate()
    world.run_until(lambda: world.exited)
    assert not world.launched


def test_a_worker_that_was_killed_is_replaced_without_anyones_help() -> None:
    """F7 (the core's part)."""
    world = World()
    client = world.client()
    service = client.deploy(num_replicas=1)
    world.workers_of("Sim/0")[0].die()
    world.run_until(lambda: ("restarted", {"service": service["service"], "replica": 0, "epoch": 2}) in client.notices)
    call = client.call(service, payload=b"back")
    world.run_until(lambda: call.done)
    assert call.payload == b"back"
