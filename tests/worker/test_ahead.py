"""More calls than may run at once: the broker sends some ahead (R1), and the worker keeps to its room."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from forge_contract.messages import DROPPED, OK, RETURNED, UNTOUCHED
from tests.worker.in_process import InProcess

ROOM = 3


class Sample:
    def __init__(self) -> None:
        self.running = self.most = 0
        self.order: list[int] = []
        self.open = asyncio.Event()
        self.gate = threading.Event()

    async def at_once(self, at: int) -> int:
        self.order.append(at)
        return at

    async def waits(self, at: int) -> int:
        self.order.append(at)
        self.running += 1
        self.most = max(self.most, self.running)
        await self.open.wait()
        self.running -= 1
        return at

    def plain(self, at: int) -> int:
        self.order.append(at)
        self.gate.wait(10.0)
        return at


def numbered(count: int, first: int = 1) -> list[tuple[int, tuple[int]]]:
    return [(at, (at,)) for at in range(first, first + count)]


def serving(*endpoints: Any) -> tuple[InProcess, Sample]:
    sample = Sample()
    return InProcess(sample, *(endpoints or ("at_once", "waits", "plain")), concurrency=ROOM), sample


async def test_calls_that_end_at_once_all_do_in_the_turn_in_which_they_came() -> None:
    worker, sample = serving()
    worker.dispatch(0, *numbered(20))
    await worker.turn()
    assert worker.replied == {at: (OK, at) for at in range(1, 21)}
    assert sample.order == list(range(1, 21))
    assert worker.envelopes == 1


async def test_no_more_of_them_run_at_once_than_may() -> None:
    """A6, R1"""
    worker, sample = serving()
    worker.dispatch(1, *numbered(10))
    worker.dispatch(0, *numbered(10, 11))
    await worker.turn()
    assert (sample.order, sample.most, worker.replied) == ([1, 2, 3], ROOM, {})
    sample.open.set()
    assert await worker.replies(20) == {at: (OK, at) for at in range(1, 21)}
    assert sample.order == list(range(1, 21))
    assert sample.most == ROOM


async def test_what_waits_is_given_back_when_it_is_called_back_and_the_worker_goes_on() -> None:
    worker, sample = serving()
    worker.dispatch(1, *numbered(10))
    await worker.turn()
    worker.recall()
    await worker.turn()
    assert worker.replied == dict.fromkeys(range(4, 11), (RETURNED, None))
    sample.open.set()
    worker.dispatch(0, *numbered(1, 11))
    await worker.turn()
    assert (await worker.replies(11))[11] == (OK, 11)
    assert sample.order == [1, 2, 3, 11]


async def test_what_may_run_is_not_given_back() -> None:
    worker, sample = serving()
    worker.dispatch(1, *numbered(ROOM))
    worker.recall()
    await worker.turn()
    worker.recall()
    await worker.turn()
    assert worker.replied == {}
    sample.open.set()
    assert await worker.replies(ROOM) == {at: (OK, at) for at in range(1, ROOM + 1)}


async def test_of_plain_calls_that_wait_for_a_thread_as_many_stay_as_there_is_room_for() -> None:
    worker, sample = serving()
    worker.dispatch(2, *numbered(6))
    await worker.turn()
    await worker.until(lambda: worker.host.oldest_s(float("inf")) > 0)
    worker.recall()
    await worker.turn()
    assert worker.replied == dict.fromkeys(range(4, 7), (RETURNED, None))
    sample.gate.set()
    replied = await worker.replies(6)
    assert {at: replied[at] for at in (1, 2, 3)} == {at: (OK, at) for at in (1, 2, 3)}
    assert sorted(sample.order) == [1, 2, 3]


async def test_calls_of_a_session_stay() -> None:
    """A6: they have an order, and nobody else may run them."""
    worker, sample = serving()
    worker.dispatch(1, *numbered(6), session="s")
    await worker.turn()
    worker.recall()
    await worker.turn()
    assert worker.replied == {}
    sample.open.set()
    assert await worker.replies(6) == {at: (OK, at) for at in range(1, 7)}
    assert sample.order == list(range(1, 7))


async def test_what_waits_can_be_cancelled_one_by_one() -> None:
    """F5"""
    worker, sample = serving()
    worker.dispatch(1, *numbered(7))
    await worker.turn()
    worker.drop(5, 7)
    await worker.turn()
    assert worker.replied == {5: (DROPPED, None), 7: (DROPPED, None)}
    sample.open.set()
    assert {at: one for at, one in (await worker.replies(7)).items() if at not in (5, 7)} == {
        at: (OK, at) for at in (1, 2, 3, 4, 6)
    }
    assert sample.order == [1, 2, 3, 4, 6]


async def test_what_waits_is_given_back_by_one_that_leaves() -> None:
    """F9"""
    worker, sample = serving()
    worker.dispatch(1, *numbered(6))
    await worker.turn()
    sample.open.set()
    await worker.host.finish(5.0, checkpoints=False)
    assert await worker.replies(6) == {at: (OK, at) if at <= ROOM else (UNTOUCHED, None) for at in range(1, 7)}
    assert sample.order == [1, 2, 3]
