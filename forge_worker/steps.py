"""Async endpoints without a task for each call: most calls never wait, and making a task costs more than all the rest.

`Steps` runs the first step of each call in a task that they share. A call that ends in it is done; one that waits for
something keeps that task for itself from then on, and a new one takes over the rest. So inside an endpoint there always
is a current task, `asyncio.timeout` and cancelling work, and each call has context variables of its own. What Python
3.12 calls eager tasks does the same; this works on 3.11 too, and saves making the task altogether.

Measured on two slow cores, sockets aside: 12.2 µs for a no-op call with a task for each, 7.2 µs so.
"""

from __future__ import annotations

import asyncio
import contextvars
import sys
import types
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

from forge_client.context import request_var, session_var


class Stepped(Protocol):
    """What a call has for us."""

    id: int
    session: str | None
    task: asyncio.Task[None] | None  # set when it waits: cancelling it cancels this call and no other


Call = TypeVar("Call", bound=Stepped)


class Steps(Generic[Call]):
    """Runs calls in the order of `put`. `begin(call)` gives its coroutine, or None when there is nothing to run;
    then comes `returned(call, value)` or `raised(call, error)`, whatever it raises."""

    def __init__(
        self,
        begin: Callable[[Call], Coroutine[Any, Any, Any] | None],
        returned: Callable[[Call, Any], None],
        raised: Callable[[Call, BaseException], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        # What calls start from, so that none sees the context variables of another that made room for it.
        self._context = contextvars.copy_context()
        self._begin = begin
        self._returned = returned
        self._raised = raised
        self._ready: deque[Call] = deque()
        self._served = False  # there is a task for the ready ones

    def put(self, call: Call) -> None:
        self._ready.append(call)
        if not self._served:
            self._serve()

    def _serve(self) -> None:
        self._served = True
        self._loop.create_task(self._run(), context=self._context.copy())

    async def _run(self) -> None:
        ready = self._ready
        task: asyncio.Task[None] | None = asyncio.current_task()
        assert task is not None
        alone = sys.getrefcount(task)
        while ready:
            call = ready.popleft()
            coroutine = self._begin(call)
            if coroutine is None:
                continue
            request_var.set(call.id)
            session_var.set(call.session)
            context = contextvars.copy_context()
            try:
                waits_for = context.run(coroutine.send, None)
            except StopIteration as stop:
                self._returned(call, stop.value)
            except BaseException as error:  # also SystemExit, which would end the loop
                self._raised(call, error)
            else:
                call.task = task
                self._rest_to_another()
                try:
                    value = await _rest(coroutine, context, waits_for)
                except BaseException as error:
                    self._raised(call, error)
                else:
                    self._returned(call, value)
                return
            if sys.getrefcount(task) > alone or task.cancelling():
                # The call has kept its task, or cancelled it. It would be cancelling others' with it: they get another.
                self._rest_to_another()
                return
        self._served = False

    def _rest_to_another(self) -> None:
        self._served = False
        if self._ready:
            self._serve()


@types.coroutine
def _rest(
    coroutine: Coroutine[Any, Any, Any], context: contextvars.Context, waits_for: Any
) -> Generator[Any, Any, Any]:
    """Go on with a coroutine that has taken its first step, each further one in its own context."""
    while True:
        try:
            step = partial(coroutine.send, (yield waits_for))
        except BaseException as error:  # what the task throws in: CancelledError
            step = partial(coroutine.throw, error)
        try:
            waits_for = context.run(step)
        except StopIteration as stop:
            return stop.value
