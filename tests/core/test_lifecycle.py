"""How services, replicas and workers start, are placed, are lost and stop (A2, A3, A7, A10, F1, F7, C3)."""

from __future__ import annotations

from typing import Any

import pytest

from forge_broker.core.actions import Exit, Kill, KillPeer, Launch
from forge_broker.core.events import LaunchEnded, ProcessGone, Terminate
from forge_broker.core.workers import WorkerState
from forge_contract.errors import ConfigError, ServiceStopped, StartFailed
from forge_contract.messages import ASSIGN, BEGIN, BYE, MASTER, NOTICE, READY, REFUSE, STOP, UNREADY
from tests.core.peers import UNTRUSTED, Bench, WorkerPeer, spec


def test_deploy_is_answered_when_all_replicas_are_healthy() -> None:
    """A2."""
    bench = Bench()
    client = bench.client()
    number = client.deploy(num_replicas=2)
    one, two = bench.launched()
    one.ready()
    assert number not in client.answers
    two.ready()
    answer = client.answers[number]
    assert answer["name"] == "Echo"
    assert answer["replicas"] == [0, 1]
    assert set(answer["endpoints"]) == {"predict"}


def test_the_ranks_of_a_replica_are_assigned_and_meet_where_rank_0_says() -> None:
    """A7: RANK, WORLD_SIZE, LOCAL_RANK and the replica's GPUs; a rendezvous anew for each epoch."""
    bench = Bench(gpus=("0", "1", "2"))
    client = bench.client()
    client.deploy(procs=2, with_gpus=True)
    zero, one = bench.launched()
    fields = [worker.of(ASSIGN)[0][1] for worker in (zero, one)]
    assert [(one["rank"], one["world"], one["local_rank"], one["local_world"]) for one in fields] == [
        (0, 2, 0, 2),
        (1, 2, 1, 2),
    ]
    assert [one["gpus"] for one in fields] == [["0", "1"], ["0", "1"]]
    assert all(one["serial"] and one["concurrency"] == 1 and one["epoch"] == 1 for one in fields)
    one.say([MASTER, "10.0.0.1", 5])
    assert not one.of(BEGIN)
    zero.say([MASTER, "10.0.0.5", 40111])
    assert zero.of(BEGIN) == one.of(BEGIN) == [[BEGIN, "10.0.0.5", 40111]]
    zero.die()
    bench.advance(0.1)
    bench.handle(LaunchEnded(one.launch, "exit code 0", []))
    zero, one = bench.launched()
    assert zero.of(ASSIGN)[0][1]["epoch"] == 2
    assert not zero.of(BEGIN)


def test_a_users_exception_in_one_replica_reaches_the_deployer_and_stops_the_others() -> None:
    """A2, known wrong way 15: nothing is left."""
    bench = Bench()
    client = bench.client()
    number = client.deploy(num_replicas=2)
    one, two = bench.launched()
    one.ready()
    two.say([UNREADY, None, 3], packed=b"exc")
    assert one.of(STOP)
    assert two.of(STOP)
    for worker in (one, two):
        worker.say([BYE, "stopped"])
        assert number not in client.answers
        worker.die()
    assert client.answers[number] == b"exc"
    state = bench.state
    assert not any((state.services, state.launches, state.names, state.endpoints))


def test_a_later_failure_to_start_is_tried_again() -> None:
    """F7."""
    bench, client, (worker,), _ = Bench().serving(1)
    worker.die()
    bench.advance(0.1)
    (again,) = bench.launched()
    again.say([UNREADY, ["RemoteError", {"type_name": "OSError", "remote_message": "disk"}], 3], packed=b"exc")
    assert "rank 0 could not start" in bench.service().replicas[0].last_error
    again.die()
    bench.advance(30.0)
    (third,) = bench.launched()
    third.ready()
    assert bench.service().replicas[0].healthy
    assert client.of(NOTICE)[-1][1:] == ["restarted", {"service": bench.service().id, "replica": 0, "epoch": 3}]


def test_a_process_that_dies_three_times_before_the_start_fails_it_with_its_last_lines() -> None:
    """A2, F7."""
    bench = Bench()
    client = bench.client()
    number = client.deploy()
    for _ in range(3):
        (launch,) = bench.of(Launch)
        bench.handle(LaunchEnded(launch.launch, "signal SIGSEGV", ["line one", "line two"]))
        bench.advance(5.0)
    error = client.answers[number]
    assert isinstance(error, StartFailed)
    assert "died 3 times" in str(error)
    assert "line two" in str(error)
    assert bench.state.services == {}


def test_a_worker_that_leaves_while_it_loads_counts_as_a_death() -> None:
    """F7: or a class whose `__init__` ends its process would be started without end, without a pause."""
    bench = Bench()
    client = bench.client()
    number = client.deploy()
    for _ in range(3):
        (worker,) = bench.launched()
        worker.say([BYE, "exit"])
        worker.die()
        bench.advance(5.0)
    assert isinstance(client.answers[number], StartFailed)


def test_a_recovered_replica_is_what_it_was_but_for_its_epoch() -> None:
    """F7: no recovery leaves a trace in what the next worker is told, in names, or in the service's configuration."""
    bench, client, (worker,), _ = Bench().serving(1)
    (first,) = [message[1] for message in worker.of(ASSIGN)]
    before = client.ask("find", name="Echo")
    for epoch in (2, 3, 4):
        worker.die()
        bench.advance(40.0)
        (worker,) = bench.launched()
        assert [message[1] for message in worker.of(ASSIGN)] == [{**first, "epoch": epoch}]
        worker.ready()
    after = client.ask("find", name="Echo")
    assert {**after, "metrics": None} == {**before, "metrics": None}
    assert repr(bench.service().replicas[0]) == "<Replica Echo/0 HEALTHY 0/10 in flight>"


def test_a_replica_that_keeps_dying_is_unhealthy_and_comes_back() -> None:
    """F7: ever more slowly, without anyone's help."""
    bench, client, (worker,), endpoint = Bench().serving(1)
    for _ in range(3):
        worker.die()
        if bench.service().replicas[0].state.value == "UNHEALTHY":
            break
        bench.advance(2.0)
        (worker,) = bench.launched()
        worker.ready()
    state = client.ask("state", service="Echo")["replicas"][0]
    assert (state["state"], state["failed"], state["restarts"]) == ("UNHEALTHY", True, 3)
    assert "exit code 1" in state["last_error"]
    bench.advance(2.0)
    (worker,) = bench.launched()
    worker.ready()
    client.call(endpoint, b"x")
    assert worker.seen == [b"x"]


def test_a_replica_that_cannot_be_placed_says_why_once() -> None:
    """A3."""
    bench = Bench(gpus=("0",), max_workers=1)
    client = bench.client()
    client.deploy(with_gpus=True, num_replicas=2)
    notices = [message for message in client.of(NOTICE) if message[1] == "pending"]
    assert len(notices) == 1
    assert "1 GPU" in notices[0][2]["why"]
    state = client.ask("state", service="Echo")["replicas"]
    assert [bool(one["pending"]) for one in state] == [False, True]
    bench.worker(gpus=("7",), host="other").ready()
    assert not bench.service().replicas[1].pending_why


def test_idle_workers_are_used_before_new_ones_are_launched_and_their_gpus_are_theirs() -> None:
    """X2, A3: a GPU never has two holders."""
    bench = Bench(gpus=("0", "1"))
    idle = bench.worker(gpus=("0",))
    bench.client().deploy(with_gpus=True, num_replicas=2)
    assert idle.of(ASSIGN)
    (launch,) = bench.of(Launch)
    assert launch.gpus == ("1",)
    rival = bench.worker(gpus=("1",))
    assert rival.of(REFUSE)


def test_a_hand_started_workers_gpu_is_kept_for_its_successor_and_then_given_away() -> None:
    """F7: capacity does not melt away."""
    bench = Bench(gpus=("0",))
    worker = bench.worker(gpus=("0",))
    worker.say([BYE, "replaced"])
    bench.client().deploy(with_gpus=True)
    assert not bench.of(Launch)
    successor = bench.worker(gpus=("0",))
    assert successor.of(ASSIGN)
    successor.say([BYE, "gone"])
    bench.advance(10.5)
    assert [launch.gpus for launch in bench.of(Launch)] == [("0",)]


def test_a_service_named_kept_keeps_its_gpus() -> None:
    """A3: what a holder is called is no reason to take its GPU."""
    bench = Bench(gpus=("0",))
    bench.client().deploy(name="kept", with_gpus=True)
    bench.launched()
    assert bench.worker(gpus=("0",)).of(REFUSE)


def test_a_launch_has_one_worker() -> None:
    """W6: nobody takes a rank by guessing the number of its launch."""
    bench, client, (worker,), endpoint = Bench().serving(1)
    thief = bench.worker(UNTRUSTED, launch=worker.launch)
    assert thief.of(REFUSE)
    client.call(endpoint, b"x")
    assert worker.seen == [b"x"]
    assert bench.worker(launch=12345).of(STOP)


def test_a_launched_worker_that_says_hello_after_its_replica_was_stopped_is_told_to_stop() -> None:
    """C6: a draining replica gets nothing new."""
    bench = Bench()
    client = bench.client()
    client.deploy()
    (launch,) = bench.of(Launch)
    stop = client.control("stop", service="Echo")
    assert [kill.launch for kill in bench.of(Kill)] == [launch.launch]
    worker = bench.worker(launch=launch.launch)
    assert worker.of(STOP)
    assert not worker.of(ASSIGN)
    worker.die()
    assert client.answers[stop] == {}


def test_a_launched_worker_that_comes_too_late_for_its_epoch_is_told_to_stop() -> None:
    """W3: the replica was tried anew meanwhile."""
    bench = Bench()
    bench.client().deploy(procs=2)
    one, two = bench.of(Launch)
    worker = bench.worker(launch=one.launch)
    worker.die()
    late = bench.worker(launch=two.launch)
    assert late.of(STOP)
    assert not late.of(ASSIGN)


def test_stop_answers_when_the_last_worker_is_gone() -> None:
    """A10: running calls finish within the grace, queued ones and new ones learn that it is stopped."""
    _bench, client, (worker,), endpoint = Bench().serving(1, replica_max_concurrent_requests=1)
    running, queued = client.call(endpoint, b"a", b"b")
    number = client.control("stop", service="Echo")
    assert isinstance(client.error(queued), ServiceStopped)
    assert isinstance(client.error(client.call(endpoint, b"c")[0]), ServiceStopped)
    assert number not in client.answers
    worker.reply()
    assert client.results[running] == (0, b"a")
    worker.say([BYE, "stopped"])
    assert number not in client.answers
    worker.die()
    assert client.answers[number] == {}
    assert [message[1] for message in client.of(NOTICE)][-1] == "stopped"


def test_a_worker_that_dies_while_it_drains_is_only_gone() -> None:
    """C3: what it held fails; nothing is started again."""
    bench, client, (zero, one), endpoint = Bench().serving(1, procs=2)
    (running,) = client.call(endpoint, b"a")
    number = client.control("stop", service="Echo")
    zero.die()
    assert running not in client.results
    one.die()
    assert isinstance(client.error(running), ServiceStopped)
    assert client.answers[number] == {}
    bench.advance(60.0)
    assert not bench.of(Launch)


def test_a_replica_that_waits_for_its_restart_when_the_service_stops_is_not_restarted() -> None:
    """C3: its deadlines find it STOPPED while another replica still drains."""
    bench, client, (one, _two), _ = Bench().serving(2, start_timeout_s=6.0, stop_grace_s=50.0)
    one.die()
    client.control("stop", service="Echo")
    assert [replica.state.value for replica in bench.service().replicas.values()] == ["STOPPED", "DRAINING"]
    bench.advance(20.0)
    assert not bench.of(Launch)
    assert bench.state.pending == {}


def test_a_start_timeout_finds_a_stopped_replica_at_rest() -> None:
    """C3."""
    bench = Bench(max_workers=1)
    client = bench.client()
    client.deploy(num_replicas=2, start_timeout_s=6.0, stop_grace_s=50.0)
    (worker,) = bench.launched()
    worker.ready()
    client.control("stop", service="Echo")
    bench.advance(7.0)
    assert not bench.of(Launch)


def test_a_start_that_takes_too_long_fails_with_the_reason() -> None:
    """A2, A3."""
    bench = Bench(max_workers=0)
    client = bench.client()
    number = client.deploy(start_timeout_s=5.0)
    bench.advance(6.0)
    error = client.answers[number]
    assert isinstance(error, StartFailed)
    assert "max_workers" in str(error)


def test_a_worker_that_does_not_stop_in_time_is_killed() -> None:
    """F9: the launched by its launch, the watched by its pid; of a remote one we let go."""
    bench = Bench(max_workers=1, liveness=1000)
    here, there = bench.worker(), bench.worker(host="other")
    client = bench.client()
    number = client.deploy(num_replicas=3, stop_grace_s=1.0)
    (launched,) = bench.launched()
    for worker in (here, there, launched):
        worker.ready()
    stop = client.control("stop", service="Echo")
    bench.advance(3.0)
    assert not bench.of(Kill)
    bench.advance(1.5)
    assert [kill.launch for kill in bench.of(Kill)] == [launched.launch]
    assert bench.of(KillPeer) == [KillPeer(here.name)]
    bench.handle(ProcessGone(here.name))
    launched.die()
    assert client.answers[number]["replicas"] == [0, 1, 2]
    assert client.answers[stop] == {}


def test_a_worker_that_began_anew_is_not_killed_for_what_its_predecessor_was_told() -> None:
    """C3: the deadline is the name's, the order to stop was the old link's."""
    bench = Bench()
    bench.advance(bench.state.config.recovery_s + 1.0)
    worker = bench.worker(host="other", holds={"service": 1})
    assert worker.of(STOP)
    worker.epoch, worker.sent, worker.received = 2, 0, 0
    worker.fields["holds"] = None
    worker.hello()
    bench.advance(4.0)
    assert bench.state.workers[worker.name].state is WorkerState.IDLE


def test_what_a_client_started_ends_with_it_and_what_is_detached_lives_on() -> None:
    """A10."""
    bench = Bench()
    client, other = bench.client(), bench.client()
    client.deploy()
    client.deploy(name="lasting", detached=True)
    bench.client(detached=True).deploy(class_name="Tool")
    workers = bench.launched()
    for worker in workers:
        worker.ready()
    client.say([BYE, "done"])
    assert workers[0].of(STOP)
    assert not workers[1].of(STOP)
    assert not workers[2].of(STOP)
    assert other.ask("find", name="lasting")["name"] == "lasting"


def test_a_name_is_taken_once() -> None:
    """A10, known wrong way 16: unnamed ones are numbered."""
    bench = Bench()
    client = bench.client()
    client.deploy(name="mine")
    assert isinstance(client.answers[client.deploy(name="mine")], ConfigError)
    for _ in range(3):
        client.deploy()
    assert set(bench.state.names) == {"mine", "Echo", "Echo-2", "Echo-3"}


def test_terminate_stops_everything_and_then_asks_for_the_exit() -> None:
    """F9."""
    bench, client, (worker,), _ = Bench().serving(1)
    client.deploy(class_name="Loading")
    bench.handle(Terminate("SIGTERM"))
    assert worker.of(STOP)
    refused = client.deploy(class_name="Late")
    assert isinstance(client.answers[refused], ServiceStopped)
    worker.say([BYE, "stopped"])
    assert not bench.of(Exit)
    worker.die()
    bench.end_killed()
    assert bench.of(Exit)


def test_terminate_ends_even_when_the_last_worker_just_stays_silent() -> None:
    """F9, C1: the exit may be due at a tick, with no event after it."""
    bench = Bench(max_workers=0, liveness=1000)
    worker = bench.worker(host="other")
    bench.client().deploy()
    worker.ready()
    bench.handle(Terminate("SIGTERM"))
    bench.advance(20.0)
    assert bench.of(Exit)


def test_one_lost_rank_loses_the_replica_and_the_others_are_told_to_stop() -> None:
    """F2, A7."""
    bench, _, (zero, one), _ = Bench().serving(1, procs=2)
    zero.die()
    assert one.of(STOP)
    one.say([READY, 0])
    assert bench.state.workers[one.name].state is WorkerState.DRAINING
    bench.advance(5.0)
    assert [kill.launch for kill in bench.of(Kill)] == [one.launch]


@pytest.mark.parametrize(
    "spoilt", [{"kind": "x"}, {"target": {}}, {"endpoints": [{}]}, {"config": {"prcs": 1}}, None], ids=str
)
def test_a_spec_that_cannot_hold_is_refused_and_leaves_nothing(spoilt: Any) -> None:
    """A2, W8."""
    bench = Bench()
    client = bench.client()
    number = client.control("deploy", spec=None if spoilt is None else {**spec(), **spoilt})
    assert isinstance(client.answers[number], ConfigError)
    assert not any((bench.state.services, bench.state.pending, bench.state.endpoints))
    assert isinstance(bench.worker(), WorkerPeer)
