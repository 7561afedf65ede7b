"""Taking workers and replicas out of service (F9, X2): nothing fails, nothing is lost, sessions move with their state."""

from __future__ import annotations

from typing import Any

import pytest

from forge_broker.core.actions import Exit
from forge_broker.core.replicas import ReplicaState
from forge_contract.errors import ConfigError, SessionLost, StartFailed
from forge_contract.messages import BYE, FORGET, IMPORT, STOP, UNREADY, UNTOUCHED
from tests.core.peers import Bench, WorkerPeer, built_in


def leave(worker: WorkerPeer, **states: bytes) -> None:
    """What a worker does when it is told to stop: ends what runs, sends what sessions know, says bye, and is gone."""
    worker.reply()
    if states:
        worker.states(**states)
    worker.say([BYE, "stopped"])
    if worker.launch:
        worker.die()


def test_a_drained_replica_ends_what_runs_and_gives_the_rest_to_others() -> None:
    """F9, X2."""
    bench, client, (one, two), endpoint = Bench().serving(2, replica_max_concurrent_requests=1)
    client.call(endpoint, b"a", b"b")
    number = client.control("drain", target="Echo/0")
    ((_, _, grace_s, _),) = one.of(STOP)
    assert grace_s == bench.state.config.drain_grace_s
    client.call(endpoint, b"c")
    two.reply()
    assert two.seen == [b"b", b"c"]
    assert number not in client.answers
    leave(one)
    assert client.answers[number] == {}
    assert client.results[1][1] == b"a"
    assert list(bench.service().replicas) == [1]


def test_what_a_drained_replica_had_not_started_runs_elsewhere() -> None:
    """F9: given back, and no attempt of it was a death."""
    _, client, (one, two), endpoint = Bench().serving(2)
    client.call(endpoint, b"a", b"b")
    client.control("drain", target="Echo/0")
    one.reply(status=UNTOUCHED)
    assert two.seen == [b"b", b"a"]


def test_what_waits_for_a_drained_replica_goes_to_others_at_once() -> None:
    """F9, X2: not only when it is gone."""
    bench, client, workers, endpoint = Bench().serving(
        2, routers={"predict": built_in("ConsistentHashRouter")}, replica_max_concurrent_requests=1
    )
    client.call(endpoint, b"a", b"b", hints={"key": "k"})
    (holder,) = [idx for idx, worker in enumerate(workers) if worker.seen]
    assert workers[holder].seen == [b"a"]
    assert bench.service().replicas[holder].queue_depth == 1
    client.control("drain", target=f"Echo/{holder}")
    assert workers[1 - holder].seen == [b"b"]


def test_the_replica_of_a_drained_worker_starts_anew_elsewhere() -> None:
    """F9: and the worker's supervisor is told not to replace it."""
    bench = Bench(max_workers=0)
    client, (by_hand, spare) = bench.client(), (bench.worker(), bench.worker())
    client.deploy(num_replicas=1)
    by_hand.ready()
    endpoint = bench.service().endpoints[0].id
    client.call(endpoint, b"a")
    number = client.control("drain", target=by_hand.name)
    assert by_hand.of(STOP)[0][3] is False
    assert bench.service().replicas[0].state is ReplicaState.DRAINING
    client.call(endpoint, b"b")
    leave(by_hand)
    assert client.answers[number] == {}
    spare.ready()
    assert spare.seen == [b"b"]
    assert bench.service().replicas[0].restarts == 1


def test_an_idle_worker_leaves_at_once() -> None:
    """F9."""
    bench = Bench()
    client, worker = bench.client(), bench.worker()
    number = client.control("drain", target=worker.name)
    leave(worker)
    assert client.answers[number] == {}
    assert not bench.state.workers


@pytest.mark.parametrize("target", ["nobody", "Echo/7", "Echo/", "Other/0", "", "Echo/0"])
def test_what_cannot_be_drained_is_said(target: str) -> None:
    """F9: the last replica too, for it would leave the service dead."""
    _, client, _, _ = Bench().serving(1)
    assert isinstance(client.ask("drain", target=target), ConfigError)


def test_the_last_replica_that_stays_cannot_be_drained_while_another_still_leaves() -> None:
    """F9: two drains in a row must not leave the service dead either."""
    _, client, (one, two), _ = Bench().serving(2)
    number = client.control("drain", target="Echo/1")
    assert isinstance(client.ask("drain", target="Echo/0"), ConfigError)
    assert not one.of(STOP)
    leave(two)
    assert client.answers[number] == {}


def test_a_replica_that_is_drained_while_a_restart_replaces_it_does_not_come_back() -> None:
    """F9: and both who asked have their answer."""
    bench, client, (one, two), _ = Bench().serving(2)
    restart = client.control("restart", service="Echo")
    drain = client.control("drain", target="Echo/0")
    leave(one)
    assert client.answers[drain] == {}
    assert list(bench.service().replicas) == [1]
    leave(two)
    (again,) = bench.launched()
    again.ready()
    assert client.answers[restart] == {"restarted": [0, 1]}


def test_a_restart_replaces_the_replicas_one_by_one() -> None:
    """F9: the next only when the last is HEALTHY again, so calls always have somewhere to go."""
    bench, client, (one, two), endpoint = Bench().serving(2)
    number = client.control("restart", service="Echo")
    assert (len(one.of(STOP)), len(two.of(STOP))) == (1, 0)
    leave(one)
    (first,) = bench.launched()
    assert not two.of(STOP)
    client.call(endpoint, b"a")
    assert two.seen == [b"a"]
    first.ready()
    assert len(two.of(STOP)) == 1
    leave(two)
    (second,) = bench.launched()
    assert number not in client.answers
    second.ready()
    assert client.answers[number] == {"restarted": [0, 1]}


def test_a_restart_leaves_the_others_when_one_does_not_come_back() -> None:
    """F9: a bad release must not take down the last good replica."""
    bench, client, (one, two), _ = Bench().serving(2)
    number = client.control("restart", service="Echo")
    leave(one)
    (first,) = bench.launched()
    first.say([UNREADY, ["StartFailed", {"message": "no such file"}], 0])
    assert isinstance(client.answers[number], StartFailed)
    assert "no such file" in str(client.answers[number])
    assert not two.of(STOP)
    assert isinstance(client.ask("restart", service="Nobody"), Exception)


def test_terminate_drains_and_ends_and_tells_idle_workers_to_go_for_good() -> None:
    """F9."""
    bench, client, (worker,), endpoint = Bench().serving(1)
    idle = bench.worker()
    client.call(endpoint, b"a")
    assert client.ask("terminate") == {}
    assert [message[3] for message in (*worker.of(STOP), *idle.of(STOP))] == [False, False]
    leave(worker)
    assert client.results[1][1] == b"a"
    assert bench.of(Exit)


# Sessions.


def with_session(replicas: int = 2, **options: Any) -> Any:
    bench, client, workers, endpoint = Bench().serving(replicas, exports=True, **options)
    client.ask("open_session", service="Echo", session="s", hints={})
    return bench, client, workers, endpoint


def imports(worker: WorkerPeer) -> list[bytes]:
    return [payloads[0] for message, payloads in worker.heard if message[0] == IMPORT]


def test_a_session_moves_with_its_last_checkpoint_when_its_replica_dies() -> None:
    """S3: imported before its next call, on the same link, so nothing can overtake it."""
    _, client, (one, two), endpoint = with_session()
    client.call(endpoint, b"1", session="s")
    one.reply()
    one.states(s=b"state 1")
    client.call(endpoint, b"2", session="s")
    one.die()
    assert imports(two) == [b"state 1"]
    kinds = [message[0] for message, _ in two.heard]
    assert kinds.index(IMPORT) < max(at for at, kind in enumerate(kinds) if kind != IMPORT)
    assert two.seen == [b"2"]
    two.reply()
    client.call(endpoint, b"3", session="s")
    assert imports(two) == [b"state 1"]  # once


def test_a_drained_replica_sends_its_last_states_and_the_next_one_gets_them() -> None:
    """S3, F9: checkpoints may be rarer than calls; a drain loses none of them."""
    _, client, (one, two), endpoint = with_session(session_checkpoint_every=100)
    client.call(endpoint, b"1", session="s")
    one.reply()
    client.control("drain", target="Echo/0")
    client.call(endpoint, b"2", session="s")
    assert two.seen == []  # its state is still on its way
    leave(one, s=b"state 1")
    assert imports(two) == [b"state 1"]
    assert two.seen == [b"2"]


def test_what_is_given_back_piece_by_piece_keeps_its_order() -> None:
    """F2, F9, A6: a worker that leaves may give back what it gets after it began to, in a later envelope."""
    _, client, (one, two), endpoint = with_session()
    client.call(endpoint, b"1", b"2", b"3", session="s")
    client.control("drain", target="Echo/0")
    for _ in range(3):
        one.reply(1, status=UNTOUCHED)
    leave(one)
    assert two.seen == [b"1", b"2", b"3"]


def test_without_a_state_a_session_starts_afresh_or_is_lost_as_the_service_says() -> None:
    """S3: on_session_loss."""
    for choice in ("restart", "raise"):
        bench, client, (one, two), endpoint = Bench().serving(2, on_session_loss=choice)
        client.ask("open_session", service="Echo", session="s", hints={})
        client.call(endpoint, b"1", session="s")
        one.reply()
        client.call(endpoint, b"2", session="s")
        one.die()
        if choice == "restart":
            assert two.seen == [b"2"]
            continue
        client.call(endpoint, b"3", session="s")
        assert isinstance(client.error(2), SessionLost)
        assert isinstance(client.error(3), SessionLost)
        assert two.seen == []
        client.ask("close_session", service="Echo", session="s")
        assert not bench.service().sessions


def test_a_session_that_has_run_nothing_yet_has_nothing_to_lose() -> None:
    """S3: its first call may run again, on another replica."""
    _, client, (one, two), endpoint = Bench().serving(2, on_session_loss="raise")
    client.ask("open_session", service="Echo", session="s", hints={})
    client.call(endpoint, b"1", session="s")
    one.die()
    assert two.seen == [b"1"]


def test_checkpoints_are_kept_within_the_limit_and_go_with_their_session() -> None:
    """S3: bounded; one over the limit is not kept, and said so."""
    bench, client, (one, _), endpoint = Bench(checkpoint_bytes=10).serving(2, exports=True)
    client.ask("open_session", service="Echo", session="s", hints={})
    client.call(endpoint, b"1", session="s")
    one.reply()
    one.states(s=b"x" * 10)
    assert bench.state.checkpoint_bytes == 10
    one.states(s=b"x" * 11)
    assert bench.state.checkpoint_bytes == 0
    assert bench.state.counters["checkpoints_refused"] == 1
    one.states(s=b"x" * 3)
    client.ask("close_session", service="Echo", session="s")
    assert bench.state.checkpoint_bytes == 0
    assert one.of(FORGET) == [[FORGET, ["s"]]]


def test_a_worker_speaks_for_no_session_but_its_own() -> None:
    """S3, W3: a state from where the session is not pinned is ignored."""
    bench, client, (one, two), endpoint = with_session()
    client.call(endpoint, b"1", session="s")
    two.states(s=b"forged", nobody=b"x")
    assert bench.service().sessions["s"].state is None
    one.die()
    assert imports(two) == []


def test_a_replica_that_is_drained_before_it_began_its_part_is_left_out_of_a_fan_out() -> None:
    """F9, A5: a rolling restart fails no fan-out; what has begun is answered, what is lost still fails."""
    _, client, (one, two), endpoint = Bench().serving(2, replica_max_concurrent_requests=1)
    client.call(endpoint, b"a", b"b")
    sequence = client.fanout(endpoint, b"all")
    client.control("drain", target="Echo/0")
    two.reply()
    two.reply()
    assert client.parts[sequence] == {(1, 0): (0, b"all")}
    assert client.results[2][1] == b"b"
    one.reply()
    assert client.results[1][1] == b"a"
