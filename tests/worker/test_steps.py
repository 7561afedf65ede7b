"""Calls that share a task must not notice (A6): each has its own context variables, its own cancelling, its own end."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextvars import ContextVar
from typing import Any

from forge_client.context import current_request, current_session
from forge_worker.steps import Steps

BOUND_S = 5.0
colour: ContextVar[str] = ContextVar("colour", default="none")


class Call:
    def __init__(self, request: int, coroutine: Coroutine[Any, Any, Any] | None, session: str | None = None) -> None:
        self.id = request
        self.session = session
        self.coroutine = coroutine
        self.task: asyncio.Task[None] | None = None


class Ended:
    """Runs coroutines through Steps and gathers how they ended, in the order in which they did."""

    def __init__(self) -> None:
        self.order: list[int] = []
        self.waiting: list[Call] = []  # had to wait after their first step
        self.outcome: dict[int, Any] = {}
        self.calls: dict[int, Call] = {}
        self.changed = asyncio.Event()
        self.steps: Steps[Call] = Steps(lambda call: call.coroutine, self.end, self.end, self.waiting.append)

    def put(self, *coroutines: Coroutine[Any, Any, Any] | None, session: str | None = None) -> None:
        for coroutine in coroutines:
            call = Call(len(self.calls) + 1, coroutine, session)
            self.calls[call.id] = call
            self.steps.put(call)

    def end(self, call: Call, outcome: Any) -> None:
        self.order.append(call.id)
        self.outcome[call.id] = outcome
        self.changed.set()

    async def all(self, count: int) -> dict[int, Any]:
        async with asyncio.timeout(BOUND_S):
            while len(self.order) < count:
                self.changed.clear()
                await self.changed.wait()
        return self.outcome


async def give(value: Any, turns: int = 0) -> Any:
    for _ in range(turns):
        await asyncio.sleep(0)
    return value


async def test_calls_that_never_wait_make_no_task_of_their_own() -> None:
    ended = Ended()
    before = len(asyncio.all_tasks())
    ended.put(*(give(number) for number in range(50)))
    assert await ended.all(50) == {number + 1: number for number in range(50)}
    assert len(asyncio.all_tasks()) == before + 1
    assert all(call.task is None for call in ended.calls.values())


async def test_a_call_that_waits_keeps_nobody() -> None:
    """A6: those behind it begin in the same turn, in order."""
    ended = Ended()
    gate = asyncio.Event()
    ended.put(gate.wait(), give("a"), give("b", turns=3), give("c"))
    await ended.all(3)
    assert ended.order == [2, 4, 3]
    gate.set()
    assert (await ended.all(4))[1] is True


async def test_context_variables_belong_to_one_call() -> None:
    """A6: before and after it has waited."""

    async def paint(name: str) -> tuple[str, str, str]:
        before = colour.get()
        colour.set(name)
        if name == "red":
            await asyncio.sleep(0)
        return before, colour.get(), f"{current_session()} {current_request()}"

    ended = Ended()
    ended.put(paint("red"), paint("green"), session="s")
    ended.put(paint("blue"))
    assert await ended.all(3) == {
        1: ("none", "red", "s 000000-1"),
        2: ("none", "green", "s 000000-2"),
        3: ("none", "blue", "None 000000-3"),
    }


async def test_cancelling_one_cancels_no_other() -> None:
    """F5"""
    ended = Ended()
    gate = asyncio.Event()
    ended.put(gate.wait(), gate.wait(), give("a"))
    await ended.all(1)
    task = ended.calls[1].task
    assert task is not None
    task.cancel()
    await ended.all(2)
    assert isinstance(ended.outcome[1], asyncio.CancelledError)
    gate.set()
    assert (await ended.all(3))[2] is True


async def test_a_call_that_cancels_its_task_harms_no_other() -> None:
    """At once, or later through the task that it kept."""
    kept: list[asyncio.Task[Any]] = []

    def current() -> asyncio.Task[Any]:
        task = asyncio.current_task()
        assert task is not None
        return task

    async def cancel_at_once() -> None:
        current().cancel()

    async def keep() -> None:
        kept.append(current())

    async def cancel_kept() -> str:
        kept[0].cancel()
        await asyncio.sleep(0)
        return "unharmed"

    ended = Ended()
    ended.put(cancel_at_once(), give("a", turns=2), keep(), cancel_kept(), give("b", turns=2))
    assert await ended.all(5) == {1: None, 2: "a", 3: None, 4: "unharmed", 5: "b"}


async def test_a_timeout_of_one_ends_that_one() -> None:
    async def limited(limit_s: float) -> None:
        async with asyncio.timeout(limit_s):
            await asyncio.sleep(BOUND_S)

    ended = Ended()
    ended.put(limited(0.01), give("a"), give("b", turns=2))
    await ended.all(3)
    assert isinstance(ended.outcome[1], TimeoutError)
    assert (ended.outcome[2], ended.outcome[3]) == ("a", "b")


async def test_whatever_a_call_raises_the_next_one_runs() -> None:
    """A5"""

    async def leave(turns: int) -> None:
        await give(None, turns)
        raise SystemExit(3)

    ended = Ended()
    ended.put(leave(0), give("a"), leave(2), None, give("b"))
    await ended.all(4)
    assert isinstance(ended.outcome[1], SystemExit)
    assert isinstance(ended.outcome[3], SystemExit)
    assert (ended.outcome[2], ended.outcome[5]) == ("a", "b")


async def test_what_comes_while_others_run_is_served_too() -> None:
    ended = Ended()

    async def bring() -> str:
        ended.put(give("late"))
        return "early"

    ended.put(bring())
    assert await ended.all(2) == {1: "early", 2: "late"}
    ended.put(give("much later"))
    assert (await ended.all(3))[3] == "much later"
