"""Runs the calls of one actor: when each may start, how it ends (design A5, A6, A7, F5). On the loop's thread.

`runtime` makes it of an assignment and an instance, hands it the link's instructions, and is told by `on_reply` that
there is something to flush. When a call may start is decided in `run` and what follows from it:

1. Where the class has hooks for its sessions (S3), a session's calls run one at a time, each from the import of the state
   it needs to the checkpoint that its reply takes along: `sessions`. For such a call no other order counts.
2. A call with order keys (its session, or its client where the broker says so; all sessions of a batch) waits until the one
   before it under each has begun: `order`. A mesh's calls have no key: there, at most one runs, and they start in order anyway.
3. Never more than `concurrency` run: `_waiting`, in order of dispatch. The broker may send more (RECALL), and calls without order
   wait as they came.
4. A plain `def` needs a thread of its endpoint: `parked`, in that endpoint. Others pass it: a slow endpoint starves nobody.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, cast

from forge_client.context import request_var, session_var
from forge_contract.errors import ForgeError
from forge_contract.framing import Payload
from forge_contract.messages import DROPPED, OK, RAISED, RETURNED, UNTOUCHED
from forge_contract.payload import decode_call
from forge_worker.assignment import Assignment
from forge_worker.batches import in_lists
from forge_worker.bursts import Burst
from forge_worker.calls import Call, Endpoint, calls_of, has_order
from forge_worker.last_resort import give_up
from forge_worker.link import Import, Replay, Run, WorkerLink
from forge_worker.order import Order
from forge_worker.outcomes import BROKEN, Outcome, Outcomes
from forge_worker.sessions import Session, Sessions
from forge_worker.steps import Steps
from forge_worker.threads import Threads, in_thread

log = logging.getLogger("forge_worker")


class ActorHost:
    """The calls of one instance. `trusted`: whether replies may hold pickles, by the trust of our own address.

    `share` puts large results into shared memory. `on_reply`: there is something to flush. `on_broken`: this exception was
    raised, and replied, after which the process must not go on (F6); called once.
    """

    def __init__(
        self,
        assignment: Assignment,
        instance: Any,
        methods: list[Any],
        link: WorkerLink,
        *,
        trusted: bool,
        on_reply: Callable[[], None],
        on_broken: Callable[[Payload], None],
        share: Callable[[Payload], Payload] | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._context = contextvars.copy_context()  # what calls in threads start from
        self._link = link
        self._on_reply = on_reply
        self._on_broken: Callable[[Payload], None] | None = on_broken
        self._class_name = assignment.class_name
        self._serial = assignment.serial
        self._room = 1 if assignment.serial else assignment.concurrency
        self._outcomes = Outcomes(trusted, assignment.max_payload_bytes, assignment.fatal_errors, share)
        self._sessions = Sessions(instance, assignment, trusted=trusted) if assignment.checkpoint_every else None
        self._endpoints = [
            Endpoint(
                f"{assignment.class_name}.{spec.name}",
                method,
                spec,
                Threads(self._loop, spec.threads, spec.name),
            )
            for spec, method in zip(assignment.endpoints, methods, strict=True)
        ]
        self._steps: Steps[Call] = Steps(self._begin, self.returned, self.raised, self._waits)
        self._calls: dict[int, Call] = {}
        self._active = 0  # started, those of bursts among them
        self._burst_since = 0.0  # monotonic seconds, 0.0: none is under way
        self._burst_calls = 0  # begun since then
        self._burst_ends = True  # all of them in their first step
        self._waiting: deque[Call | Run] = deque()
        self._order = Order(self._loop, self._place)
        self._tasks: set[asyncio.Task[None]] = set()  # imports and checkpoints; a loop holds its tasks weakly
        self._stopping = False
        self._abandoned = False
        self._empty = asyncio.Event()

    def __repr__(self) -> str:
        return f"<ActorHost {self._class_name} {self._active} of {self._room} running, {len(self._calls)} held>"

    def run(self, run: Run) -> None:
        """Take calls in; each gets its reply through the link, whatever happens to it. To be followed by `serve`."""
        if self._stopping:
            for request, attempt in zip(run.ids, run.attempts, strict=True):
                self._link.reply(request, attempt, UNTOUCHED, b"")
            self._on_reply()
            return
        self._steps.due = True
        endpoint, started, ordered = self._endpoints[run.method], time.monotonic(), has_order(run, serial=self._serial)
        has_hooks = self._sessions is not None and any(run.sessions)
        if endpoint.is_async and not endpoint.takes_lists and not has_hooks and (not ordered or self._order.idle):
            if len(run.ids) <= self._room - self._active:
                self._burst(run, endpoint, started)
                return
            if not ordered:
                self._waiting.append(run)
                self._advance()
                return
        if ordered and self._burst_since:
            self.serve()  # whose calls keep no books of who has begun
            self._steps.due = True
        for call in calls_of(run, endpoint, self._outcomes, serial=self._serial):
            for request in (call.id,) if call.batch is None else call.batch.ids:
                self._calls[request] = call
            if call.session is not None and has_hooks:
                self._admit_to_session(call, call.session)
            elif call.keys:
                self._order.admit(call)
            elif endpoint.is_async and self._active < self._room:
                self._active += 1  # `_place` and `_start`, for the many that need no deciding
                call.started = started
                self._steps.put(call)
            else:
                self._place(call)

    def _burst(self, run: Run, endpoint: Endpoint, started: float) -> None:
        """Calls that may all start."""
        self._active += len(run.ids)
        self._burst_calls += len(run.ids)
        if not self._burst_since:
            self._burst_since = started
        if not self._steps.due:
            self._steps.due = True
            self._loop.call_soon(self.serve)
        self._steps.put(Burst(self, self._outcomes, endpoint, run, started))

    def serve(self) -> None:
        """Let those that came begin; what of them ends at once is replied to in this turn. After `run`, in its turn."""
        self._steps.serve()
        if self._burst_calls and self._burst_ends:
            self._link.cost = int((time.monotonic() - self._burst_since) * 1e9) // self._burst_calls
        self._burst_since, self._burst_calls, self._burst_ends = 0.0, 0, True

    def drop(self, ids: list[int]) -> None:
        """Cancel these: an async one's task; a thread goes on, and its result is dropped (F5)."""
        unwanted = set(ids)
        for burst in self._steps.bursts() if self._burst_since else ():
            for gone in burst.drop(unwanted):
                gone.dropped = True
                self._over(gone, DROPPED, b"")
        self._answer_waiting(DROPPED, only=unwanted)
        for request in ids:
            call = self._calls.get(request)
            if call is None or call.dropped or not self._nobody_waits(call, request):
                continue
            call.dropped = True
            if not call.started:
                self._forget(call, DROPPED)
            elif call.task is not None:
                call.task.cancel()  # without a task it has not begun, and will find out

    def _nobody_waits(self, call: Call, request: int) -> bool:
        """Whether that is so without this request. An item of a batch leaves it before it starts; later its reply does (B2)."""
        batch = call.batch
        if batch is None or call.started or len(batch.ids) == 1:
            return batch is None or batch.drop(request)
        attempt = batch.leave(request)
        call.id = batch.ids[0]
        del self._calls[request]
        self._link.reply(request, attempt, DROPPED, b"")
        self._on_reply()
        return False

    def give_back(self) -> None:
        """What has not started, has no order, and may not start now (RECALL): others may be free for it."""
        self._answer_waiting(RETURNED)
        unstarted = dict.fromkeys(
            call for call in self._calls.values() if not (call.started or call.keys or call.dropped)
        )
        for call in list(unstarted)[max(0, self._room - self._active) :]:
            call.dropped = True
            self._forget(call, RETURNED)

    def _answer_waiting(self, status: int, only: set[int] | None = None) -> None:
        """The calls of runs that wait, all or `only` these, leave with this reply."""
        if not any(isinstance(one, Run) for one in self._waiting):
            return
        left: deque[Call | Run] = deque()
        for one in self._waiting:
            if isinstance(one, Call):
                left.append(one)
                continue
            stays = [only is not None and request not in only for request in one.ids]
            for request, attempt, it_stays in zip(one.ids, one.attempts, stays, strict=True):
                if not it_stays:
                    self._link.reply(request, attempt, status, b"")
            if any(stays):
                left.append(one.only(stays))
        self._waiting = left
        self._on_reply()

    async def replay(self, replay: Replay) -> None:
        """Run an endpoint for its effect, at once (A11): a thread of its own for a plain one. Raises what it raises.
        A mesh runs nothing else meanwhile, for its collectives must not cross."""
        endpoint = self._endpoints[replay.method]
        args, kwargs = decode_call(replay.payload, trusted=replay.trusted)
        if endpoint.takes_lists:
            args, kwargs = in_lists(args, kwargs, stacks=endpoint.stacks)
        self._active += 1
        try:
            if endpoint.is_async:
                await endpoint.method(*args, **kwargs)
            else:
                await in_thread(self._loop, endpoint.name, partial(endpoint.method, *args, **kwargs))
        finally:
            self._active -= 1
            self._advance()

    def take_state(self, instruction: Import) -> None:
        """A session comes from elsewhere (S3)."""
        if self._sessions is not None:
            self._sessions.arrived(instruction)

    def forget(self, sessions: list[str]) -> None:
        if self._sessions is not None:
            self._sessions.forget(sessions)

    def tell_states(self) -> None:
        """The broker has lost them (F10): a checkpoint of each session, of those that run a call with its reply."""
        if self._sessions is None:
            return
        running = self._running_sessions()
        idle = []
        for session in self._sessions.held():
            if session.current is not None or session.id in running:
                session.due = True
            else:
                session.current = self  # keeps its calls waiting
                idle.append(session)
        if idle:
            self._active += 1  # a mesh's calls have no other to wait for
            self._spawn(self._tell_states(idle))

    async def finish(self, grace_s: float, *, checkpoints: bool) -> None:
        """Give back what has not started, wait for what runs, cancel what still runs after `grace_s` seconds; then, with
        `checkpoints`, tell the states of the sessions that had calls since their last one."""
        self._stopping = True
        self._answer_waiting(UNTOUCHED)
        self._waiting.clear()
        self._order.clear()
        for endpoint in self._endpoints:
            endpoint.parked.clear()
        if self._sessions is not None:
            self._sessions.let_go()
        for call in dict.fromkeys(call for call in self._calls.values() if not call.started):
            self._forget(call, UNTOUCHED)
        torn: set[str | None] = set()
        if not await self._empty_within(grace_s):
            torn = self._running_sessions()  # they may be anywhere in a call, which runs again elsewhere
            await self._abandon(grace_s)
        if checkpoints and self._sessions is not None:
            for session in self._sessions.held():
                if session.since and session.id not in torn:
                    await self._tell_state(session)

    async def _abandon(self, grace_s: float) -> None:
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
        if since := self._burst_since:
            started.append(since)
        return max(0.0, now - min(started)) if started else 0.0

    # When a call may start: the cases of the module's docstring.

    def _admit_to_session(self, call: Call, name: str) -> None:
        assert self._sessions is not None
        session = self._sessions.of(name)
        if self._serial:
            self._place(call)  # one at a time as it is, in an order that is the same on all ranks
        elif session.current is not None:
            session.behind.append(call)
        else:
            session.current = call
            self._place(call)

    def _leave_session(self, session: Session) -> None:
        """Its call is over: the next of it is free to go."""
        assert self._sessions is not None
        session.current = None
        while session.behind:
            follower = session.behind.popleft()
            if not follower.dropped:
                session.current = follower
                self._place(follower)
                return
        self._sessions.release(session)

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
        if call.session is not None and self._sessions is not None and self._sessions.unsettled(call.session):
            self._spawn(self._prepare(call, call.session))
        elif call.endpoint.is_async:
            self._steps.put(call)
        else:
            call.endpoint.threads.run(partial(self._run_plain, call), partial(self._ended_plain, call))
            self._order.threaded(call)

    # How a call runs and ends.

    def _begin(self, call: Call) -> Coroutine[Any, Any, Any] | None:
        """The coroutine of an async endpoint, about to take its first step. None: it has been answered."""
        if call.dropped:
            if call.coroutine is not None:
                call.coroutine.close()
            self._end(call, DROPPED, b"")
            return None
        if call.coroutine is not None:
            return call.coroutine
        endpoint = call.endpoint
        try:
            arguments = call.arguments()
        except ForgeError as error:
            self._end(call, *self._outcomes.failed(error))
            return None
        except BaseException as error:  # the arguments' own code, or memory
            self._end(call, *self._outcomes.raised(error))
            return None
        if arguments is None:
            self._end(call, OK, b"")
            return None
        args, kwargs = arguments
        try:
            coroutine: Coroutine[Any, Any, Any] = endpoint.method(*args, **kwargs)
        except BaseException as error:  # arguments that do not fit
            self._end(call, *self._outcomes.raised(error))
            return None
        return coroutine

    def apart(self, burst: Burst, request: int, attempt: int) -> Call:
        """A call that has left its burst. Its session has no hooks, and those behind it none to wait for."""
        call = Call(request, attempt, burst.endpoint, b"", burst.trusted, None)
        call.started, call.begun = burst.started, True
        self._calls[request] = call
        return call

    def _waits(self, call: Call) -> None:
        """It has taken its first step, and goes on later."""
        self._burst_ends = False
        self._order.begun(call)

    def burst_over(self, burst: Burst) -> None:
        """Those in its columns have ended by a value; the books of all at once."""
        if burst.ids:
            self._active -= len(burst.ids)
            self._link.reply_all(burst.ids, burst.attempts, [OK] * len(burst.ids), burst.payloads)
            if self._waiting:
                self._advance()
            self._on_reply()

    def ended(self, call: Call, outcome: Outcome) -> None:
        self._end(call, *outcome)

    def returned(self, call: Call, value: Any) -> None:
        endpoint = call.endpoint
        if call.keys:
            self._order.begun(call)
        status, payload = call.returned(value, self._outcomes)
        if (
            status
            or call.batch is not None
            or (call.session is not None and self._sessions is not None)
            or self._waiting
            or endpoint.parked
            or call.dropped
            or self._stopping
        ):
            self._end(call, status, payload)
        else:  # nobody waits for its room: what `_end` would do, for the many
            self._active -= 1
            del self._calls[call.id]
            self._link.reply(call.id, call.attempt, status, payload)
            self._on_reply()

    def raised(self, call: Call, error: BaseException) -> None:
        # Whatever it is, the worker goes on (A5). Of a call that was dropped nobody reads it.
        self._end(call, *((DROPPED, b"") if call.dropped else self._outcomes.raised(error)))

    def _run_plain(self, call: Call) -> Outcome | Coroutine[Any, Any, Any]:
        """In a thread."""
        try:
            return self._context.copy().run(self._call_plain, call)
        except BaseException as error:  # SystemExit too
            return self._outcomes.raised(error)

    def _call_plain(self, call: Call) -> Outcome | Coroutine[Any, Any, Any]:
        request_var.set(call.id)
        if call.session is not None:
            session_var.set(call.session)
        endpoint = call.endpoint
        try:
            arguments = call.arguments()
        except ForgeError as error:
            return self._outcomes.failed(error)
        call.begun = not endpoint.hides
        if arguments is None:
            return OK, b""
        args, kwargs = arguments
        value = endpoint.method(*args, **kwargs)
        if inspect.iscoroutine(value):
            return value
        return call.returned(value, self._outcomes)

    def _ended_plain(self, call: Call, result: Outcome | Coroutine[Any, Any, Any]) -> None:
        endpoint = call.endpoint
        call.threaded = False
        if not inspect.iscoroutine(result):
            endpoint.hides = False
            self._end(call, *cast(Outcome, result))
            return
        call.begun = False
        call.coroutine = result
        endpoint.found_async()
        self._waiting.extendleft(reversed(endpoint.parked))
        endpoint.parked.clear()
        self._steps.put(call)
        self._advance()

    def _end(self, call: Call, status: int, payload: Payload) -> None:
        """A started call has run. Its reply may have to wait for a checkpoint, and keeps its room until then."""
        if call.keys:
            self._order.begun(call)
        if call.session is not None and self._sessions is not None:
            due = self._sessions.ended(call.session)
            if due and status != BROKEN and not self._abandoned:
                self._spawn(self._checkpoint(call, call.session, status, payload))
                return
        self._over(call, status, payload)

    def _over(self, call: Call, status: int, payload: Payload) -> None:
        """A started call is over: its room is free, its reply on the way."""
        broken = status == BROKEN
        if broken:
            status = RAISED
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
            self._forget(call, DROPPED)
        else:
            self._forget(call, status, payload)
        if broken and self._on_broken is not None:
            on_broken, self._on_broken = self._on_broken, None
            on_broken(payload)

    def _advance(self) -> None:
        """Room may have come free: the oldest that wait come in."""
        waiting = self._waiting
        while waiting and self._active < self._room:
            one = waiting.popleft()
            if isinstance(one, Run):
                free = self._room - self._active
                if len(one.ids) > free:
                    waiting.appendleft(one.only(slice(free, None)))
                    one = one.only(slice(free))
                self._burst(one, self._endpoints[one.method], time.monotonic())
            elif not one.dropped:
                self._place(one)

    def _forget(self, call: Call, status: int, payload: Payload = b"") -> None:
        """The one way a call leaves: with a reply, unless all are abandoned."""
        batch = call.batch
        for request in (call.id,) if batch is None else batch.ids:
            del self._calls[request]
        if not call.started:
            self._order.begun(call)  # it never will; those behind it need not wait
        if call.session is not None and self._sessions is not None:
            session = self._sessions.get(call.session)
            if session is not None and session.current is call:
                self._leave_session(session)
        if self._stopping and not self._calls:
            self._empty.set()
        if self._abandoned:
            return
        if batch is None:
            self._link.reply(call.id, call.attempt, status, payload)
        else:
            self._link.reply_all(batch.ids, batch.attempts, *batch.replies(status, payload))
        self._on_reply()

    # Sessions with hooks: what a call is preceded by and followed by.

    async def _prepare(self, call: Call, name: str) -> None:
        assert self._sessions is not None
        session = self._sessions.get(name)
        lost = None if session is None else await self._sessions.prepare(session)
        if call.dropped or lost is not None:
            self._over(call, *((DROPPED, b"") if lost is None else self._outcomes.failed(lost)))
            return
        if self._stopping:
            self._over(call, UNTOUCHED, b"")
            return
        # Placed again, for meanwhile another may have taken the thread it needs.
        self._active -= 1
        call.started = 0.0
        self._place(call)
        self._advance()

    async def _checkpoint(self, call: Call, name: str, status: int, payload: Payload) -> None:
        assert self._sessions is not None
        session = self._sessions.get(name)
        state = None if session is None else await self._sessions.export(session)
        if state is not None and not self._abandoned:  # without the reply, the call would run again on its own effects
            self._link.states(name, state)
        self._over(call, status, payload)

    async def _tell_states(self, sessions: list[Session]) -> None:
        assert self._sessions is not None
        for session in sessions:
            if await self._sessions.prepare(session) is None:
                await self._tell_state(session)
            self._leave_session(session)
        self._active -= 1
        self._advance()

    async def _tell_state(self, session: Session) -> None:
        assert self._sessions is not None
        state = await self._sessions.export(session)
        if state is not None and not session.forgotten:
            self._link.states(session.id, state)
            self._on_reply()

    def _running_sessions(self) -> set[str | None]:
        return {call.session for call in self._calls.values() if call.started}

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work, context=self._context.copy())
        self._tasks.add(task)
        task.add_done_callback(self._spawned_ended)

    def _spawned_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            give_up(error)  # calls wait behind it that nobody would answer

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
