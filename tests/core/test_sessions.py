"""Sessions: pinned at their first call, in order whatever happens, ended in four ways (S1, S2, A6)."""

from __future__ import annotations

from typing import Any

import pytest

from forge_broker.core.status import SESSIONS_SHOWN
from forge_contract.errors import SessionClosed, UnknownSession
from forge_contract.messages import BYE, CONTROL, OK, UNTOUCHED
from tests.core.peers import Bench, built_in


def opened(replicas: int, *sids: str, **options: Any) -> Any:
    serving = Bench().serving(replicas, **options)
    for sid in sids:
        assert serving.client.ask("open_session", service="Echo", session=sid) == {}
    return serving


def test_a_session_is_pinned_at_its_first_call_to_the_least_loaded_and_stays() -> None:
    """S2."""
    bench, client, (one, two), endpoint = opened(2, "s")
    client.call(endpoint, b"x")
    assert bench.service().pins == {}
    client.call(endpoint, b"a", b"b", session="s")
    client.call(endpoint, b"c", session="s")
    assert bench.service().pins == {"s": 1}
    assert two.seen == [b"a", b"b", b"c"]
    assert one.seen == [b"x"]


def test_the_endpoints_own_router_pins_with_the_sessions_hints() -> None:
    """S2: the same key goes to the same replica, session after session."""
    serving = opened(3, routers={"predict": built_in("ConsistentHashRouter")})
    client, bench = serving.client, serving.bench
    for sid in ("s", "t", "u"):
        client.ask("open_session", service="Echo", session=sid, hints={"key": "prefix"})
        client.call(serving.endpoint, b"x", session=sid)
    assert len(set(bench.service().pins.values())) == 1


def test_opening_again_changes_nothing_and_closing_is_idempotent() -> None:
    """S2."""
    _, client, (worker,), endpoint = opened(1, "s")
    client.call(endpoint, b"a", session="s")
    assert client.ask("open_session", service="Echo", session="s") == {}
    client.call(endpoint, b"b", session="s")
    assert worker.seen == [b"a", b"b"]
    assert client.ask("close_session", service="Echo", session="s") == {}
    assert client.ask("close_session", service="Echo", session="s") == {}
    (late,) = client.call(endpoint, b"c", session="s")
    assert isinstance(client.error(late), UnknownSession)


def test_closing_fails_what_waits_and_lets_run_what_runs() -> None:
    """S1: parked calls of other sessions stay."""
    _, client, (worker,), endpoint = opened(1, "s", "t", replica_max_concurrent_requests=1)
    client.call(endpoint, b"t0", session="t")
    running = client.call(endpoint, b"a", session="s")
    worker.reply()
    client.call(endpoint, b"t1", session="t")
    (parked,) = client.call(endpoint, b"b", session="s")
    assert worker.seen == [b"t0", b"a"]
    client.ask("close_session", service="Echo", session="s")
    assert isinstance(client.error(parked), SessionClosed)
    worker.reply()
    assert client.results[running[0]] == (OK, b"a")
    assert worker.seen == [b"t0", b"a", b"t1"]


def test_closing_while_no_replica_is_healthy_fails_the_calls_that_wait_for_one() -> None:
    """S2, F8."""
    _bench, client, (worker,), endpoint = opened(1, "s")
    (running,) = client.call(endpoint, b"a", session="s")
    worker.die()
    assert running not in client.results
    (waiting,) = client.call(endpoint, b"b", session="s")
    client.ask("close_session", service="Echo", session="s")
    assert isinstance(client.error(running), SessionClosed)
    assert isinstance(client.error(waiting), SessionClosed)


def test_a_call_running_for_a_closed_session_is_not_tried_again() -> None:
    """S1, F2: its session is over when its replica dies."""
    _, client, (worker,), endpoint = opened(1, "s")
    (running,) = client.call(endpoint, b"a", session="s")
    client.ask("close_session", service="Echo", session="s")
    worker.die()
    assert isinstance(client.error(running), SessionClosed)


def test_a_session_keeps_its_order_when_its_replica_is_lost() -> None:
    """A6, F2: running, parked and new calls, in the order sent, on the replica it moves to."""
    _bench, client, (one, two), endpoint = opened(2, "s", replica_max_concurrent_requests=1)
    client.call(endpoint, b"a", b"b", b"c", session="s")
    assert one.seen == [b"a"]
    client.call(endpoint, b"x", b"y")
    one.die()
    client.call(endpoint, b"d", session="s")
    for _ in range(6):
        two.reply()
    assert [value for value in two.seen if value in (b"a", b"b", b"c", b"d")] == [b"a", b"b", b"c", b"d"]
    assert len(client.results) == 6


def test_a_session_keeps_its_order_when_its_worker_dies_before_it_has_given_back_all() -> None:
    """A6: what came back first waits at its replica, and what was lost with the replica is younger."""
    _, client, (one, two), endpoint = opened(2, "s")
    client.call(endpoint, b"a", b"b", session="s")
    one.reply(1, status=UNTOUCHED)
    client.call(endpoint, b"c", session="s")
    one.die()
    assert two.seen == [b"a", b"b", b"c"]


def test_a_parked_call_of_a_session_is_not_overtaken_by_a_later_one_that_was_not_yet_pinned() -> None:
    """A6: the queue of unpinned calls and the replica's own take turns, but not within a session."""
    bench, client, (one, two), endpoint = opened(2, "s", replica_max_concurrent_requests=1)
    one.die()
    client.call(endpoint, b"fill")
    client.call(endpoint, b"a", b"b", b"c", b"d", session="s")
    client.call(endpoint, b"x", b"y", b"z")
    bench.advance(0.1)
    (again,) = bench.launched()
    again.ready()
    for _ in range(10):
        two.reply()
        again.reply()
    order = [value for worker in (two, again) for value in worker.seen if value in (b"a", b"b", b"c", b"d")]
    assert order == [b"a", b"b", b"c", b"d"]
    assert len(client.results) == 8


def test_a_session_ends_after_its_ttl_without_use() -> None:
    """S2: a call that waits or runs is use."""
    bench, client, (worker,), endpoint = opened(1, "s", session_ttl_s=10.0)
    bench.advance(8.0)
    client.call(endpoint, b"a", session="s")
    bench.advance(25.0)
    assert "s" in bench.service().sessions
    worker.reply()
    bench.advance(9.0)
    assert "s" in bench.service().sessions
    bench.advance(12.0)
    assert len(bench.service().sessions) == len(bench.service().pins) == 0
    assert any("without use" in line for line in client.ask("explain", subject="s")["story"])


def test_a_session_ends_with_its_client() -> None:
    """S2: and its pin with it; another client's stays."""
    bench, client, _, endpoint = opened(1, "s")
    other = bench.client()
    other.ask("open_session", service="Echo", session="t")
    other.call(endpoint, b"t", session="t")
    client.call(endpoint, b"s", session="s")
    other.say([BYE, "done"])
    assert set(bench.service().sessions) == {"s"}
    assert bench.service().pins == {"s": 0}


def test_many_sessions_that_end_together_fail_what_waits_in_them_and_nothing_else() -> None:
    """S1, S2: calls of the clients that stay, in sessions of the one that went and in their own."""
    bench, client, _, endpoint = opened(1, "mine", replica_max_concurrent_requests=1)
    leaving = bench.client()
    for sid in ("a", "b", "c"):
        leaving.ask("open_session", service="Echo", session=sid)
    (running,) = client.call(endpoint, b"runs", session="mine")
    leaving.call(endpoint, b"a", b"b", session=["a", "b"])
    waiting = client.call(endpoint, b"x", b"b", b"y", session=["mine", "b", "mine"])
    leaving.say([BYE, "done"])
    assert isinstance(client.error(waiting[1]), SessionClosed)
    assert set(bench.service().sessions) == {"mine"}
    (replica,) = bench.service().replicas.values()
    assert [request.payload for request in replica.parked] == [b"x", b"y"]
    assert running not in client.results


def test_a_client_that_goes_is_not_told_of_the_calls_it_leaves() -> None:
    """W8, F5: an error for each would be written for nobody, while all others wait."""
    bench, client, (worker,), endpoint = opened(1, replica_max_concurrent_requests=1)
    leaving = bench.client()
    leaving.call(endpoint, b"runs", *[b"waits"] * 100)
    link = bench.state.links[leaving.name]
    bench.handle_gone(leaving)
    assert len(link.outbox) == 0
    assert bench.state.held_bytes == 0
    worker.reply()
    client.call(endpoint, b"next")
    assert worker.seen == [b"runs", b"next"]


def test_the_state_shows_the_first_sessions_and_where_these_live() -> None:
    """X5: a broker with many answers at once, and what it shows fits together."""
    _, client, _, endpoint = opened(1)
    sids = [f"{at:04}" for at in range(SESSIONS_SHOWN, -1, -1)]
    client.say(*([CONTROL, at, "open_session", {"service": "Echo", "session": sid}, 0] for at, sid in enumerate(sids)))
    client.call(endpoint, b"last", b"first", session=[sids[-1], sids[0]])
    state = client.ask("state", service="Echo")
    assert state["sessions"] == SESSIONS_SHOWN + 1
    assert state["active_sessions"] == sorted(sids[:SESSIONS_SHOWN])
    assert state["session_replica_map"] == {sids[0]: 0}


def test_sessions_belong_to_one_service() -> None:
    """S1, known wrong way 5."""
    bench, client, _, _endpoint = opened(1, "s")
    client.deploy(class_name="Other")
    bench.launched()[0].ready()
    other = bench.service("Other").endpoints[0].id
    (sequence,) = client.call(other, b"x", session="s")
    assert isinstance(client.error(sequence), UnknownSession)


@pytest.mark.parametrize(
    "fields", [{"session": ""}, {"session": 5}, {"session": "x" * 300}, {"session": "s", "hints": [1]}]
)
def test_a_session_without_a_proper_id_is_refused(fields: dict[str, Any]) -> None:
    """W8."""
    _, client, _, _ = opened(1)
    assert isinstance(client.ask("open_session", service="Echo", **fields), Exception)
