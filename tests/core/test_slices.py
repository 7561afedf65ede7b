"""Calls held as one (C2): a way of holding them that nobody outside can tell from holding each by itself."""

from __future__ import annotations

from typing import Any

import pytest

from forge_broker.core.requests import Request, Slice
from forge_contract.errors import (
    CallCancelled,
    NoHealthyReplicas,
    Overloaded,
    ProtocolError,
    ServiceStopped,
    SessionLost,
    UnknownSession,
)
from forge_contract.messages import DISPATCH, DROP, OK, RAISED, REPLIES, UNTOUCHED
from tests.core.peers import Bench, ClientPeer, WorkerPeer


def kinds(bench: Bench, client: ClientPeer) -> list[type]:
    return [type(call) for call in bench.state.clients[client.id].calls.values()]


def reply(worker: WorkerPeer, *calls: tuple[int, int, bytes], attempts: int | list[int] = 1, status: int = OK) -> None:
    """These, in this order, whatever the worker believes it holds."""
    ids, sizes = [call[0] for call in calls], [len(call[2]) for call in calls]
    worker.say(
        [REPLIES, worker.replica_epoch, ids, attempts, status, sizes], packed=b"".join(call[2] for call in calls)
    )


def test_plain_calls_of_an_envelope_are_held_as_one_for_each_replica_they_go_to() -> None:
    """C2: and are answered in one run."""
    bench, client, (one, two), endpoint = Bench().serving(2)
    client.call(endpoint, b"a", b"bb", b"", b"dddd")
    assert kinds(bench, client) == [Slice] * 4
    assert len(set(bench.state.clients[client.id].calls.values())) == 2
    assert (one.seen, two.seen) == ([b"a", b"bb"], [b"", b"dddd"])
    one.reply()
    two.reply(1)
    assert client.results == {1: (OK, b"a"), 2: (OK, b"bb"), 3: (OK, b"")}
    assert kinds(bench, client) == [Slice]
    two.reply()
    assert client.results[4] == (OK, b"dddd")
    assert bench.state.held_bytes == 0


def served(client: ClientPeer, workers: list[WorkerPeer], endpoint: int, calls: int, cost: int = 1000) -> list[int]:
    """How many of so many new calls each gets; what they had is answered."""
    for worker in workers:
        worker.reply(cost=cost)
    client.call(endpoint, *[b"x"] * calls)
    return sorted(len(worker.calls) for worker in workers)


def rounds(client: ClientPeer, workers: list[WorkerPeer], endpoint: int, count: int, cost: int) -> None:
    for _ in range(count):
        client.call(endpoint, *[b"x"] * 16)
        for worker in workers:
            worker.reply(cost=cost)


def test_many_calls_that_cost_less_than_an_envelope_stay_together_once_that_is_known() -> None:
    """R3: each replica with room in turn, and no share is worth less than what it takes to send it."""
    _, client, workers, endpoint = Bench().serving(2, replica_max_concurrent_requests=1000)
    rounds(client, workers, endpoint, 4, cost=1000)
    assert served(client, workers, endpoint, 16) == [8, 8], "not from a few rounds"
    rounds(client, workers, endpoint, 80, cost=1000)
    before = [len(worker.seen) for worker in workers]
    assert [served(client, workers, endpoint, 16) for _ in range(2)] == [[0, 16], [0, 16]]
    assert [len(worker.seen) - seen for worker, seen in zip(workers, before, strict=True)] == [16, 16], "in turn"
    assert served(client, workers, endpoint, 7) == [3, 4], "few are dealt evenly, whatever they cost"
    assert served(client, workers, endpoint, 400) == [200, 200], "so much work is worth being divided"


def test_calls_that_have_become_dear_or_wait_are_dealt_evenly_again() -> None:
    _, client, workers, endpoint = Bench().serving(2, replica_max_concurrent_requests=1000)
    for cost, after in ((1_000_000, 30), (0, 2)):
        rounds(client, workers, endpoint, 80, cost=1000)
        assert served(client, workers, endpoint, 16) == [0, 16]
        rounds(client, workers, endpoint, after, cost=cost)
        assert served(client, workers, endpoint, 16, cost) == [8, 8]


def test_one_worker_that_was_interrupted_changes_nothing() -> None:
    _, client, workers, endpoint = Bench().serving(2, replica_max_concurrent_requests=1000)
    rounds(client, workers, endpoint, 100, cost=1000)
    for cost in (0, 1000, 3_000_000, 1000):
        assert served(client, workers, endpoint, 16, cost) == [0, 16]


def test_short_calls_of_many_clients_that_come_in_one_turn_leave_in_one_envelope() -> None:
    """W1: with one call from each nobody could put them together but the broker."""
    bench, client, workers, endpoint = Bench().serving(2)
    others = [bench.client() for _ in range(4)]
    rounds(client, workers, endpoint, 40, cost=20_000)

    def turn() -> list[int]:
        for worker in workers:
            worker.reply(cost=20_000)
        with bench.one_turn():
            for other in others:
                other.call(endpoint, b"y")
        return sorted(len(worker.calls) for worker in workers)

    assert [turn() for _ in range(3)] == [[0, 4]] * 3
    rounds(client, workers, endpoint, 4, cost=1_000_000)
    assert turn() == [2, 2]


def test_a_cost_that_is_none_breaks_the_protocol() -> None:
    bench, client, (worker,), endpoint = Bench().serving()
    client.call(endpoint, b"a")
    worker.reply(cost=-1)
    assert bench.state.counters["ProtocolError"] == 1
    assert worker.name not in bench.state.workers


def test_what_finds_no_room_waits_as_one_and_leaves_as_there_is_room() -> None:
    """R1: late binding is for each call."""
    bench, client, (worker,), endpoint = Bench().serving(1, replica_max_concurrent_requests=2)
    client.call(endpoint, b"a", b"b", b"c", b"dd", b"", b"f")
    assert kinds(bench, client) == [Slice] * 6
    assert bench.service().endpoints[0].queue.length == 4
    worker.reply(1)
    assert worker.seen == [b"a", b"b", b"c"]
    worker.reply()
    assert worker.seen == [b"a", b"b", b"c", b"dd", b""]
    worker.reply()
    worker.reply()
    assert client.results == {at: (OK, one) for at, one in enumerate([b"a", b"b", b"c", b"dd", b"", b"f"], 1)}
    assert bench.state.held_bytes == bench.service().endpoints[0].queue.length == 0


def full(*waiting: bytes) -> tuple[Bench, ClientPeer, WorkerPeer, int]:
    """One call runs where there is room for one, and these wait as one behind it."""
    bench, client, (worker,), endpoint = Bench().serving(1, replica_max_concurrent_requests=1)
    client.call(endpoint, b"first")
    client.call(endpoint, *waiting)
    return bench, client, worker, endpoint


def test_one_that_waits_among_others_can_be_looked_at_and_cancelled_and_the_others_stay_in_order() -> None:
    """F5, C5."""
    bench, client, worker, endpoint = full(b"a", b"bb", b"c", b"d")
    assert "waits in Echo.predict, 4 long" in client.ask("explain", subject=f"{client.id:06x}-3")["story"][-1]
    client.cancel(3, 5)
    assert isinstance(client.error(3), CallCancelled)
    for _ in range(3):
        worker.reply()
    assert worker.seen == [b"first", b"a", b"c"]
    client.call(endpoint, b"e")
    worker.reply()
    assert worker.seen == [b"first", b"a", b"c", b"e"]
    assert bench.state.held_bytes == 0


def test_when_all_that_wait_as_one_are_cancelled_nothing_is_left_of_them() -> None:
    """F5."""
    bench, client, worker, _ = full(b"a", b"b")
    client.cancel(2, 3)
    assert bench.service().endpoints[0].queue.length == 0
    worker.reply()
    assert worker.seen == [b"first"]
    assert bench.state.held_bytes == 0


def test_a_call_of_higher_priority_goes_before_those_that_wait_as_one() -> None:
    _bench, client, worker, endpoint = full(b"a", b"b")
    client.call(endpoint, b"urgent", priority=5)
    worker.reply()
    worker.reply()
    assert worker.seen == [b"first", b"urgent", b"a"]


def test_what_comes_back_from_a_lost_replica_goes_before_those_that_wait_as_one() -> None:
    """F2."""
    bench, client, (one, two), endpoint = Bench().serving(2, replica_max_concurrent_requests=2)
    client.call(endpoint, b"a", b"b", b"c", b"d")
    client.call(endpoint, b"e", b"f")
    one.die()
    two.reply()
    assert two.seen == [b"c", b"d", b"a", b"b"]
    two.reply()
    assert two.seen[4:] == [b"e", b"f"]
    two.reply()
    assert len(client.results) == 6
    assert bench.state.held_bytes == 0


def test_a_client_that_goes_takes_along_what_waits_as_one() -> None:
    """F5."""
    bench, _client, worker, endpoint = full(b"a")
    other = bench.client()
    other.call(endpoint, b"b", b"c")
    bench.handle_gone(other)
    assert bench.service().endpoints[0].queue.length == 1
    worker.reply()
    worker.reply()
    assert worker.seen == [b"first", b"a"]


def test_endpoints_take_turns_though_calls_wait_as_one() -> None:
    """R1."""
    bench, client, (worker,), endpoint = Bench().serving(
        1, replica_max_concurrent_requests=1, endpoints=("predict", "other")
    )
    other = endpoint + 1
    client.call(endpoint, b"first")
    client.call(endpoint, b"a", b"b", b"c")
    client.call(other, b"x", b"y")
    for _ in range(6):
        worker.reply()
    assert worker.seen == [b"first", b"a", b"x", b"b", b"y", b"c"]
    assert bench.state.held_bytes == 0


def test_more_than_the_queue_may_hold_is_refused_and_the_rest_waits() -> None:
    """W8."""
    bench, client, (worker,), endpoint = Bench().serving(1, replica_max_concurrent_requests=1, max_queued_requests=2)
    client.call(endpoint, b"a", b"b", b"c", b"d")
    assert isinstance(client.error(4), Overloaded)
    client.call(endpoint, b"e")
    assert isinstance(client.error(5), Overloaded)
    for _ in range(3):
        worker.reply()
    assert worker.seen == [b"a", b"b", b"c"]
    assert bench.state.held_bytes == 0


def test_what_waits_as_one_for_a_service_that_stops_is_told() -> None:
    bench, client, worker, _ = full(b"a", b"b")
    client.control("stop", service=bench.service().id)
    assert isinstance(client.error(2), ServiceStopped)
    assert isinstance(client.error(3), ServiceStopped)
    worker.reply()
    assert client.results[1] == (OK, b"first")


def test_what_waits_as_one_gives_up_when_no_replica_comes() -> None:
    """F8."""
    bench, client, (worker,), endpoint = Bench().serving(1, no_replica_grace_s=2.0)
    worker.die()  # and no other says hello
    client.call(endpoint, b"a", b"b")
    bench.advance(2.1)
    assert isinstance(client.error(1), NoHealthyReplicas)
    assert isinstance(client.error(2), NoHealthyReplicas)
    assert bench.state.held_bytes == 0


@pytest.mark.parametrize("column", [{"timeout": 5.0}, {"priority": 1}, {"hints": {"k": 1}}])
def test_calls_with_more_than_arguments_are_held_by_themselves(column: dict[str, object]) -> None:
    bench, client, (worker,), endpoint = Bench().serving(1)
    client.call(endpoint, b"a", b"b", **column)
    assert kinds(bench, client) == [Request, Request]
    worker.reply()
    assert len(client.results) == 2


def test_a_lost_replica_gives_back_what_is_left_in_its_old_order() -> None:
    """F2, F3: attempt 2, and what was answered is not among it."""
    _bench, client, (one, two), endpoint = Bench().serving(2)
    client.call(endpoint, b"a", b"b", b"c", b"d", b"e", b"f")
    held = one.calls
    reply(one, held[1])
    one.die()
    assert client.results == {2: (OK, b"b")}
    assert [(attempt, payload) for _, attempt, payload in two.calls[3:]] == [(2, b"a"), (2, b"c")]
    two.reply()
    assert sorted(client.results) == [1, 2, 3, 4, 5, 6]


def test_one_of_many_is_cancelled_and_the_others_are_not() -> None:
    """F5: its room comes back when the worker has really ended it."""
    bench, client, (worker,), endpoint = Bench().serving(1, replica_max_concurrent_requests=3)
    first, second, third = client.call(endpoint, b"a", b"b", b"c")
    client.cancel(second)
    assert isinstance(client.error(second), CallCancelled)
    assert worker.of(DROP) == [[DROP, client.ids([second])]]
    assert bench.service().replicas[0].active == 3
    worker.reply()
    assert bench.service().replicas[0].active == 0
    assert (client.results[first], client.results[third]) == ((OK, b"a"), (OK, b"c"))


def test_a_client_that_goes_leaves_none_of_them_behind() -> None:
    """F5."""
    bench, client, (worker,), endpoint = Bench().serving(1)
    other = bench.client()
    other.call(endpoint, b"a", b"b")
    client.call(endpoint, b"c")
    bench.handle_gone(other)
    assert worker.of(DROP) == [[DROP, other.ids([1, 2])]]
    worker.reply()
    assert client.results == {1: (OK, b"c")}
    assert bench.state.held_bytes == 0


def test_a_reply_that_comes_twice_in_one_envelope_is_refused_the_second_time() -> None:
    """W3."""
    bench, client, (worker,), endpoint = Bench().serving(1)
    client.call(endpoint, b"a", b"b")
    first, second = worker.calls
    reply(worker, first, first, second)
    assert client.results == {1: (OK, b"a"), 2: (OK, b"b")}
    assert bench.state.ledger.fenced == 1


def test_a_reply_of_another_attempt_is_refused_and_the_call_goes_on() -> None:
    """W3."""
    bench, client, (worker,), endpoint = Bench().serving(1)
    client.call(endpoint, b"a", b"b")
    reply(worker, *worker.calls, attempts=2)
    assert client.results == {}
    assert bench.state.ledger.fenced == 2
    worker.reply()
    assert sorted(client.results) == [1, 2]


def test_replies_to_calls_of_several_envelopes_and_clients_may_come_mixed() -> None:
    bench, client, (worker,), endpoint = Bench().serving(1)
    other = bench.client()
    client.call(endpoint, b"a", b"b")
    other.call(endpoint, b"c", b"d")
    client.call(endpoint, b"e", timeout=9.0)
    a, b, c, d, e = worker.calls
    reply(worker, a, c, e, d, b)
    assert client.results == {1: (OK, b"a"), 2: (OK, b"b"), 3: (OK, b"e")}
    assert other.results == {1: (OK, b"c"), 2: (OK, b"d")}


def test_large_results_of_calls_held_as_one_keep_their_frames() -> None:
    """W1."""
    bench, client, (worker,), endpoint = Bench().serving(1)
    client.call(endpoint, b"a", b"b")
    ids = [call[0] for call in worker.calls]
    worker.say([REPLIES, worker.replica_epoch, ids, 1, OK, [1, -1]], packed=b"x", large=(b"L" * 9,))
    assert client.results == {1: (OK, b"x"), 2: (OK, [b"L" * 9])}
    assert bench.state.held_bytes == 0


def test_a_failure_and_a_call_given_back_are_told_apart() -> None:
    """F2: statuses of their own end the holding as one."""
    _bench, client, (one, two), endpoint = Bench().serving(2)
    client.call(endpoint, b"a", b"b", b"c", b"d")
    ids = [call[0] for call in one.calls]
    one.say([REPLIES, one.replica_epoch, ids, 1, [RAISED, UNTOUCHED], [1, 0]], packed=b"!")
    assert client.results == {1: (RAISED, b"!")}
    assert [payload for _, _, payload in two.calls] == [b"c", b"d", b"b"]


def test_an_id_used_again_is_never_held_as_one_with_others() -> None:
    """W3: the ledger could not tell the two apart."""
    bench, client, (worker,), endpoint = Bench().serving(1)
    client.honest = False
    client.call(endpoint, b"a", b"b")
    client.sequence = 1
    client.call(endpoint, b"again", b"new")  # sequences 2 and 3
    assert worker.seen == [b"a", b"b", b"new"]
    assert bench.state.counters["reused_ids"] == 1


def test_a_client_that_was_given_up_and_comes_back_cannot_use_an_id_that_still_runs() -> None:
    """W3: held as one, it would stand in the ledger for both."""
    bench, client, (worker,), endpoint = Bench().serving(1)
    other = bench.client()
    other.call(endpoint, b"a", b"b")
    bench.handle_gone(other)
    back = bench.client(client=other.id)
    back.call(endpoint, b"c", b"d", b"e")
    assert [payload for _, _, payload in worker.calls] == [b"a", b"b", b"e"]
    assert isinstance(back.error(1), ProtocolError)
    worker.reply()
    assert back.results[3] == (OK, b"e")
    assert bench.service().replicas[0].active == 0
    assert client.call(endpoint, b"f") == [1]


@pytest.mark.parametrize("before", [0, 2])
def test_replies_that_name_more_bytes_than_came_cost_the_worker_its_link_and_no_call_its_answer(before: int) -> None:
    """W8: nothing of the message counts, not even what there were bytes for."""
    bench, client, (one, two), endpoint = Bench().serving(2)
    for _ in range(before):
        client.call(endpoint, b"t", timeout=9.0)
    client.call(endpoint, b"a", b"b", b"c", b"d")
    ids = [call[0] for call in one.calls]
    sizes = [1] * (len(ids) - 1)
    one.say([REPLIES, one.replica_epoch, ids, 1, OK, [*sizes, 9]], packed=b"x" * len(ids))
    assert client.results == {}
    two.reply()
    assert [status for status, _ in client.results.values()] == [OK] * (before + 4)
    assert bench.state.held_bytes == 0


def in_sessions(
    limit: int = 8, sessions: int = 4, **options: Any
) -> tuple[Bench, ClientPeer, WorkerPeer, WorkerPeer, int, list[str]]:
    """Sessions that have been called once, so that each lives somewhere."""
    bench, client, (one, two), endpoint = Bench().serving(2, replica_max_concurrent_requests=limit, **options)
    names = [f"s{number}" for number in range(sessions)]
    for name in names:
        client.ask("open_session", service=bench.service().id, session=name, hints={})
        client.call(endpoint, b"first", session=name)
    one.reply()
    two.reply()
    client.results.clear()
    return bench, client, one, two, endpoint, names


def test_calls_of_sessions_are_held_as_one_for_each_replica_they_live_on() -> None:
    """C2, S2: each goes where its session lives, and the worker is told which session it is of."""
    bench, client, one, two, endpoint, names = in_sessions()
    pins = bench.service().pins
    numbers = client.call(endpoint, b"a", b"bb", b"c", b"dd", session=names)
    assert kinds(bench, client) == [Slice] * 4
    for worker, idx in ((one, 0), (two, 1)):
        expected = [
            payload for payload, name in zip([b"a", b"bb", b"c", b"dd"], names, strict=True) if pins[name] == idx
        ]
        assert [payload for _, _, payload in worker.calls] == expected
        (dispatch,) = worker.of(DISPATCH)[-1:]
        assert dispatch[7]["session"] == [name for name in names if pins[name] == idx]
    bench.advance(5.0)
    one.reply()
    two.reply()
    assert [client.results[number] for number in numbers] == [(OK, b"a"), (OK, b"bb"), (OK, b"c"), (OK, b"dd")]
    assert bench.state.held_bytes == 0


def test_a_session_whose_calls_are_held_with_others_was_used_until_they_ended() -> None:
    """S2: session_ttl_s, whether they end together or one by one."""
    bench, client, one, _two, endpoint, names = in_sessions(session_ttl_s=10.0)
    mine = [name for name in names if bench.service().pins[name] == 0]
    bench.advance(8.0)
    client.call(endpoint, b"a", b"b", session=mine)
    bench.advance(20.0)
    assert set(bench.service().sessions) == set(mine)  # of the others nothing ran
    reply(one, one.calls[0])
    bench.advance(5.0)
    one.reply()
    bench.advance(6.0)
    assert set(bench.service().sessions) == {mine[1]}
    bench.advance(5.0)
    assert not bench.service().sessions


def test_calls_of_sessions_that_come_back_from_a_lost_replica_keep_their_session_and_their_order() -> None:
    """F2, S3."""
    bench, client, one, two, endpoint, names = in_sessions()
    mine = next(name for name in names if bench.service().pins[name] == 0)
    client.call(endpoint, b"a", b"b", b"c", session=mine)
    one.die()
    assert bench.service().pins[mine] == 1
    assert [(attempt, payload) for _, attempt, payload in two.calls] == [(2, b"a"), (2, b"b"), (2, b"c")]
    two.reply()
    assert [status for status, _ in client.results.values()] == [OK] * 3


def test_calls_of_sessions_wait_behind_what_waits_for_their_replica() -> None:
    """A6: a session's calls start in the order sent."""
    bench, client, one, _, endpoint, names = in_sessions(limit=2)
    mine = next(name for name in names if bench.service().pins[name] == 0)
    client.call(endpoint, b"a", b"b", b"c", session=mine)
    client.call(endpoint, b"d", session=mine)
    one.reply()
    one.reply()
    assert one.seen[-4:] == [b"a", b"b", b"c", b"d"]
    assert bench.service().replicas[0].parked.length == 0


def test_an_unknown_session_among_others_is_refused_and_the_others_go_on() -> None:
    _bench, client, one, two, endpoint, names = in_sessions()
    good, bad = client.call(endpoint, b"a", b"b", session=[names[0], "nobody's"])
    assert isinstance(client.error(bad), UnknownSession)
    one.reply()
    two.reply()
    assert client.results[good] == (OK, b"a")


def test_a_session_that_was_answered_only_among_others_has_something_to_lose() -> None:
    """S3: on_session_loss."""
    bench, client, (one, _), endpoint = Bench().serving(2, on_session_loss="raise")
    client.ask("open_session", service=bench.service().id, session="s", hints={})
    client.call(endpoint, b"first", session="s")  # which gives it its home
    client.call(endpoint, b"second", b"third", session="s")
    reply(one, one.calls[1])
    one.die()
    assert client.results[2] == (OK, b"second")
    assert isinstance(client.error(1), SessionLost)
    assert isinstance(client.error(3), SessionLost)


def test_calls_of_a_session_stay_behind_one_that_waits_for_company() -> None:
    """A6: at another endpoint, and though there is room."""
    bench, client, (worker,), batched = Bench().serving(
        1,
        endpoints=("predict", "other"),
        own_options={"predict": {"batch_size": 4, "batch_mode": "call", "batch_sessions": True}},
    )
    plain = batched + 1
    client.ask("open_session", service=bench.service().id, session="s", hints={})
    client.call(plain, b"first", session="s")
    client.call(batched, b"waits", session="s")
    client.call(plain, b"after", session="s")
    assert worker.seen == [b"first"]
    bench.advance(0.01)
    assert worker.seen == [b"first", b"waits", b"after"]
