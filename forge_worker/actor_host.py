"""Runs the calls of one actor: when each may start, how it ends (design A5, A6, A7, F5). On the loop's thread.

`runtime` makes it of an assignment and an instance, hands it the link's instructions, and is told by `on_reply` that
there is something to flush. When a call may start is decided in `_admit` and what follows from it:

1. A call with an order key (its session, or its client where the broker says so) waits until the one before it under
   that key has begun: `_behind`. A mesh's calls have no key: there, at most one runs, and they start in order anyway.
2. Never more than `concurrency` run: `_waiting`, in order of dispatch.
3. A plain `def` needs a thread of its endpoint: `parked`, in that endpoint. Others pass it: a slow endpoint starves nobody.

An async endpoint has begun when its task takes its first step, a plain one when its thread is about to call it.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any, cast

from forge_client.context import request_var, session_var
from forge_contract.errors import ForgeError
from forge_contract.framing import Payload
from forge_contract.messages import DROPPED, UNTOUCHED, client_of
from forge_contract.payload import decode_call
from forge_worker.assignment import Assignment
from forge_worker.link import Run, WorkerLink
from forge_worker.outcomes import Outcome, Outcomes, in_lists
from forge_worker.steps import Steps
from forge_worker.threads import Threads

log = logging.getLogger("forge_worker")

Key = str | int | None


class Endpoint:
    """A method and what it takes to run it."""

    __slots__ = ("is_async", "method", "name", "parked", "takes_lists", "threads")

    def __init__(self, name: str, method: Any, takes_lists: bool, threads: Threads) -> None:
        self.name = name
        self.method = method
        self.takes_lists = takes_lists
        self.threads = threads
        self.is_async = inspect.iscoroutinefunction(method)
        self.parked: deque[Call] = deque()


class Call:
    """One attempt of one request, from dispatch to reply."""

    __slots__ = (
        "attempt",
        "begun",
        "coroutine",
        "dropped",
        "endpoint",
        "id",
        "key",
        "payload",
        "session",
        "started",
        "task",
        "trusted",
    )

    def __init__(
        self,
        request: int,
        attempt: int,
        endpoint: Endpoint,
        payload: Payload,
        trusted: bool,
        session: str | None,
        key: Key,
    ) -> None:
        self.id = request
        self.attempt = attempt
        self.endpoint = endpoint
        self.payload = payload
        self.trusted = trusted
        self.session = session
        self.key = key
        self.started = 0.0  # monotonic seconds, 0.0: not started
        self.begun = False  # its first line runs, or has run
        self.dropped = False
        self.task: asyncio.Task[None] | None = None  # its own, once it has had to wait
        self.coroutine: Coroutine[Any, Any, Any] | None = None  # what a plain `def` unexpectedly returned


class ActorHost:
    """The calls of one instance. `trusted`: whether replies may hold pickles, by the trust of our own address."""

    def __init__(
        self,
        assignment: Assignment,
        methods: list[Any],
        link: WorkerLink,
        *,
        trusted: bool,
        on_reply: Callable[[], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._context = contextvars.copy_context()  # what calls in threads start from
        self._link = link
        self._on_reply = on_reply
        self._class_name = assignment.class_name
        self._serial = assignment.serial
        self._room = 1 if assignment.serial else assignment.concurrency
        self._outcomes = Outcomes(trusted, assignment.max_payload_bytes)
        self._endpoints = [
            Endpoint(
                f"{assignment.class_name}.{spec.name}",
                method,
                spec.takes_lists,
                Threads(self._loop, spec.threads, spec.name),
            )
            for spec, method in zip(assignment.endpoints, methods, strict=True)
        ]
        self._steps: Steps[Call] = Steps(self._begin, self._returned, self._raised)
        self._calls: dict[int, Call] = {}
        self._active = 0  # of them, started
        self._waiting: deque[Call] = deque()
        self._unbegun: dict[Key, Call] = {}  # under each key the last one admitted, until it has begun
        self._behind: dict[Key, deque[Call]] = {}
        self._looking = False  # a look after threads that are about to begin is scheduled
        self._stopping = False
        self._abandoned = False
        self._empty = asyncio.Event()

    def __repr__(self) -> str:
        return f"<ActorHost {self._class_name} {self._active} of {self._room} running, {len(self._calls)} held>"

    def run(self, run: Run) -> None:
        """Take calls in; each gets its reply through the link, whatever happens to it."""
        if self._stopping:
            for request, attempt in zip(run.ids, run.attempts, strict=True):
                self._link.reply(request, attempt, UNTOUCHED, b"")
            self._on_reply()
            return
        endpoint, trusted = self._endpoints[run.method], run.trusted
        calls, put, started = self._calls, self._steps.put, time.monotonic()
        for request, attempt, payload, session, by_client in zip(
            run.ids, run.attempts, run.payloads, run.sessions, run.by_client, strict=True
        ):
            key: Key = None
            if not self._serial:
                key = client_of(request) if by_client else session
            calls[request] = call = Call(request, attempt, endpoint, payload, trusted, session, key)
            if key is not None:
                self._admit(call, key)
            elif endpoint.is_async and self._active < self._room:
                self._active += 1  # `_place` and `_start`, for the many that need no deciding
                call.started = started
                put(call)
            else:
                self._place(call)

    def drop(self, ids: list[int]) -> None:
        """Cancel these: an async one's task; a thread goes on, and its result is dropped (F5)."""
        for request in ids:
            call = self._calls.get(request)
            if call is None or call.dropped:
                continue
            call.dropped = True
            if not call.started:
                self._forget(call, DROPPED)
            elif call.task is not None:
                call.task.cancel()  # without a task it has not begun, and will find out

    async def finish(self, grace_s: float) -> None:
        """Give back what has not started, wait for what runs, cancel what still runs after `grace_s` seconds."""
        self._stopping = True
        self._waiting.clear()
        self._behind.clear()
        self._unbegun.clear()
        for endpoint in self._endpoints:
            endpoint.parked.clear()
        for call in [call for call in self._calls.values() if not call.started]:
            self._forget(call, UNTOUCHED)
        if await self._empty_within(grace_s):
            return
        # No reply from here on: the broker decides what becomes of calls that outlast a stop, not our cancelling them.
        self._abandoned = True
        log.warning("%d calls still run %s s after the stop and are abandoned", len(self._calls), grace_s)
        tasks = [call.task for call in self._calls.values() if call.task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await self._empty_within(0.5)  # for their `finally`; threads cannot be ended, they go down with the process

    def oldest_s(self, now: float) -> float:
        """Age of the oldest running call in seconds, 0.0 if none runs; any thread may ask."""
        started = [call.started for call in list(self._calls.values()) if call.started]
        return max(0.0, now - min(started)) if started else 0.0

    # When a call may start: the cases of the module's docstring.

    def _admit(self, call: Call, key: Key) -> None:
        before = self._unbegun.get(key)
        if before is not None and before.begun:  # a thread began it, and could not tell us
            self._begun(before)
            before = self._unbegun.get(key)
        if before is not None:
            # Tasks begin in the order in which they are made; of threads one never knows.
            in_order = before.started and before.endpoint.is_async and call.endpoint.is_async
            if not in_order or key in self._behind:
                self._behind.setdefault(key, deque()).append(call)
                if before.started:
                    self._look_soon()
                return
        self._unbegun[key] = call
        self._place(call)

    def _place(self, call: Call) -> None:
        endpoint = call.endpoint
        if self._active >= self._room:
            self._waiting.append(call)
        elif not endpoint.is_async and not endpoint.threads.free:
            endpoint.parked.append(call)
        else:
            self._start(call)

    def _start(self, call: Call) -> None:
        self._active += 1
        call.started = time.monotonic()
        if call.endpoint.is_async:
            self._steps.put(call)
        else:
            call.endpoint.threads.run(partial(self._run_plain, call), partial(self._ended_plain, call))
            if call.key is not None and call.key in self._behind:
                self._look_soon()

    def _begun(self, call: Call) -> None:
        """The first line of `call` runs, or never will: the next of its key is free to go."""
        key = call.key
        if self._unbegun.get(key) is not call:
            return
        del self._unbegun[key]
        behind = self._behind.pop(key, None)
        while behind:
            follower = behind.popleft()
            if not follower.dropped:
                if behind:
                    self._behind[key] = behind
                self._unbegun[key] = follower
                self._place(follower)
                return

    def _look_soon(self) -> None:
        if not self._looking:
            self._looking = True
            self._loop.call_soon(self._look)

    def _look(self) -> None:
        """Have the threads begun that others stand behind? It takes microseconds, so we look again in the next turn: a
        word from the thread would let go of the GIL between saying and doing, and the follower could be first."""
        self._looking = False
        for key in list(self._behind):
            before = self._unbegun[key]
            if before.begun:
                self._begun(before)
            elif before.started and not before.endpoint.is_async:
                self._look_soon()

    # How a call runs and ends.

    def _begin(self, call: Call) -> Coroutine[Any, Any, Any] | None:
        """The coroutine of an async endpoint, about to take its first step. None: it has been answered."""
        call.begun = True
        if call.key is not None:
            self._begun(call)
        if call.dropped:
            if call.coroutine is not None:
                call.coroutine.close()
            self._end(call, DROPPED, b"")
            return None
        if call.coroutine is not None:
            return call.coroutine
        endpoint = call.endpoint
        try:
            args, kwargs = decode_call(call.payload, trusted=call.trusted)
        except ForgeError as error:
            self._end(call, *self._outcomes.failed(error))
            return None
        if endpoint.takes_lists:
            args, kwargs = in_lists(args, kwargs)
        try:
            coroutine: Coroutine[Any, Any, Any] = endpoint.method(*args, **kwargs)
        except BaseException as error:  # arguments that do not fit
            self._end(call, *self._outcomes.raised(error))
            return None
        return coroutine

    def _returned(self, call: Call, value: Any) -> None:
        endpoint = call.endpoint
        status, payload = self._outcomes.returned(endpoint.name, value, endpoint.takes_lists)
        if self._waiting or endpoint.parked or call.dropped or self._stopping:
            self._end(call, status, payload)
        else:  # nobody waits for its room: what `_end` would do, for the many
            self._active -= 1
            del self._calls[call.id]
            self._link.reply(call.id, call.attempt, status, payload)
            self._on_reply()

    def _raised(self, call: Call, error: BaseException) -> None:
        # Whatever it is, the worker goes on (A5). Of a call that was dropped nobody reads it.
        self._end(call, *((DROPPED, b"") if call.dropped else self._outcomes.raised(error)))

    def _run_plain(self, call: Call) -> Outcome | Coroutine[Any, Any, Any]:
        """In a thread."""
        return self._context.copy().run(self._call_plain, call)

    def _call_plain(self, call: Call) -> Outcome | Coroutine[Any, Any, Any]:
        request_var.set(call.id)
        if call.session is not None:
            session_var.set(call.session)
        endpoint = call.endpoint
        try:
            args, kwargs = decode_call(call.payload, trusted=call.trusted)
        except ForgeError as error:
            return self._outcomes.failed(error)
        if endpoint.takes_lists:
            args, kwargs = in_lists(args, kwargs)
        try:
            call.begun = True
            value = endpoint.method(*args, **kwargs)
        except BaseException as error:  # SystemExit too
            return self._outcomes.raised(error)
        if inspect.iscoroutine(value):
            return value
        return self._outcomes.returned(endpoint.name, value, endpoint.takes_lists)

    def _ended_plain(self, call: Call, result: Outcome | Coroutine[Any, Any, Any]) -> None:
        call.begun = True
        if call.key is not None:
            self._begun(call)
        if not inspect.iscoroutine(result):
            self._end(call, *cast(Outcome, result))
            return
        # An `async def` under a decorator that hides it (torch.no_grad is one): it belongs on the loop.
        call.coroutine = result
        endpoint = call.endpoint
        endpoint.is_async = True
        endpoint.method = awaiting(endpoint.method)
        self._waiting.extendleft(reversed(endpoint.parked))
        endpoint.parked.clear()
        self._steps.put(call)
        self._advance()

    def _end(self, call: Call, status: int, payload: Payload) -> None:
        """A started call is over: its room is free, its reply on the way."""
        self._active -= 1
        parked = call.endpoint.parked
        while parked:
            following = parked.popleft()
            if not following.dropped:
                self._start(following)
                break
        if self._waiting:
            self._advance()
        if call.dropped:
            status, payload = DROPPED, b""
        self._forget(call, status, payload)

    def _advance(self) -> None:
        """Room may have come free: the oldest that wait come in."""
        waiting = self._waiting
        while waiting and self._active < self._room:
            call = waiting.popleft()
            if not call.dropped:
                self._place(call)

    def _forget(self, call: Call, status: int, payload: Payload = b"") -> None:
        """The one way a call leaves: with a reply, unless all are abandoned."""
        del self._calls[call.id]
        if not call.started:
            self._begun(call)  # it never will; those behind it need not wait
        if self._stopping and not self._calls:
            self._empty.set()
        if not self._abandoned:
            self._link.reply(call.id, call.attempt, status, payload)
            self._on_reply()

    async def _empty_within(self, limit_s: float) -> bool:
        if not self._calls:
            return True
        self._empty.clear()
        try:
            async with asyncio.timeout(limit_s):
                await self._empty.wait()
        except TimeoutError:
            return False
        return True


def awaiting(method: Callable[..., Awaitable[Any]]) -> Callable[..., Coroutine[Any, Any, Any]]:
    """The method as an `async def`."""

    async def call(*args: Any, **kwargs: Any) -> Any:
        return await method(*args, **kwargs)

    return call
