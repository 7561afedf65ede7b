"""The small parts of the core, with plain values (C4, C5, C7, F7, X3)."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forge_broker.core.columns import read_calls
from forge_broker.core.deadlines import Deadlines, Kind
from forge_broker.core.events import Stalled
from forge_broker.core.ledger import Ledger
from forge_broker.core.queues import Queue
from forge_broker.core.recovery import backoff_s
from forge_broker.core.requests import Request
from forge_broker.core.stats import Window
from forge_broker.core.story import Story
from forge_contract.errors import ProtocolError
from forge_contract.messages import CALLS
from tests.core.peers import Bench


def request(id: int, priority: int = 0) -> Request:
    client: Any = SimpleNamespace(trusted=True)
    made = Request(id, client, None, b"", 0, 0.0)
    made.priority = priority
    return made


@given(st.lists(st.tuples(st.sampled_from(["push", "front", "take", "remove"]), st.integers(-2, 2)), max_size=40))
def test_a_queue_is_first_in_first_out_within_a_priority(steps: list[tuple[str, int]]) -> None:
    """R1, F2: against a plain list, with returns to the front and removals from the middle."""
    queue = Queue("q")
    model: list[Request] = []
    for count, (step, priority) in enumerate(steps, 1):
        if step == "push":
            queue.push(one := request(count, priority))
            model.append(one)
        elif step == "front":
            pair = [request(count * 1000, priority), request(count * 1000 + 1, priority)]
            queue.push_front(pair)
            model[:0] = pair
        elif model:
            model.sort(key=lambda one: -one.priority)  # stable
            gone = model.pop(0 if step == "take" else len(model) // 2)
            if step == "take":
                assert queue.take(1) == [gone]
            else:
                queue.remove(gone)
        assert list(queue) == sorted(model, key=lambda one: -one.priority)
        assert queue.first() is next(iter(queue), None)
        assert len(queue) == len(model)
    assert queue.drain() == sorted(model, key=lambda one: -one.priority)
    assert queue.take(1) == []


def test_release_gives_back_what_a_replica_held_in_the_order_of_dispatch_and_nothing_stays() -> None:
    """C4."""
    ledger, one, two = Ledger(), SimpleNamespace(key=1), SimpleNamespace(key=2)
    made = [request(key) for key in (5, 3, 9)]
    for each in made:
        ledger.held[one.key][each.id] = each
    ledger.held[two.key][4] = other = request(4)
    assert ledger.release(one) == made
    assert ledger.release(one) == []
    assert list(ledger) == [(2, 4, other)]


def test_deadlines_come_in_order_and_those_added_meanwhile_with_them() -> None:
    """C1."""
    deadlines = Deadlines()
    for when in (3.0, 1.0, 2.0):
        deadlines.add(when, Kind.CALL, when)
    seen = []
    for _, key in deadlines.due(2.0):
        seen.append(key)
        if key == 1.0:
            deadlines.add(1.5, Kind.LINK, "added")
    assert seen == [1.0, "added", 2.0]
    assert deadlines.next() == 3.0
    deadlines.prune(lambda kind, key: key != 3.0)
    assert deadlines.next() is None


def test_backoff_doubles_to_its_limit_with_jitter_and_the_first_death_is_free() -> None:
    """F7."""
    chance = random.Random(3)
    waits = [backoff_s(deaths, 0.5, 30.0, chance) for deaths in range(12)]
    assert waits[:2] == [0.0, 0.0]
    for deaths, wait in enumerate(waits[2:], 2):
        least = min(30.0, 0.5 * 2 ** (deaths - 2))
        assert least <= wait <= 1.2 * least
    assert backoff_s(10**6, 0.5, 30.0, chance) <= 36.0


def test_a_rate_is_over_a_window_of_time_at_any_rate() -> None:
    """X3, known wrong way 6."""
    window = Window(100.0)
    window.add(50_000, 500.0, 100.5)
    assert window.rate(110.0) == pytest.approx(5000.0)
    assert window.mean_latency_s(110.0) == pytest.approx(0.01)
    assert window.rate(159.0) == pytest.approx(50_000 / 59)
    assert window.rate(161.0) == 0.0
    assert window.mean_latency_s(1e6) == 0.0


def test_the_worst_stall_of_the_loop_is_told_for_a_minute() -> None:
    """R4: a lesser one does not hide it, and what is long over does not stay."""
    bench = Bench()
    for seconds in (0.3, 2.0, 0.1):
        bench.handle(Stalled(seconds))
    assert bench.state.loop_lag_s(bench.now) == 2.0
    bench.advance(61.0)
    assert bench.state.loop_lag_s(bench.now) == 0.0
    bench.handle(Stalled(0.1))
    assert bench.state.loop_lag_s(bench.now) == 0.1


def test_the_story_is_a_bounded_ring() -> None:
    """C5."""
    story = Story(3)
    for at in range(5):
        story.tell(at, f"s{at % 2}", str(at))
    assert len(story) == 3
    assert [entry.text for entry in story.of("s0")] == ["2", "4"]


def test_an_ordinary_call_writes_no_story_and_is_no_longer_known_when_it_is_over() -> None:
    """C5."""
    bench, client, (worker,), endpoint = Bench().serving(1)
    before = len(bench.state.story)
    client.call(endpoint, b"x")
    name = f"{client.id:06x}-1"
    assert "runs on Echo/0" in client.ask("explain", subject=name)["story"][-1]
    worker.reply()
    assert len(bench.state.story) == before
    assert "nothing is kept" in client.ask("explain", subject=name)["story"][-1]
    assert "nothing is known" in client.ask("explain", subject="nobody")["story"][0]


def test_what_is_out_of_the_ordinary_is_told() -> None:
    """C5: a second attempt, a refusal, a lost replica."""
    _bench, client, (worker,), endpoint = Bench().serving(1)
    client.call(endpoint, b"x")
    worker.die()
    lines = client.ask("explain", subject=f"{client.id:06x}-1")["story"]
    assert "back to its queue after attempt 1" in lines[0]
    assert "waits in Echo.predict" in lines[-1]
    lines = client.ask("explain", subject="Echo/0")["story"]
    assert "lost in epoch 1" in lines[0]
    assert any("last words" in line for line in lines)


def test_a_session_with_the_look_of_a_request_id_has_its_story() -> None:
    """C5: users choose session ids."""
    _, client, _, _ = Bench().serving(1)
    client.ask("open_session", service="Echo", session="abc-17")
    assert "session of Echo" in client.ask("explain", subject="abc-17")["story"][-1]


@pytest.mark.parametrize(
    "message",
    [
        [CALLS, 1, [1], [1]],
        [CALLS, "1", [1], [1], {}],
        [CALLS, 1, [0], [1], {}],
        [CALLS, 1, [1 << 40], [1], {}],
        [CALLS, 1, [True], [1], {}],
        [CALLS, 1, [1, 2], [1], {}],
        [CALLS, 1, [1], [1], []],
        [CALLS, 1, [1], [1], {"timeout": [1.0, 2.0]}],
        [CALLS, 1, [1], [1], {"timeout": "soon"}],
        [CALLS, 1, [1], [1], {"timeout": float("nan")}],
        [CALLS, 1, [1], [1], {"priority": 101}],
        [CALLS, 1, [1], [1], {"priority": [True]}],
        [CALLS, 1, [1], [1], {"session": 5}],
        [CALLS, 1, [1], [1], {"hints": "x"}],
        [CALLS, 1, [1], [1], {"weight": -1}],
        [CALLS, 1, [1], [1], {"weight": float("nan")}],
        [CALLS, 1, [1], [1], {"weight": [float("inf")]}],
        [CALLS, 1, [1], [1], {"key": 1.5}],
        [CALLS, 1, [1], [1], {"shape": "one"}],
    ],
    ids=str,
)
def test_calls_with_columns_that_do_not_hold_are_nonsense(message: list[Any]) -> None:
    """W8."""
    with pytest.raises(ProtocolError):
        read_calls(message)


def test_unknown_columns_are_ignored() -> None:
    """PROTOCOL.md §2: unknown keys of a map are a newer peer's."""
    assert read_calls([CALLS, 1, [1], [1], {"flavour": 3, "priority": 2}])[3] == {"priority": 2}
