"""Where requests wait: one queue per endpoint (R1), one per actor, and one per replica for those that only it may run.

First in, first out within a priority, higher priorities first. Removal from the middle (a cancelled call) and return to the front (a lost
replica's calls) are both constant time, which is why each priority is an OrderedDict and not a deque. Calls that came together and may
leave together wait as one (`requests.Slice`); who goes through a queue sees them as they would be by themselves.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from math import inf
from typing import Any

from forge_broker.core.requests import Request, Slice


class Queue:
    """`replica`: set when only that replica may take from here. `waiting`: whether the pump has it in its rotation. `deal`: the
    router's answer for many calls at once, where it has one for all calls of this queue (`RoundRobinRouter.deal`)."""

    __slots__ = ("_levels", "_order", "deal", "length", "name", "replica", "timer_at", "waiting")

    def __init__(self, name: str, replica: Any = None) -> None:
        self.name = name
        self.replica = replica
        self.waiting = False
        self.deal: Callable[..., Iterator[tuple[Any, int]]] | None = None
        self.length = 0
        self.timer_at = inf  # when the deadline heap will look whether a batch is to leave
        self._levels: dict[int, OrderedDict[int, Request | Slice]] = {0: OrderedDict()}
        self._order = [0]  # priorities, highest first

    def __len__(self) -> int:
        return self.length

    def __repr__(self) -> str:
        return f"<Queue {self.name} {self.length} waiting>"

    def __iter__(self) -> Iterator[Request]:
        """Each call by itself, in order; those of a Slice only to be looked at, or taken out."""
        for one in self.held():
            if type(one) is Slice:
                yield from one.shown()
            else:
                yield one  # type: ignore[misc]  # no Slice

    def held(self) -> Iterator[Request | Slice]:
        """As they are held, in order."""
        for priority in self._order:
            yield from self._levels[priority].values()

    def _level(self, priority: int) -> OrderedDict[int, Request | Slice]:
        level = self._levels.get(priority)
        if level is None:
            level = self._levels[priority] = OrderedDict()
            self._order = sorted(self._levels, reverse=True)
        return level

    def counted(self) -> int:
        """What `length` should be."""
        return sum(len(one.left) if type(one) is Slice else 1 for one in self.held())

    def push(self, request: Request) -> None:
        priority = request.priority
        level = self._levels[priority] if priority in self._levels else self._level(priority)
        level[request.id] = request
        request.holder = self
        self.length += 1

    def push_slice(self, calls: Slice) -> None:
        """Calls of the ordinary priority."""
        self._levels[0][calls.place] = calls
        calls.holder = self
        self.length += len(calls.left)

    def push_front(self, requests: Sequence[Request]) -> None:
        """Return these, which are in their old order, to the front (F2): before all that were never dispatched, and among those that were
        returned before them by age, for a worker may give back in several envelopes."""
        for priority in {request.priority for request in requests}:
            level = self._level(priority)
            returned = [request for request in requests if request.priority == priority]
            earlier: list[Request] = []
            while level and (first := next(iter(level.values()))).attempt and first.queued_at <= returned[-1].queued_at:
                earlier.append(first)  # type: ignore[arg-type]  # it has been tried, so it is no Slice
                level.popitem(last=False)
            if earlier:
                returned = sorted(earlier + returned, key=lambda request: (request.queued_at, request.id))
            for request in reversed(returned):
                level[request.id] = request
                level.move_to_end(request.id, last=False)
                request.holder = self
        self.length += len(requests)

    def first(self) -> Request | None:
        """Who is next, left where it is."""
        return next(iter(self), None)

    def take(self, count: int) -> list[Any]:
        """The first `count`, or all there are, as they are held: Requests and Slices."""
        taken: list[Request | Slice] = []
        wanted = count
        for priority in self._order:
            level = self._levels[priority]
            while level and wanted:
                key, one = next(iter(level.items()))
                if type(one) is Slice:
                    calls = one.take(wanted)
                    wanted -= len(calls.left)
                    taken.append(calls)
                    if not one.left:
                        del level[key]
                else:
                    wanted -= 1
                    taken.append(one)
                    del level[key]
        self.length -= count - wanted
        return taken

    def remove(self, request: Request) -> None:
        level = self._levels[request.priority]
        if level.pop(request.id, None) is None:  # it is shown for a call of a Slice
            calls: Slice = request.client.calls[request.id]
            del calls.left[request.id]
            if not calls.left:
                del level[calls.place]
        self.length -= 1

    def drain(self) -> list[Request]:
        """Take all, in order."""
        found = list(self)
        for level in self._levels.values():
            level.clear()
        self.length = 0
        return found
