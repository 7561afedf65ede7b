"""Calls that are given up (F5): how it is noticed without anything done for the many that are not."""

from __future__ import annotations

import asyncio
from typing import Any

from forge_client.call import SURPLUS, Call, GivenUp, Waiter
from forge_client.replies import Reader

READER = Reader("Gen.predict")


class Book:
    """Unanswered calls as a link has them."""

    def __init__(self) -> None:
        self.unanswered: dict[int, Waiter | None] = {}
        self.dropped: list[int] = []
        self.given_up = GivenUp(self.unanswered, self.drop)
        self.calls = 0

    def drop(self, number: int) -> None:
        self.unanswered[number] = None
        self.dropped.append(number)

    def call(self) -> Call:
        call: Call = asyncio.get_running_loop().create_future()
        call.add_done_callback(self.given_up.done)
        self.calls += 1
        self.unanswered[self.calls] = (call, READER)
        return call


async def test_a_cancelled_call_is_told_by_its_number_and_an_answered_one_is_not() -> None:
    """F5"""
    book = Book()
    calls = [book.call() for _ in range(5)]
    calls[1].cancel()
    calls[3].set_result(None)
    await asyncio.sleep(0)
    assert book.dropped == [2]
    later = book.call()
    calls[4].cancel()
    later.cancel()
    del book.unanswered[1]  # answered in the very turn in which it is cancelled
    calls[0].cancel()
    await asyncio.sleep(0)
    assert book.dropped == [2, 5, 6]


async def test_calls_that_live_where_answered_ones_lived_are_not_mistaken_for_them() -> None:
    """Python gives the place of a future that is gone to the next one."""
    book = Book()
    for _ in range(3 * SURPLUS):
        call = book.call()
        book.call().cancel()
        await asyncio.sleep(0)
        assert book.dropped == [book.calls]
        book.dropped.clear()
        book.unanswered.clear()
        call.set_result(None)
        del call


async def test_a_thousand_cancellations_cost_one_look_at_each_call() -> None:
    book = Book()
    calls = [book.call() for _ in range(1000)]
    looked: list[int] = []

    class Counted(dict[int, Any]):
        def __getitem__(self, key: int) -> Any:
            looked.append(key)
            return super().__getitem__(key)

    counted: dict[int, Waiter | None] = Counted(book.unanswered)
    given_up = GivenUp(counted, book.dropped.append)
    for call in calls:
        call.cancel()
        given_up.done(call)
    assert book.dropped == list(range(1, 1001))
    assert len(looked) == 1000
