"""Calls sent ahead of room (R1): to replicas that end calls in microseconds, and back from one that has become slow."""

from __future__ import annotations

from typing import Any

import pytest

from forge_broker.core.ahead import is_stuck, widened
from forge_broker.core.dispatch import LOOK_S
from forge_broker.core.replicas import AHEAD_AT_MOST
from forge_contract.messages import OK, RECALL, RETURNED, UNTOUCHED
from tests.core.peers import Bench, ClientPeer, WorkerPeer

ROOM = 2
WAITING = 200


def payloads(count: int, first: int = 0) -> list[bytes]:
    return [b"%d" % at for at in range(first, first + count)]


def fast(bench: Bench, workers: list[WorkerPeer], rounds: int = 2) -> None:
    """All end what they have eight times in each of so many looks."""
    for _ in range(rounds):
        for _ in range(8):
            for worker in workers:
                worker.reply()
            bench.advance(LOOK_S / 8)


def hurried(replicas: int = 1, **options: Any) -> tuple[Bench, ClientPeer, list[WorkerPeer], int]:
    """A service whose replicas are fast, with calls that wait for them."""
    options = {"replica_max_concurrent_requests": ROOM, "dispatch_ahead_s": LOOK_S, **options}
    bench, client, workers, endpoint = Bench().serving(replicas, **options)
    client.call(endpoint, *payloads(WAITING * replicas))
    fast(bench, workers)
    return bench, client, workers, endpoint


def test_the_room_of_a_replica_is_what_it_ends_in_the_time_given_and_at_least_what_it_runs() -> None:
    assert widened(10, 500, 0.01, 0.002) == 100
    assert widened(10, 49, 0.01, 0.002) == 10
    assert widened(10, 0, 0.01, 0.002) == 10
    assert widened(10, 10**6, 0.01, 0.002) == 10 + AHEAD_AT_MOST


def test_what_would_wait_ten_times_as_long_as_it_may_is_stuck() -> None:
    assert not is_stuck(50, 500, 0.01, 0.002)  # a millisecond's worth
    assert not is_stuck(50, 25, 0.01, 0.002)  # 20 ms
    assert is_stuck(50, 24, 0.01, 0.002)
    assert is_stuck(1, 0, 0.01, 0.002)


def test_a_replica_that_ends_calls_in_no_time_gets_more_than_it_runs_at_once_and_shows_that_they_wait() -> None:
    """R1, X5"""
    bench, client, (worker,), _ = hurried()
    (replica,) = bench.service().replicas.values()
    assert replica.room > ROOM
    assert len(worker.calls) == replica.active > ROOM
    assert (replica.active_requests, replica.capacity_utilization) == (ROOM, 1.0)
    assert replica.queue_depth == replica.active - ROOM
    (told,) = client.ask("state", service=bench.service().id)["replicas"]
    assert (told["active_requests"], told["queue_size"]) == (ROOM, replica.active - ROOM)
    while worker.calls:
        worker.reply()
    assert client.results == {at + 1: (OK, one) for at, one in enumerate(payloads(WAITING))}


def test_when_nothing_waits_any_more_a_replica_has_its_own_room_and_nobody_looks() -> None:
    bench, client, (worker,), endpoint = hurried()
    while worker.calls:
        worker.reply()
    bench.advance(2 * LOOK_S)
    (replica,) = bench.service().replicas.values()
    assert replica.room == ROOM
    assert not bench.service().looking
    client.call(endpoint, *payloads(5))
    assert len(worker.calls) == ROOM


def test_what_a_slow_replica_was_sent_ahead_is_called_back_once_and_runs_elsewhere() -> None:
    """R1: a call does not stand behind a slow one while another replica is free."""
    bench, client, (one, two), _ = hurried(2)
    assert len(one.calls) > ROOM
    while two.calls:
        two.reply()
    bench.advance(3 * LOOK_S)
    assert one.of(RECALL) == [[RECALL]]
    bench.advance(3 * LOOK_S)
    assert one.of(RECALL) == []
    slow, back = one.calls[:ROOM], one.calls[ROOM:]
    one.calls, lines = back, len(bench.state.story)
    one.reply(status=RETURNED, payload=b"")
    seen = len(two.seen)
    while two.calls:
        two.reply()
    assert two.seen[seen - ROOM :][: len(back)] == [payload for _, _, payload in back]
    one.calls = slow
    one.reply()
    assert len(client.results) == 2 * WAITING
    assert all(status == OK for status, _ in client.results.values())
    (name,) = {replica.name for replica in bench.service().replicas.values() if replica.ranks[0].name == one.name}
    assert "called back" in "\n".join(client.ask("explain", subject=name)["story"])
    # Nothing has happened to the calls themselves: no line for each, and no retries (C5).
    assert len(bench.state.story) == lines
    assert bench.service().endpoints[0].stats.retries == 0
    # It stays, and is given calls again.
    assert bench.service().pool.roomy == 0b11


def test_a_worker_that_leaves_while_it_is_called_back_gets_nothing_new() -> None:
    """F9"""
    bench, client, (one, two), endpoint = hurried(2)
    while two.calls:
        two.reply()
    bench.advance(3 * LOOK_S)
    one.calls, kept = one.calls[ROOM:], one.calls[:ROOM]
    one.reply(3, status=RETURNED, payload=b"")
    one.reply(status=UNTOUCHED, payload=b"")
    seen = len(one.seen)
    while two.calls:
        two.reply()
    client.call(endpoint, *payloads(9))
    assert len(one.seen) == seen
    one.calls = kept
    one.reply()
    while two.calls:
        two.reply()
    assert len(client.results) == 2 * WAITING + 9


def test_calls_of_a_session_stay_where_it_lives() -> None:
    """A6: their order is kept, and no other replica may run them."""
    bench, client, (worker,), endpoint = hurried()
    client.ask("open_session", service=bench.service().id, session="s", hints={})
    client.call(endpoint, *payloads(4, 1000), session="s")
    fast(bench, [worker])
    while worker.calls:
        worker.reply()
    assert [one for one in worker.seen if len(one) == 4] == payloads(4, 1000)


def test_what_was_sent_ahead_comes_back_in_its_old_order_when_the_replica_dies() -> None:
    """F2"""
    bench, client, (worker,), _ = hurried()
    held = [payload for _, _, payload in worker.calls]
    worker.die()
    (queue,) = bench.service().queues[:1]
    assert [request.payload for request in queue][: len(held)] == held
    bench.advance(1.0)
    (after,) = bench.launched()
    after.ready()
    assert after.seen == held[:ROOM]
    for _ in range(WAITING):
        after.reply()
    assert len(client.results) == WAITING


@pytest.mark.parametrize(
    "serving",
    [
        {"dispatch_ahead_s": 0.0},
        {"endpoint_options": {"delivery": "at_most_once"}},
        {"kind": "actor"},
        {"procs": 2},
    ],
    ids=["not wanted", "at most once", "actor", "mesh"],
)
def test_nothing_is_sent_ahead(serving: dict[str, Any]) -> None:
    """F3: of a call sent ahead nobody could say whether it has begun."""
    options = {"replica_max_concurrent_requests": ROOM, "dispatch_ahead_s": LOOK_S, **serving}
    bench, client, workers, endpoint = Bench().serving(**options)
    client.call(endpoint, *payloads(WAITING))
    most = 0
    for _ in range(24):
        most = max(most, *(len(worker.calls) for worker in workers))
        for worker in workers:
            worker.reply()
        bench.advance(LOOK_S / 8)
    assert 0 < most <= ROOM
    assert not bench.service().looking


def test_calls_that_take_longer_than_a_round_trip_are_not_sent_ahead() -> None:
    bench, client, (worker,), endpoint = Bench().serving(replica_max_concurrent_requests=ROOM)
    client.call(endpoint, *payloads(WAITING))
    for _ in range(40):
        bench.advance(0.005)
        assert len(worker.calls) == ROOM
        worker.reply()
