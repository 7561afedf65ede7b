"""A task for calls whose first steps are taken in its name, without it: `steps` makes it, `bursts` uses it too."""

from __future__ import annotations

import asyncio
import contextvars
from asyncio.tasks import _enter_task, _leave_task  # how code that steps coroutines itself says so; documented
from collections.abc import Coroutine
from typing import Any, Final

ENDED: Final = object()
_NOTHING: Final = object()


class Vessel(Coroutine[Any, Any, None]):
    """A task, and what it runs: nothing of its own until a call whose first step `Steps` has taken in its name has to
    wait, and from then on that call. A task's first step comes by the loop, so until then it may stand before it (most
    do), or at the gate behind it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, context: contextvars.Context) -> None:
        self.context = context
        self.call: Any = None  # the one that steps, where it is known; the one that waits
        self._loop = loop
        self._coroutine: Coroutine[Any, Any, None] | None = None
        self._waits_for: Any = _NOTHING  # what the call waits for and the task has not been told of
        self._gate: asyncio.Future[None] | None = None
        self._over = False
        self.task: asyncio.Task[None] = loop.create_task(self, context=context)

    def step(self, coroutine: Coroutine[Any, Any, None]) -> Any:
        """What the coroutine waits for after its first step, or ENDED."""
        _enter_task(self._loop, self.task)
        try:
            waits_for = self.context.run(coroutine.send, None)
        except StopIteration:
            return ENDED
        finally:
            _leave_task(self._loop, self.task)
        self._coroutine = coroutine
        return waits_for

    def keep(self, waits_for: Any) -> None:
        """The task goes on with what `step` began."""
        self._waits_for = waits_for
        self._open()

    def end(self) -> None:
        """Nobody needs it any more."""
        self._over = True
        self._open()

    def _open(self) -> None:
        if self._gate is not None and not self._gate.done():
            self._gate.set_result(None)

    # What the task asks of its coroutine.

    def send(self, value: Any) -> Any:
        if self._waits_for is not _NOTHING:
            waits_for, self._waits_for = self._waits_for, _NOTHING
            return waits_for
        if self._coroutine is not None:
            return self._coroutine.send(value)
        if self._over:
            raise StopIteration
        self._gate = self._loop.create_future()
        return self._gate.__await__().send(None)

    def throw(self, error: Any, *rest: Any) -> Any:
        if self._coroutine is None:
            raise StopIteration  # cancelled by a call that has ended
        waits_for, self._waits_for = self._waits_for, _NOTHING
        # The task was cancelled between the call's first step and its own. It would have cancelled what the call
        # waits for, had it known.
        if waits_for is not _NOTHING and asyncio.isfuture(waits_for) and waits_for.cancel():
            return waits_for
        return self._coroutine.throw(error)

    def close(self) -> None:
        if self._coroutine is not None:
            self._coroutine.close()

    def __await__(self) -> Any:
        raise TypeError("a vessel is its task's alone")


def unchanged(before: contextvars.Context) -> bool:
    """Whether the context that runs is as it was when it was copied. Mostly an identity, which is quick."""
    try:
        return contextvars.copy_context() == before
    except Exception:
        return False  # of values that cannot be compared, such as arrays, one was replaced by another
