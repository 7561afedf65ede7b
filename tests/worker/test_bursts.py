"""Calls that come together are run together, and must not notice (A5, A6, F5): each has its own context, arguments and end."""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from contextvars import ContextVar
from typing import Any

import pytest

from forge_client.context import current_request, current_session
from forge_contract.errors import ProtocolError
from forge_contract.messages import DROPPED, FAILED, OK, RAISED, UNTOUCHED
from tests.worker.in_process import InProcess

colour: ContextVar[Any] = ContextVar("colour", default="none")


class Sample:
    """Its gate is closed until the test opens it."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.log: list[str] = []
        self.held: list[weakref.ref[Any]] = []
        self.running = self.most = 0

    async def echo(self, value: Any) -> Any:
        self.log.append(f"echo {value}")
        return value

    async def paint(self, name: str, turns: int) -> tuple[Any, Any, str | None, str | None]:
        before = colour.get()
        colour.set(name)
        for _ in range(turns):
            await asyncio.sleep(0)
        return before, colour.get(), current_session(), current_request()

    async def maybe(self, value: Any) -> Any:
        """Waits at the gate for "wait"; raises, or returns what cannot travel, where it is told to."""
        self.log.append(str(value))
        if value == "wait":
            await self.gate.wait()
        elif value == "raise":
            raise ValueError("told to")
        elif value == "exit":
            raise SystemExit(3)
        elif value == "cancelled":
            raise asyncio.CancelledError
        elif value == "unserialisable":
            return threading.Lock()
        elif value == "huge":
            return bytes(2 << 20)
        elif value == "big int":
            return 1 << 70
        return value

    async def hold(self, values: set[int]) -> None:
        self.held.append(weakref.ref(values))
        if not values:
            del values
            await self.gate.wait()

    async def count(self) -> None:
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(0)
        self.running -= 1

    def plain(self, value: str) -> None:
        self.log.append(f"plain {value}")

    async def wait_for(self) -> None:
        await self.future

    async def kwargs(self, *, name: str) -> str:
        return name


def numbered(*values: Any) -> list[tuple[int, tuple[Any, ...]]]:
    return [(sequence, (value,)) for sequence, value in enumerate(values, 1)]


def idle(worker: InProcess) -> bool:
    return " 0 of 10 running, 0 held" in repr(worker.host) and not worker.link.running


async def test_calls_that_end_at_once_are_replied_to_in_the_turn_in_which_they_came() -> None:
    """W1: in one envelope, in their order."""
    worker = InProcess(Sample(), "echo")
    worker.dispatch(0, *numbered(1, "two", None, [4], 1 << 70))
    worker.dispatch(0, (6, ("other message",)))
    await worker.turn()
    assert list(worker.replied.items()) == [
        (1, (OK, 1)),
        (2, (OK, "two")),
        (3, (OK, None)),
        (4, (OK, [4])),
        (5, (OK, 1 << 70)),
        (6, (OK, "other message")),
    ]
    assert worker.envelopes == 1
    assert idle(worker)


async def test_context_variables_belong_to_one_call() -> None:
    """A6: whether it waits or not, and whether their values can be compared or not."""

    class Touchy:
        def __eq__(self, other: object) -> bool:
            raise TypeError("nobody compares me")

        __hash__ = None  # type: ignore[assignment]

    class Paints(Sample):
        async def touchy(self) -> bool:
            before = colour.get()
            colour.set(Touchy())
            return isinstance(before, str)

    worker = InProcess(Paints(), "paint", "touchy")
    worker.dispatch(
        0, (1, ("red", 0)), (2, ("green", 2)), (3, ("blue", 0)), (4, ("grey", 1)), session=["s", None, "t", "s"]
    )
    worker.dispatch(1, (5, ()), (6, ()), (7, ()))
    await worker.turn()
    assert await worker.replies(7) == {
        1: (OK, ("none", "red", "s", "000001-1")),
        2: (OK, ("none", "green", None, "000001-2")),
        3: (OK, ("none", "blue", "t", "000001-3")),
        4: (OK, ("none", "grey", "s", "000001-4")),
        5: (OK, True),
        6: (OK, True),
        7: (OK, True),
    }
    assert idle(worker)


async def test_a_call_that_does_not_end_well_is_alone_in_that() -> None:
    """A5, B2: among others that came with it; a user's SystemExit ends no worker."""
    worker = InProcess(Sample(), "maybe")
    worker.dispatch(
        0,
        *numbered("a", "raise", "b", "unserialisable", "c", "huge", "exit", "garbage", "cancelled", "big int"),
        (11, ()),
        (12, ("too", "many")),
        (13, ("last",)),
        raw={8: b"\xc1", 13: b"\x93\x01\x02\x03"},
    )
    await worker.turn()
    replies = await worker.replies(13)
    assert {at: value for at, (status, value) in replies.items() if status == OK} == {
        1: "a",
        3: "b",
        5: "c",
        10: 1 << 70,
    }
    assert {at: status for at, (status, _) in replies.items() if status != OK} == {
        2: RAISED,
        4: FAILED,
        6: FAILED,
        7: RAISED,
        8: FAILED,
        9: RAISED,
        11: RAISED,
        12: RAISED,
        13: FAILED,
    }
    assert str(replies[2][1]) == "told to"
    assert replies[6][1][0] == "PayloadTooLarge"
    assert replies[8][1][0] == replies[13][1][0] == ProtocolError.__name__
    assert isinstance(replies[12][1], TypeError)
    assert idle(worker)


async def test_a_call_that_cancels_its_task_harms_no_other() -> None:
    """At once, or later through the task that it kept."""
    kept: list[asyncio.Task[Any]] = []

    class Cancels(Sample):
        async def cancel(self, how: str) -> str:
            task = asyncio.current_task()
            assert task is not None
            if how == "keep":
                kept.append(task)
            elif how == "its own":
                task.cancel()
            elif how == "kept":
                kept[0].cancel()
                await asyncio.sleep(0)
            else:
                await asyncio.sleep(0)
            return how

    worker = InProcess(Cancels(), "cancel")
    worker.dispatch(0, *numbered("keep", "kept", "its own", "none", "keep", "none"))
    await worker.turn()
    assert await worker.replies(6) == {
        1: (OK, "keep"),
        2: (OK, "kept"),
        3: (OK, "its own"),
        4: (OK, "none"),
        5: (OK, "keep"),
        6: (OK, "none"),
    }


@pytest.mark.parametrize("at", [0, 1, 2])
async def test_a_call_that_waits_keeps_none_of_the_others(at: int) -> None:
    """A6: wherever it stands among them; and its room comes back when it ends."""
    sample = Sample()
    worker = InProcess(sample, "maybe")
    values = ["a", "b"]
    values.insert(at, "wait")
    worker.dispatch(0, *numbered(*values))
    await worker.turn()
    assert worker.replied.keys() == {1, 2, 3} - {at + 1}
    assert "1 of 10 running, 1 held" in repr(worker.host)
    sample.gate.set()
    assert (await worker.replies(3))[at + 1] == (OK, "wait")
    assert idle(worker)


async def test_a_call_that_waits_keeps_no_other_s_arguments() -> None:
    """Nor its own, once it has let them go: they may be tensors."""
    sample = Sample()
    worker = InProcess(sample, "hold")
    worker.dispatch(0, *numbered({1}, set(), {2}))
    await worker.turn()
    assert worker.replied.keys() == {1, 3}
    assert [one() for one in sample.held] == [None, None, None]
    sample.gate.set()
    await worker.replies(3)


async def test_keywords_reach_their_call() -> None:
    worker = InProcess(Sample(), "kwargs")
    worker.dispatch(0, (1, ()), (2, ()), kwargs={1: {"name": "a"}, 2: {"name": "b"}})
    await worker.turn()
    assert worker.replied == {1: (OK, "a"), 2: (OK, "b")}


async def test_a_call_cancelled_in_the_turn_in_which_it_came_does_not_begin() -> None:
    """F5: a worker whose loop stood still finds both at once."""
    sample = Sample()
    worker = InProcess(sample, "echo")
    worker.dispatch(0, *numbered("a", "b", "c", "d", "e"), session=["s", "s", None, None, None])
    worker.drop(2, 5, 99)
    await worker.turn()
    assert worker.replied == {1: (OK, "a"), 2: (DROPPED, None), 3: (OK, "c"), 4: (OK, "d"), 5: (DROPPED, None)}
    assert sample.log == ["echo a", "echo c", "echo d"]
    assert idle(worker)


async def test_a_call_cancelled_before_its_task_has_taken_a_step_is_cancelled() -> None:
    """F5: it stands behind its first step, which was not the task's own; so does what it waits for."""
    sample = Sample()
    worker = InProcess(sample, "wait_for", "maybe")
    worker.dispatch(0, (1, ()))
    worker.dispatch(1, (2, ("wait",)))
    await worker.turn(then=lambda: worker.drop(1, 2))
    assert await worker.replies(2) == {1: (DROPPED, None), 2: (DROPPED, None)}
    assert sample.future.cancelled()
    assert idle(worker)


async def test_never_more_run_than_there_is_room_for() -> None:
    """A6"""
    sample = Sample()
    worker = InProcess(sample, "count", concurrency=3)
    for first in (1, 3, 5, 10):
        worker.dispatch(0, *[(sequence, ()) for sequence in range(first, first + (2 if first < 5 else 5))])
    await worker.turn()
    await worker.replies(14)
    assert sample.most == 3
    assert " 0 of 3 running, 0 held" in repr(worker.host)


async def test_calls_of_one_client_begin_in_order_whatever_kind_they_are() -> None:
    """A6: within one turn, too."""
    sample = Sample()
    worker = InProcess(sample, "echo", "plain")
    sequence = 0
    for _ in range(10):
        for method in (0, 1, 0, 0):
            sequence += 1
            worker.dispatch(method, (sequence, (str(sequence),)), client=True)
    begun: list[str] = []
    await worker.turn(halfway=lambda: begun.extend(line for line in sample.log if "echo" in line))
    assert begun == ["echo 1"], "2 is a thread's, and may run"
    await worker.replies(40)
    assert [line.split()[1] for line in sample.log] == [str(number) for number in range(1, 41)]


async def test_what_calls_cost_is_told_when_all_that_came_in_a_turn_have_ended_in_it() -> None:
    """PROTOCOL.md, REPLIES: nanoseconds of the loop for each."""

    class Spins(Sample):
        async def spin(self, value: str) -> str:
            until = time.monotonic() + 0.002
            while time.monotonic() < until:
                pass
            return value

    sample = Spins()
    worker = InProcess(sample, "spin", "maybe")
    worker.dispatch(0, *numbered("a", "b", "c"))
    await worker.turn()
    (cost,) = worker.costs
    assert 2_000_000 <= cost < 1_000_000_000
    worker.dispatch(1, (6, ("raise",)))
    await worker.turn()
    assert worker.costs.pop() > 0
    worker.dispatch(0, (4, ("d",)))
    worker.dispatch(1, (5, ("wait",)))
    await worker.turn()
    sample.gate.set()
    await worker.replies(5)
    assert set(worker.costs[1:]) == {0}, "one of them had to wait: nobody knows what that cost the loop"


async def test_a_burst_that_holds_the_loop_has_an_age() -> None:
    """F1: heartbeats say how long the oldest call has been running, from another thread."""

    class Asks(Sample):
        async def age(self) -> float:
            return float(worker.host.oldest_s(time.monotonic() + 100.0))

    worker = InProcess(Asks(), "age")
    worker.dispatch(0, (1, ()), (2, ()))
    await worker.turn()
    assert all(100.0 <= value < 110.0 for _, value in worker.replied.values())
    assert worker.host.oldest_s(time.monotonic() + 100.0) == 0.0


async def test_what_comes_after_a_stop_is_given_back() -> None:
    """F9"""
    worker = InProcess(Sample(), "echo")
    await worker.host.finish(1.0, checkpoints=False)
    worker.dispatch(0, *numbered("a", "b"))
    await worker.turn()
    assert worker.replied == {1: (UNTOUCHED, None), 2: (UNTOUCHED, None)}
