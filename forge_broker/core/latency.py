"""How long calls waited and ran: histograms with fixed bounds, since the start and over the last minute (X3).

*Waiting* is from acceptance to the dispatch of the attempt that was answered, *running* from there to its answer. Bounds are spaced by a
tenth of a decade, so a quantile is within an eighth of the truth; an addition costs the same at any rate, and memory is constant.
`replies` adds, once for all calls of an envelope that share their times; `stats` keeps one of these for each endpoint and replica.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import accumulate
from operator import add as add_counts
from operator import sub
from typing import Any, Final, NamedTuple

STEPS: Final = (1.0, 1.25, 1.6, 2.0, 2.5, 3.15, 4.0, 5.0, 6.3, 8.0)
BOUNDS: Final = (0.0, *(round(step * 10.0**decade, 9) for decade in range(-4, 3) for step in STEPS), 1000.0)
"""Seconds, the upper bound of each bucket, but for the last, which has none. The first is for calls that did not wait at all."""

TOLD: Final = tuple(at for at, bound in enumerate(BOUNDS) if bound and f"{bound:e}"[:3] in {"1.0", "2.5", "5.0"})
"""Which bounds a scrape tells: three to a decade. All of them would be 72 series for each endpoint."""

SLOT_S: Final = 10.0
SLOTS: Final = 6  # of them are the window: the running one and those before it, 50 to 60 s


class Histogram(NamedTuple):
    counts: Sequence[int]  # by bucket, one more than `BOUNDS`
    sum_s: float

    @property
    def calls(self) -> int:
        return sum(self.counts)

    @property
    def mean_s(self) -> float:
        calls = self.calls
        return self.sum_s / calls if calls else 0.0

    def quantile(self, share: float) -> float:
        """Seconds that this share of the calls did not exceed, 0.0 of none. Within a bucket calls are taken to lie evenly, by the
        logarithm; beyond the last bound it is that bound."""
        seen = list(accumulate(self.counts))
        wanted = share * seen[-1]
        if not wanted:
            return 0.0
        at = bisect_left(seen, wanted)
        if at == 0 or at == len(BOUNDS):
            return BOUNDS[min(at, len(BOUNDS) - 1)]
        below, above = BOUNDS[at - 1], BOUNDS[at]
        into = (wanted - seen[at - 1]) / self.counts[at]
        return above * into if not below else below * (above / below) ** into

    def snapshot(self) -> dict[str, Any]:
        """Seconds."""
        return {
            "count": self.calls,
            "mean": self.mean_s,
            "p50": self.quantile(0.5),
            "p90": self.quantile(0.9),
            "p99": self.quantile(0.99),
        }


def merged(several: Iterable[Histogram]) -> Histogram:
    counts, sum_s = [0] * (len(BOUNDS) + 1), 0.0
    for one in several:
        counts = list(map(add_counts, counts, one.counts))
        sum_s += one.sum_s
    return Histogram(counts, sum_s)


class Latency:
    """Of the calls of one endpoint, or of one replica. The window is what was added since a mark: a copy made before the first
    addition of each slot of time, so that an addition pays for nothing but its own bucket."""

    __slots__ = ("_marks", "run", "run_s", "until", "wait", "wait_s")

    def __init__(self) -> None:
        self.wait = [0] * (len(BOUNDS) + 1)
        self.run = [0] * (len(BOUNDS) + 1)
        self.wait_s = 0.0
        self.run_s = 0.0
        self.until = 0.0  # when the running slot ends; what is added then needs a mark first
        self._marks: deque[tuple[int, array[int], float, array[int], float]] = deque(maxlen=SLOTS)

    def mark(self, now: float) -> None:
        slot = int(now / SLOT_S)
        self._marks.append((slot, array("Q", self.wait), self.wait_s, array("Q", self.run), self.run_s))
        self.until = (slot + 1) * SLOT_S

    def recent(self, now: float) -> tuple[Histogram, Histogram]:
        """Waiting and running, over the last minute."""
        first = int(now / SLOT_S) - SLOTS + 1
        for slot, wait, wait_s, run, run_s in self._marks:
            if slot >= first:
                return (
                    Histogram(list(map(sub, self.wait, wait)), self.wait_s - wait_s),
                    Histogram(list(map(sub, self.run, run)), self.run_s - run_s),
                )
        nothing = Histogram([0] * (len(BOUNDS) + 1), 0.0)
        return nothing, nothing

    def total(self) -> tuple[Histogram, Histogram]:
        """Waiting and running, since the start."""
        return Histogram(tuple(self.wait), self.wait_s), Histogram(tuple(self.run), self.run_s)


def add(one: Latency, other: Latency, count: int, waited_s: float, ran_s: float, now: float) -> None:
    """`count` calls, of this endpoint and on this replica, ended having waited and run for so long, each. Written out twice, because it
    is on the hot path."""
    if now >= one.until:
        one.mark(now)
    if now >= other.until:
        other.mark(now)
    at = bisect_left(BOUNDS, ran_s)
    one.run[at] += count
    other.run[at] += count
    ran_s *= count
    one.run_s += ran_s
    other.run_s += ran_s
    if waited_s > 0.0:
        at = bisect_left(BOUNDS, waited_s)
        waited_s *= count
        one.wait_s += waited_s
        other.wait_s += waited_s
    else:
        at = 0
    one.wait[at] += count
    other.wait[at] += count
