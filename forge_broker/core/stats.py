"""Counts and rates (X3): over windows of time, in constant memory at any rate. Bumped once per envelope where it can be.

One of these belongs to each replica, endpoint and service and goes with it; what a scrape or a client is told of them is for `figures`
and `status` to say.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

from forge_broker.core.latency import Latency

WINDOW_S = 60.0
_BUCKETS = 60
RULES_AT_MOST: Final = 50  # of one service, with their directions


class Window:
    """How many, and the sum of their latencies, over the last minute, in buckets of a second."""

    __slots__ = ("_counts", "_first", "_latencies", "_newest")

    def __init__(self, now: float) -> None:
        self._counts = [0] * _BUCKETS
        self._latencies = [0.0] * _BUCKETS
        self._newest = int(now)
        self._first = now

    def _roll(self, now: float) -> int:
        second = int(now)
        for passed in range(self._newest + 1, min(second, self._newest + _BUCKETS) + 1):
            self._counts[passed % _BUCKETS] = 0
            self._latencies[passed % _BUCKETS] = 0.0
        self._newest = max(second, self._newest)
        return second % _BUCKETS

    def add(self, count: int, latency_s: float, now: float) -> None:
        """`count` calls ended, their latencies summing up to `latency_s`."""
        bucket = self._roll(now)
        self._counts[bucket] += count
        self._latencies[bucket] += latency_s

    def rate(self, now: float) -> float:
        """Per second, over the window or since the start, whichever is shorter (at least one second)."""
        self._roll(now)
        return sum(self._counts) / max(1.0, min(WINDOW_S, now - self._first))

    def mean_latency_s(self, now: float) -> float:
        self._roll(now)
        count = sum(self._counts)
        return sum(self._latencies) / count if count else 0.0


class ReplicaStats:
    """Totals of one replica, over all its epochs."""

    __slots__ = ("failed", "latency", "succeeded", "total", "window")

    def __init__(self, now: float) -> None:
        self.total = 0
        self.succeeded = 0
        self.failed = 0
        self.window = Window(now)
        self.latency = Latency()

    def ended(self, succeeded: int, failed: int, latency_s: float, now: float) -> None:
        self.total += succeeded + failed
        self.succeeded += succeeded
        self.failed += failed
        self.window.add(succeeded + failed, latency_s, now)


OUTCOMES: Final = (
    "ok",
    "raised",  # an exception of the user's code
    "failed",  # one of ours, which a worker answered: a result that cannot travel, a batch of another length
    "timed_out",
    "cancelled",
    "overloaded",
    "no_replicas",  # none was healthy for too long
    "lost",  # with its replica, and not to be tried again
    "poisoned",
    "refused",  # everything else that the broker answers: unknown sessions, services that stop, routers that raise
    "abandoned",  # its client is gone
)
"""How a call can end for its caller."""


class EndpointStats:
    """Totals of one endpoint. `outcomes`: each call once, however often it was tried; a fan-out is one call here, and one on each of its
    replicas in `latency`."""

    __slots__ = ("latency", "outcomes", "retries")

    def __init__(self) -> None:
        self.latency = Latency()
        self.outcomes = dict.fromkeys(OUTCOMES, 0)
        self.retries = 0  # attempts beyond the first


class ServiceStats:
    """Totals of one service, which its replicas may not outlive."""

    __slots__ = ("restarts", "scalings")

    def __init__(self) -> None:
        self.restarts = 0  # of replicas that were lost, or told to start anew
        self.scalings: Counter[tuple[str, str]] = Counter()  # by direction ("up", "down") and the rule that fired

    def scaled(self, delta: int, rule: str) -> None:
        """The service got so many replicas more, or fewer, by this rule (X1): one event, however large. A policy of the user's may name
        its rules as it likes, so not all of them are kept apart."""
        event = ("up" if delta > 0 else "down", rule)
        if event not in self.scalings and len(self.scalings) >= RULES_AT_MOST:
            event = (event[0], "other")
        self.scalings[event] += 1
