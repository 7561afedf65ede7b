"""Calls of one async endpoint that came together and may all start: what is done for one of them is done in one loop.

`actor_host` makes one of a Run where nothing has to be decided for a single call: there is room for all, and none stands
behind another. `steps` has it take their first steps. Those that end in it by a value, as most do, never become a `Call`:
their results are gathered as a column, and the books are kept once for all of them. The others leave the burst: one that
waits, raises, or has no result that can travel is a `Call` from then on, and ends as any.
"""

from __future__ import annotations

import sys
from collections.abc import Coroutine
from contextvars import copy_context
from typing import Any, Protocol

from forge_client.context import SessionsOfCalls, request_var, session_var
from forge_contract.errors import ForgeError
from forge_contract.framing import Payload
from forge_worker.arguments import read_call
from forge_worker.calls import Call, Endpoint
from forge_worker.link import Run
from forge_worker.outcomes import Outcome, Outcomes
from forge_worker.vessel import Vessel, unchanged


class Owner(Protocol):
    """What `actor_host` is to a burst."""

    def apart(self, burst: Burst, request: int, attempt: int) -> Call:
        """A call of it that goes its own way from here on, begun; it ends by one of the next three."""

    def ended(self, call: Call, outcome: Outcome) -> None: ...
    def returned(self, call: Call, value: Any) -> None: ...
    def raised(self, call: Call, error: BaseException) -> None: ...

    def burst_over(self, burst: Burst) -> None:
        """All have taken their first step; those in `ids` have ended in it."""


class Burst:
    """`ids` and `attempts` are those of the calls that have not left it, `payloads` their results once it is over."""

    __slots__ = (
        "_documents",
        "_left",
        "_outcomes",
        "_owner",
        "_sessions",
        "_todo",
        "attempts",
        "endpoint",
        "ids",
        "payloads",
        "started",
        "trusted",
    )

    def __init__(self, owner: Owner, outcomes: Outcomes, endpoint: Endpoint, run: Run, started: float) -> None:
        self.endpoint = endpoint
        self.trusted = run.trusted
        self.started = started
        self.ids = run.ids
        self.attempts = run.attempts
        self.payloads: list[Payload] = []
        self._owner = owner
        self._outcomes = outcomes
        # Backwards, to be popped: what a call is given must not live for as long as another of them waits.
        self._todo = run.ids[::-1]
        self._documents = run.payloads[::-1]
        self._sessions = SessionsOfCalls(run.ids, run.sessions) if any(run.sessions) else None
        self._left: set[int] = set()

    def __repr__(self) -> str:
        return f"<Burst of {len(self.ids)} calls of {self.endpoint.name}, {len(self._todo)} to begin>"

    @property
    def begun(self) -> bool:
        """All have taken their first step."""
        return not self._todo

    def over(self) -> None:
        """Tell of those that have ended."""
        if self._left:
            stayed = [pair for pair in zip(self.ids, self.attempts, strict=True) if pair[0] not in self._left]
            self.ids, self.attempts = [one for one, _ in stayed], [attempt for _, attempt in stayed]
        self._owner.burst_over(self)
        self.payloads = []

    def drop(self, requests: set[int]) -> list[Call]:
        """Take these out before it begins. Returns those that were here."""
        gone = []
        for at in reversed(range(len(self.ids))):
            if (request := self.ids[at]) in requests:
                gone.append(self._owner.apart(self, request, self.attempts[at]))
                del self._todo[-1 - at], self._documents[-1 - at]
                self.ids, self.attempts = [*self.ids], [*self.attempts]  # they were the Run's
                del self.ids[at], self.attempts[at]
        return gone

    def apart(self, request: int) -> Call:
        """The call that begins leaves."""
        self._left.add(request)
        return self._owner.apart(self, request, self.attempts[-1 - len(self._todo)])

    async def run(self, vessel: Vessel) -> bool:
        """Take first steps in the name of `vessel`. False when it is no vessel for others any more, as one of these calls has
        waited in it, or has left traces on it; then there may be more to take, in another."""
        endpoint, outcomes, owner, task = self.endpoint, self._outcomes, self._owner, vessel.task
        method, trusted, plain, done = endpoint.method, self.trusted, outcomes.plain, self.payloads.append
        todo, documents = self._todo, self._documents
        session_var.set(self._sessions)
        alone = sys.getrefcount(task)
        while todo:
            request, document = todo.pop(), documents.pop()
            request_var.set(request)
            try:
                args, kwargs = read_call(document, trusted)
            except ForgeError as error:
                owner.ended(self.apart(request), outcomes.failed(error))
                continue
            except BaseException as error:  # the arguments' own code, or memory
                owner.raised(self.apart(request), error)
                continue
            try:
                coroutine: Coroutine[Any, Any, Any] = method(*args, **kwargs)
            except BaseException as error:  # arguments that do not fit
                owner.raised(self.apart(request), error)
                continue
            del document, args, kwargs  # the call's alone, should it wait
            before = copy_context()
            try:
                value = await coroutine
            except BaseException as error:  # also SystemExit, which would end the loop
                if vessel.call is not None:
                    owner.raised(vessel.call, error)
                    return False
                owner.raised(self.apart(request), error)
            else:
                if vessel.call is not None:
                    owner.returned(vessel.call, value)
                    return False
                if (payload := plain(value)) is not None:
                    done(payload)
                else:
                    outcome = outcomes.returned(endpoint.name, value)
                    if outcome[0]:
                        owner.ended(self.apart(request), outcome)
                    else:
                        done(outcome[1])
                del value
            del coroutine
            if sys.getrefcount(task) > alone or task.cancelling() or not unchanged(before):
                return False
        return True
