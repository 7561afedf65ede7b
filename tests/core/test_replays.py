"""The last weights are there again before a replica is HEALTHY (A11): whose fan-outs are kept, to whom they are played, and who waits."""

from __future__ import annotations

from typing import Any

import pytest

from forge_broker.core.replicas import ReplicaState
from forge_contract.messages import FAILED, OK, RAISED, READY, REFUSE, REPLAY, UNREADY
from tests.core.peers import UNTRUSTED, Bench, ClientPeer, Serving, WorkerPeer


def loading(replicas: int = 2, **options: Any) -> Serving:
    """A service whose endpoints `load` and `tune` are replayed."""
    return Bench().serving(replicas, endpoints=("load", "tune"), endpoint_options={"replay_last": True}, **options)


def played(worker: WorkerPeer) -> list[tuple[int, bytes]]:
    """(method, arguments) of what it was told to replay since the last look, in order."""
    found = [(message[1], payloads[0]) for message, payloads in worker.heard if message[0] == REPLAY]
    worker.of(REPLAY)
    return found


def fanned(client: ClientPeer, endpoint: int, payload: bytes, *workers: WorkerPeer, status: int = OK) -> None:
    """A fan-out that these workers, all there are, end with this status."""
    client.fanout(endpoint, payload)
    for worker in workers:
        worker.reply(status=status)


def successor(bench: Bench, lost: WorkerPeer) -> WorkerPeer:
    """This worker dies; the one that is started for it, not READY yet."""
    lost.die()
    bench.advance(2.0)
    (worker,) = bench.launched()
    return worker


def state_of(bench: Bench, idx: int) -> ReplicaState:
    return bench.service().replicas[idx].state


def test_a_replica_that_comes_back_has_the_last_weights_before_it_is_healthy() -> None:
    """A11."""
    bench, client, (one, two), load = loading()
    fanned(client, load, b"old", one, two)
    fanned(client, load, b"new", one, two)
    again = successor(bench, two)
    assert played(again) == [(0, b"new")]
    again.ready(0)
    client.call(load, b"x", b"y")
    assert (state_of(bench, 1), again.seen) == (ReplicaState.RECOVERING, [])
    again.ready(1)
    assert state_of(bench, 1) is ReplicaState.HEALTHY


def test_ready_may_come_once_when_all_is_played() -> None:
    """A11: a worker that plays before it says READY says so at once."""
    bench, client, (one, two), load = loading()
    fanned(client, load, b"w", one, two)
    again = successor(bench, two)
    again.ready(1)
    assert state_of(bench, 1) is ReplicaState.HEALTHY


def test_a_replica_that_starts_later_is_played_them_in_the_order_of_the_last_fanouts() -> None:
    """A11: one of each endpoint, the newest last, also to a replica whose worker was drained."""
    bench, client, (one, two), load = loading()
    tune = bench.service().endpoints[1].id
    for endpoint, payload in ((load, b"a"), (tune, b"b"), (load, b"c")):
        fanned(client, endpoint, payload, one, two)
    client.control("drain", target=two.name)
    again = successor(bench, two)
    assert played(again) == [(1, b"b"), (0, b"c")]
    again.ready(2)
    assert state_of(bench, 1) is ReplicaState.HEALTHY


def test_nobody_becomes_healthy_while_such_a_fanout_is_open_and_the_newcomer_is_played_it_too() -> None:
    """A11: it was not among those the fan-out went to."""
    bench, client, (one, two), load = loading()
    fanned(client, load, b"old", one, two)
    again = successor(bench, two)
    assert played(again) == [(0, b"old")]
    client.fanout(load, b"new")
    again.ready(1)
    assert state_of(bench, 1) is ReplicaState.RECOVERING
    assert again.seen == []
    one.reply()
    assert client.parts[2] == {(0, 0): (OK, b"new")}
    assert played(again)[-1] == (0, b"new")
    assert state_of(bench, 1) is ReplicaState.RECOVERING
    again.ready(bench.state.workers[again.name].replays)
    assert state_of(bench, 1) is ReplicaState.HEALTHY


def test_a_fanout_that_ends_while_a_replica_loads_is_played_to_it_after_the_older_ones() -> None:
    """A11: READY after the older ones only is not enough."""
    bench, client, (one, two), load = loading()
    fanned(client, load, b"old", one, two)
    again = successor(bench, two)
    fanned(client, load, b"new", one)
    payloads = [payload for _, payload in played(again)]
    assert (payloads[0], payloads[-1]) == (b"old", b"new")
    again.ready(1)
    assert state_of(bench, 1) is ReplicaState.RECOVERING
    again.ready(len(payloads))
    assert state_of(bench, 1) is ReplicaState.HEALTHY


@pytest.mark.parametrize("how", ["raised", "lost", "cancelled", "expired", "client gone"])
def test_a_fanout_that_fails_is_not_kept_and_keeps_nobody_waiting(how: str) -> None:
    """A11, A5: the last successful one is played, and admissions go on."""
    bench, client, (one, two, three), load = loading(3)
    fanned(client, load, b"good", one, two, three)
    again = successor(bench, three)
    again.ready(1)
    assert state_of(bench, 2) is ReplicaState.HEALTHY
    late = successor(bench, again)
    caller = bench.client() if how == "client gone" else client
    sequence = caller.fanout(load, b"bad", **({"timeout": 1.0} if how == "expired" else {}))
    one.reply()
    late.ready(1)
    assert state_of(bench, 2) is ReplicaState.RECOVERING
    if how == "raised":
        two.reply(status=RAISED)
        assert client.parts[sequence] == {(0, 0): (OK, b"bad"), (1, 0): (RAISED, b"bad")}
    elif how == "lost":
        two.die()
        assert client.parts[sequence][1, 0][0] == FAILED
    elif how == "cancelled":
        caller.cancel(sequence)
    elif how == "expired":
        bench.advance(1.1)
    else:
        bench.handle_gone(caller)
    worker = bench.state.workers[late.name]
    if worker.replays > worker.played:
        late.ready(worker.replays)
    assert state_of(bench, 2) is ReplicaState.HEALTHY
    assert {payload for _, payload in played(late)} == {b"good"}
    assert bench.service().open_replays == 0


def test_of_two_open_fanouts_the_newcomer_waits_for_both() -> None:
    """A11: and is played the one that ended last, which is what the others have."""
    bench, client, (one, two), load = loading()
    again = successor(bench, two)
    client.fanout(load, b"first")
    client.fanout(load, b"second")
    again.ready(0)
    one.reply(1)
    assert (state_of(bench, 1), played(again)) == (ReplicaState.RECOVERING, [])
    one.reply(1)
    assert played(again) == [(0, b"second")]
    again.ready(1)
    assert state_of(bench, 1) is ReplicaState.HEALTHY


def test_a_fanout_that_reaches_nobody_keeps_nobody_waiting() -> None:
    """A11, F8."""
    bench, client, (one,), load = loading(1)
    again = successor(bench, one)
    client.fanout(load, b"w")
    assert 1 in client.results
    again.ready(0)
    assert state_of(bench, 0) is ReplicaState.HEALTHY
    assert played(again) == []


def test_fanouts_of_other_endpoints_and_plain_calls_are_not_played() -> None:
    """A11: `replay_last` is asked for, and means the fan-out."""
    bench, client, (one, two), endpoint = Bench().serving(2)
    fanned(client, endpoint, b"w", one, two)
    assert played(successor(bench, two)) == []
    bench, client, (one, two), load = loading()
    client.call(load, b"a")
    one.reply()
    assert played(successor(bench, two)) == []


def test_every_rank_plays_them_before_its_replica_is_healthy() -> None:
    """A11, A7."""
    bench, client, (zero, one), load = loading(1, procs=2)
    fanned(client, load, b"w", zero, one)
    zero.die()
    one.die()
    bench.advance(2.0)
    ranks = bench.launched()
    assert [played(rank) for rank in ranks] == [[(0, b"w")]] * 2
    ranks[0].ready(1)
    ranks[1].ready(0)
    assert state_of(bench, 0) is ReplicaState.RECOVERING
    ranks[1].ready(1)
    assert state_of(bench, 0) is ReplicaState.HEALTHY


def test_a_replay_has_the_stamp_of_who_called() -> None:
    """A11, W6: an untrusted caller's arguments stay untrusted when the broker plays them."""
    bench, _, (one, two), load = loading()
    fanned(bench.client(UNTRUSTED), load, b"w", one, two)
    ((_, _, trusted, _),) = successor(bench, two).of(REPLAY)
    assert trusted is False


def test_a_replay_that_raises_is_a_start_that_failed_and_is_tried_again() -> None:
    """A11, F7: the others serve on."""
    bench, client, (one, two), load = loading()
    fanned(client, load, b"w", one, two)
    again = successor(bench, two)
    again.say([UNREADY, ["StartFailed", {"message": "torn"}], 0])
    assert state_of(bench, 1) is ReplicaState.RECOVERING
    assert "torn" in bench.service().replicas[1].last_error
    client.call(load, b"x")
    assert one.seen[-1] == b"x"
    again.die()
    bench.advance(10.0)
    (third,) = bench.launched()
    assert played(third) == [(0, b"w")]
    third.ready(1)
    assert state_of(bench, 1) is ReplicaState.HEALTHY


@pytest.mark.parametrize("says", [[2], [0, 0], [1, 1]], ids=str)
def test_a_worker_that_counts_replays_wrong_is_refused(says: list[int]) -> None:
    """W8, A11: more than it was sent, or again what it has told."""
    bench, client, (one, two), load = loading()
    fanned(client, load, b"w", one, two)
    again = successor(bench, two)
    for count in says:
        again.say([READY, count])
    assert again.of(REFUSE)
    assert again.name not in bench.state.workers
