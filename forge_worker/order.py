"""Calls of one key (a session, or a client to an actor) begin in the order in which they came (A6). On the loop's thread.

A call waits until the one before it under each of its keys has begun: an async endpoint has when its first step is over, a plain one when
its thread is about to call it; one that may be an `async def` behind a decorator when it has ended, or has shown what it is.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from forge_worker.calls import Call, Key


class Order:
    """`place(call)`: nothing that came before it keeps this call from beginning."""

    def __init__(self, loop: asyncio.AbstractEventLoop, place: Callable[[Call], None]) -> None:
        self._loop = loop
        self._place = place
        self._unbegun: dict[Key, Call] = {}  # under each key the last one admitted, until it has begun
        self._behind: dict[Key, deque[Call]] = {}
        self._looking = False  # a look after threads that are about to begin is scheduled

    def __repr__(self) -> str:
        return f"<Order {len(self._unbegun)} to begin, others behind {len(self._behind)} of them>"

    @property
    def idle(self) -> bool:
        """Nobody would wait for another."""
        return not (self._unbegun or self._behind)

    def clear(self) -> None:
        self._behind.clear()
        self._unbegun.clear()

    def admit(self, call: Call) -> None:
        for key in call.keys:
            before = self._unbegun.get(key)
            if before is not None and _has_begun(before):  # a thread began it, and could not tell us
                self.begun(before)
                before = self._unbegun.get(key)
            if before is not None:
                # Tasks begin in the order in which they are made; of threads one never knows.
                in_order = (
                    before.started and not before.threaded and before.endpoint.is_async and call.endpoint.is_async
                )
                if not in_order or key in self._behind:
                    self._behind.setdefault(key, deque()).append(call)
                    call.blocked += 1
                    if before.started:
                        self._look_soon()
                    continue
            self._unbegun[key] = call
        if not call.blocked:
            self._place(call)

    def begun(self, call: Call) -> None:
        """The first line of `call` has run, or never will: the next of each of its keys is free to go."""
        call.begun = True
        for key in call.keys:
            if self._unbegun.get(key) is not call:
                continue
            del self._unbegun[key]
            behind = self._behind.pop(key, None)
            while behind:
                follower = behind.popleft()
                if not follower.dropped:
                    if behind:
                        self._behind[key] = behind
                    self._unbegun[key] = follower
                    follower.blocked -= 1
                    if not follower.blocked:
                        self._place(follower)
                    break

    def threaded(self, call: Call) -> None:
        """A thread has it, and will not say when it calls it."""
        call.threaded = True
        if not self._behind.keys().isdisjoint(call.keys):
            self._look_soon()

    def _look_soon(self) -> None:
        if not self._looking:
            self._looking = True
            self._loop.call_soon(self._look)

    def _look(self) -> None:
        """Have the threads begun that others stand behind? It takes microseconds, so we look again in the next turn: a
        word from the thread would let go of the GIL between saying and doing, and the follower could be first."""
        self._looking = False
        for key in list(self._behind):
            before = self._unbegun.get(key)
            if before is None:
                continue  # begun meanwhile, by another of its keys
            if _has_begun(before):
                self.begun(before)
            elif before.threaded and not before.endpoint.hides:
                self._look_soon()


def _has_begun(call: Call) -> bool:
    """A thread that was to run an endpoint found `async` meanwhile has a coroutine of it, which has yet to begin."""
    return call.begun and not (call.threaded and call.endpoint.is_async)
