"""Where requests wait: one queue per endpoint (R1), one per actor, and one per replica for those that only it may run.

First in, first out within a priority, higher priorities first. Removal from the middle (a cancelled call) and return to the front (a lost
replica's calls) are both constant time, which is why each priority is an OrderedDict and not a deque.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from math import inf
from typing import Any

from forge_broker.core.requests import Request
from forge_contract.routing import Pool


class Queue:
    """`replica`: set when only that replica may take from here. `waiting`: whether the pump has it in its rotation. `deal`: the
    router's answer for many calls at once, where it has one for all calls of this queue (`RoundRobinRouter.deal`)."""

    __slots__ = ("_levels", "_order", "deal", "length", "name", "replica", "timer_at", "waiting")

    def __init__(self, name: str, replica: Any = None) -> None:
        self.name = name
        self.replica = replica
        self.waiting = False
        self.deal: Callable[[Pool, int], Iterator[tuple[Any, int]]] | None = None
        self.length = 0
        self.timer_at = inf  # when the deadline heap will look whether a batch is to leave
        self._levels: dict[int, OrderedDict[int, Request]] = {0: OrderedDict()}
        self._order = [0]  # priorities, highest first

    def __len__(self) -> int:
        return self.length

    def __repr__(self) -> str:
        return f"<Queue {self.name} {self.length} waiting>"

    def __iter__(self) -> Iterator[Request]:
        for priority in self._order:
            yield from self._levels[priority].values()

    def _level(self, priority: int) -> OrderedDict[int, Request]:
        level = self._levels.get(priority)
        if level is None:
            level = self._levels[priority] = OrderedDict()
            self._order = sorted(self._levels, reverse=True)
        return level

    def counted(self) -> int:
        """What `length` should be."""
        return sum(map(len, self._levels.values()))

    def push(self, request: Request) -> None:
        priority = request.priority
        level = self._levels[priority] if priority in self._levels else self._level(priority)
        level[request.id] = request
        request.holder = self
        self.length += 1

    def push_front(self, requests: Sequence[Request]) -> None:
        """Return these, which are in their old order, to the front (F2): before all that were never dispatched, and among those that were
        returned before them by age, for a worker may give back in several envelopes."""
        for priority in {request.priority for request in requests}:
            level = self._level(priority)
            returned = [request for request in requests if request.priority == priority]
            earlier: list[Request] = []
            while level and (first := next(iter(level.values()))).attempt and first.queued_at <= returned[-1].queued_at:
                earlier.append(level.popitem(last=False)[1])
            if earlier:
                returned = sorted(earlier + returned, key=lambda request: (request.queued_at, request.id))
            for request in reversed(returned):
                level[request.id] = request
                level.move_to_end(request.id, last=False)
                request.holder = self
        self.length += len(requests)

    def first(self) -> Request | None:
        """Who is next, left where it is."""
        for priority in self._order:
            for request in self._levels[priority].values():
                return request
        return None

    def pop(self) -> Request:
        for priority in self._order:
            level = self._levels[priority]
            if level:
                self.length -= 1
                return level.popitem(last=False)[1]
        raise LookupError(f"{self!r} is empty")

    def take(self, count: int) -> list[Request]:
        """The first `count`, or all there are."""
        taken: list[Request] = []
        for priority in self._order:
            level = self._levels[priority]
            while level and len(taken) < count:
                taken.append(level.popitem(last=False)[1])
        self.length -= len(taken)
        return taken

    def remove(self, request: Request) -> None:
        del self._levels[request.priority][request.id]
        self.length -= 1

    def drain(self) -> list[Request]:
        """Take all, in order."""
        found = list(self)
        for level in self._levels.values():
            level.clear()
        self.length = 0
        return found
