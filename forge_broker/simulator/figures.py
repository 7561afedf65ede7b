"""What a simulation measured: of each call how long it waited and ran, of each interval what there was, of each scale event why."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

HOUR_S = 3600.0
PERCENTILES: Final = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


class Sample(NamedTuple):
    """One interval, and what there was at its end. Times in seconds from the beginning of the trace."""

    at: float
    rate: float  # calls/s that came in it
    wanted: int  # replicas that the service is to have
    healthy: int
    processes: int  # that run: those that start and those that drain among them
    queued: int
    queued_most: int  # just after a call came
    in_flight: int
    p50_s: float | None  # of calls that were answered in it; None: there was none
    p99_s: float | None


class ScaleEvent(NamedTuple):
    at: float
    delta: int
    rule: str
    reason: str
    wanted: int  # replicas after it


def quantile(ordered: Sequence[float], share: float) -> float:
    """The least value that this share of them does not exceed. `ordered` is sorted, and not empty."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def percentiles(values: Sequence[float], shares: Mapping[str, float]) -> dict[str, float] | None:
    """These, with `max` and `mean`. None where there is nothing to measure: 0 would be read as quick."""
    if not len(values):
        return None
    ordered = sorted(values)
    figures = {name: quantile(ordered, share) for name, share in shares.items()}
    figures |= {"max": ordered[-1], "mean": math.fsum(ordered) / len(ordered)}
    return {name: round(value, 6) for name, value in figures.items()}


@dataclass(kw_only=True)
class Figures:
    """Filled by the world as it goes; whole when it has ended."""

    calls: int = 0
    failed: Counter[str] = field(default_factory=Counter)  # by error
    outstanding: int = 0  # not answered when the trace ended
    latencies: array[float] = field(
        default_factory=lambda: array("d")
    )  # of calls that succeeded, in the order of their answers
    waits: array[float] = field(default_factory=lambda: array("d"))  # of the same: until their method began
    samples: list[Sample] = field(default_factory=list)
    wanted_at_first: int = 0
    fewest_healthy: int = 0  # at any moment, not only when samples were taken
    events: list[ScaleEvent] = field(default_factory=list)
    decisions: Counter[str] = field(default_factory=Counter)  # evaluations of the policy, by the rule that decided
    replica_seconds: float = 0.0  # of processes, from launch to end: what is paid for
    busy_seconds: float = 0.0  # of their room that was in use
    batches: Mapping[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # what the model leaves out here

    def told(self, price: float | None = None) -> dict[str, Any]:
        """As `forge simulate --json` prints it; times in seconds."""
        running = [latency - wait for latency, wait in zip(self.latencies, self.waits, strict=True)]
        samples = self.samples
        wanted = [self.wanted_at_first, *(event.wanted for event in self.events)]
        longest = max(samples, key=lambda sample: sample.queued_most, default=None)
        return {
            "calls": self.calls,
            "succeeded": len(self.latencies),
            "failed": self.failed.total(),
            "errors": dict(self.failed.most_common()),
            "outstanding_at_end": self.outstanding,
            "latency_s": percentiles(self.latencies, PERCENTILES),
            "waiting_s": percentiles(self.waits, PERCENTILES),
            "running_s": percentiles(running, PERCENTILES),
            "replica_seconds": round(self.replica_seconds, 3),
            "cost": None if price is None else round(self.replica_seconds / HOUR_S * price, 6),
            "replicas": {
                "fewest": min(wanted),
                "most": max(wanted),
                "at_end": wanted[-1],
                "fewest_healthy": self.fewest_healthy,
            },
            "queue": {
                "longest": longest.queued_most if longest else 0,
                "at_s": longest.at if longest and longest.queued_most else None,
            },
            "batches": dict(self.batches),
            "scale_events": [event._asdict() for event in self.events],
            "decisions": dict(self.decisions.most_common()),
            "samples": [sample._asdict() for sample in samples],
            "notes": self.notes,
        }
