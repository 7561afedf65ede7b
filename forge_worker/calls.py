"""What `actor_host` runs: an endpoint of the instance, and one attempt of one request, or of the requests of a batch."""

from __future__ import annotations

import asyncio
import inspect
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any

from forge_contract.framing import Payload
from forge_contract.messages import client_of
from forge_contract.payload import decode_call
from forge_worker.assignment import EndpointSpec
from forge_worker.batches import Arguments, Batch
from forge_worker.link import Run
from forge_worker.outcomes import Outcome, Outcomes
from forge_worker.threads import Threads

Key = str | int  # calls of one key start in order: their session, or the client they come from


class Endpoint:
    """A method and what it takes to run it."""

    __slots__ = ("hides", "is_async", "method", "name", "parked", "stacks", "takes_lists", "threads")

    def __init__(self, name: str, method: Any, spec: EndpointSpec, threads: Threads) -> None:
        self.name = name
        self.method = method
        self.takes_lists = spec.takes_lists
        self.stacks = spec.stacks
        self.threads = threads
        self.is_async = inspect.iscoroutinefunction(method)
        # It may be an `async def` under a decorator: what a call of it returns will tell.
        self.hides = not self.is_async and inspect.iscoroutinefunction(inspect.unwrap(method))
        self.parked: deque[Call] = deque()

    def found_async(self) -> None:
        """It is an `async def` under a decorator that hides it (torch.no_grad is one): it belongs on the loop."""
        hidden: Callable[..., Awaitable[Any]] = self.method

        async def method(*args: Any, **kwargs: Any) -> Any:
            return await hidden(*args, **kwargs)

        self.is_async, self.method = True, method


class Call:
    """One attempt of one request, from dispatch to reply. With a `batch`: one run of a method for all its items, which has the
    id of the first of them, and one place wherever places are counted."""

    __slots__ = (
        "attempt",
        "batch",
        "begun",
        "blocked",
        "coroutine",
        "dropped",
        "endpoint",
        "id",
        "keys",
        "payload",
        "session",
        "started",
        "task",
        "threaded",
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
        keys: tuple[Key, ...] = (),
    ) -> None:
        self.id = request
        self.attempt = attempt
        self.endpoint = endpoint
        self.payload = payload
        self.trusted = trusted
        self.session = session
        self.keys = keys  # several where it is a batch of several sessions' calls
        self.blocked = 0  # under how many of them it waits for another to begin
        self.batch: Batch | None = None
        self.started = 0.0  # monotonic seconds, 0.0: not started
        self.begun = False  # its first line runs, or has run
        self.threaded = False  # a thread has it
        self.dropped = False
        self.task: asyncio.Task[None] | None = None  # its own, once it has had to wait
        self.coroutine: Coroutine[Any, Any, Any] | None = None  # what a plain `def` unexpectedly returned

    def arguments(self) -> Arguments | None:
        """What the method is called with; None when there is nothing to call it for. Raises what decoding raises."""
        if self.batch is not None:
            return self.batch.arguments()
        return decode_call(self.payload, trusted=self.trusted)

    def returned(self, value: Any, outcomes: Outcomes) -> Outcome:
        if self.batch is not None:
            return self.batch.returned(value)
        return outcomes.returned(self.endpoint.name, value)


def has_order(run: Run, *, serial: bool) -> bool:
    """Whether the start of any of these calls has to wait for another's. `serial`: of a mesh it does not, see `actor_host`."""
    return not serial and (any(run.sessions) or any(run.by_client))


def calls_of(run: Run, endpoint: Endpoint, outcomes: Outcomes, *, serial: bool) -> Iterator[Call]:
    """The calls of a dispatch: one for each item, or for each of its batches where the method takes lists. A call that is a batch
    of several sessions' has the order of each to keep, and is in none of them (`current_session`)."""
    at = 0
    for size in run.batches if endpoint.takes_lists and run.batches is not None else [1] * len(run.ids):
        request, attempt = run.ids[at], run.attempts[at]
        sessions = [session for session in run.sessions[at : at + size] if session is not None]
        session = sessions[0] if size == len(sessions) == 1 else None
        keys: tuple[Key, ...] = ()
        if not serial:
            keys = (client_of(request),) if run.by_client[at] else tuple(dict.fromkeys(sessions))
        payload = b"" if endpoint.takes_lists else run.payloads[at]
        call = Call(request, attempt, endpoint, payload, run.trusted, session, keys)
        if endpoint.takes_lists:
            call.batch = Batch(
                run.ids[at : at + size],
                run.attempts[at : at + size],
                run.payloads[at : at + size],
                endpoint=endpoint.name,
                trusted=run.trusted,
                stacks=endpoint.stacks,
                outcomes=outcomes,
            )
        at += size
        yield call
