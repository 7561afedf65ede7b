"""Calls that arrive when a schedule says so, whether or not earlier ones were answered, and what became of them.

A closed loop asks again when it has its answer, so a service that stalls is asked less and looks well: the calls that would have
come meanwhile are left out of its percentiles (coordinated omission). Here each call has a moment at which it was due, and its latency
counts from there, also when we were late to send it ourselves. How late we were is measured, too, and a generator that could not keep
up says so. No broker and no terminal in here: `load` brings calls, clock and sleep.
"""

from __future__ import annotations

import asyncio
import math
from array import array
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from random import Random
from typing import Any, Final

from forge_broker.simulator.figures import percentiles, quantile

PERCENTILES: Final = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p99.9": 0.999}
# Sent in one turn when we are behind; then the loop looks at its sockets, or answers that are there would count as late.
BURST: Final = 64
# More than this late for one call in a hundred, and the schedule was not kept. A loaded machine delays a process by a few.
LATE_S: Final = 0.01
EXAMPLE_CHARS: Final = 200


def poisson(rate: float, seconds: float, random: Random) -> Iterator[float]:
    """When calls are due, in seconds from the start: independent callers, `rate` a second on average."""
    at = random.expovariate(rate)
    while at < seconds:
        yield at
        at += random.expovariate(rate)


def uniform(rate: float, seconds: float) -> Iterator[float]:
    """The same at equal distances."""
    for number in range(math.ceil(rate * seconds)):
        yield number / rate


class Tally:
    """What became of the calls. Eight bytes for each answer and each sending, so the percentiles are exact."""

    def __init__(self) -> None:
        self.sent = 0
        self.answered = 0  # well
        self.latencies = array("d")  # of those, from when they were due
        self.delays = array("d")  # of every call: from when it was due to when it was sent
        self.errors: Counter[str] = Counter()
        self.examples: dict[str, str] = {}  # the first text of each kind
        self.timeouts = 0
        self.outstanding = 0
        self.outstanding_at_end: int | None = None  # when the last call had been sent
        self.seconds = 0.0  # from the start to the end of the sending

    @property
    def failed(self) -> int:
        return self.errors.total()

    @property
    def rate(self) -> float:
        return self.sent / self.seconds if self.seconds else 0.0

    @property
    def kept_up(self) -> bool:
        return not self.delays or quantile(sorted(self.delays), 0.99) <= LATE_S

    def refuse(self, error: BaseException) -> None:
        """One that failed."""
        name = getattr(error, "type_name", None) or type(error).__name__
        self.errors[name] += 1
        self.timeouts += type(error).__name__ == "CallTimeout"
        if name not in self.examples:
            self.examples[name] = str(error)[:EXAMPLE_CHARS]

    def told(self) -> dict[str, Any]:
        """As `forge load --json` has it; times in seconds."""
        return {
            "seconds": round(self.seconds, 3),
            "sent": self.sent,
            "achieved_rate": round(self.rate, 3),
            "kept_up": self.kept_up,
            "succeeded": self.answered,
            "failed": self.failed,
            "errors": dict(self.errors.most_common()),
            "examples": self.examples,
            "timeouts": self.timeouts,
            "outstanding_at_end": self.outstanding if self.outstanding_at_end is None else self.outstanding_at_end,
            "unanswered": self.outstanding,
            "latency_s": percentiles(self.latencies, PERCENTILES),
            "spread": _spread(self.latencies),
            "sent_late_s": percentiles(self.delays, PERCENTILES),
        }


def _spread(values: Sequence[float]) -> float | None:
    """Standard deviation over mean, as `forge simulate --spread` takes it; None of fewer than two, or of nothing but 0."""
    mean = math.fsum(values) / len(values) if values else 0.0
    if len(values) < 2 or not mean:
        return None
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return round(math.sqrt(variance) / mean, 4)


class OpenLoop:
    """Sends call after call as they are due. `call(number)` sends one and gives its future; the future may fail, `call` itself
    raises what is wrong with every call. `refused`: the exceptions of `call` that concern only this one."""

    def __init__(
        self,
        call: Callable[[int], asyncio.Future[Any]],
        *,
        clock: Callable[[], float],
        sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep,
        refused: tuple[type[Exception], ...] = (),
        fatal: tuple[type[Exception], ...] = (),
    ) -> None:
        self.tally = Tally()
        self.over: BaseException | None = None  # a failure after which there is no sense in going on: one of `fatal`
        self._call = call
        self._clock = clock
        self._sleep = sleep
        self._refused = refused
        self._fatal = fatal
        self._pending: set[asyncio.Future[Any]] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._given_up = False

    async def run(self, arrivals: Iterator[float], seconds: float) -> None:
        """Send until the time is over. What is due and could not be sent by then is not sent. Cancelled, it has sent what it has."""
        tally, clock, sleep = self.tally, self._clock, self._sleep
        began = clock()
        try:
            in_this_turn = 0
            for at in arrivals:
                due = began + at
                while (now := clock()) < due:
                    await sleep(due - now)
                    in_this_turn = 0
                if now - began > seconds or self.over is not None:
                    break
                if in_this_turn == BURST:
                    await sleep(0)
                    in_this_turn = 0
                in_this_turn += 1
                self._send(due)
            else:
                # The rate is of the time that was asked for, not up to the last arrival.
                while self.over is None and (now := clock()) < began + seconds:
                    await sleep(began + seconds - now)
        finally:
            tally.seconds = clock() - began
            tally.outstanding_at_end = tally.outstanding

    async def settle(self, grace_s: float) -> None:
        """Wait for what is still unanswered, so long at most."""
        try:
            async with asyncio.timeout(grace_s):
                await self._idle.wait()
        except TimeoutError:
            return  # the tally says how many

    def give_up(self) -> None:
        """Count no further, whatever becomes of what is outstanding."""
        self._given_up = True
        for pending in self._pending:
            pending.cancel()  # the broker drops what it has only queued

    def _send(self, due: float) -> None:
        tally = self.tally
        try:
            call = self._call(tally.sent)
        except self._refused as error:
            tally.delays.append(self._clock() - due)
            tally.sent += 1
            tally.refuse(error)
            return
        tally.delays.append(self._clock() - due)
        tally.sent += 1
        tally.outstanding += 1
        self._pending.add(call)
        self._idle.clear()
        call.add_done_callback(partial(self._done, due))

    def _done(self, due: float, call: asyncio.Future[Any]) -> None:
        if self._given_up:
            return  # they stay outstanding
        tally = self.tally
        self._pending.discard(call)
        tally.outstanding -= 1
        if not self._pending:
            self._idle.set()
        error = call.exception()
        if error is None and isinstance(call.result(), Exception):
            error = call.result()  # of a service with errors="return"
        if error is None:
            tally.answered += 1
            tally.latencies.append(self._clock() - due)
            return
        tally.refuse(error)
        if isinstance(error, self._fatal):
            self.over = error
