"""What the figures of a service cost the broker's core: rounds of calls that are counted, in turn with rounds of calls that are not.

Counted is how long each call waited and ran (histograms of its endpoint and its replica), and how many ended how, in what time, on its
replica. Left in both is one addition for each outcome in an envelope. Snapshots are made once a second and are no part of a call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from bench.core_alone import ENVELOPE, ENVELOPES, LONE, rounds, serving, settle_memory
from bench.effort import Effort, Figures
from forge_broker.core import replies
from forge_broker.core.stats import ReplicaStats

PAIRS = 8  # for each run: neighbours come and go within a second


@contextmanager
def uncounted() -> Iterator[None]:
    def nothing(*_: Any) -> None:
        pass

    with mock.patch.object(replies, "add", nothing), mock.patch.object(ReplicaStats, "ended", nothing):
        yield


def counting_cost(effort: Effort) -> Figures:
    """Microseconds of the core for a call, and how many of them are counting: in envelopes of `ENVELOPE`, and alone in one. The difference
    of two times of a shared machine may come out below 0."""
    found: Figures = {}
    for name, length, count in (("packed", ENVELOPE, effort.of(ENVELOPES)), ("lone", 1, effort.of(LONE))):
        core, client, endpoint, workers = serving(2)
        settle_memory()

        def used() -> float:
            return rounds(core, client, workers, [client.calls(endpoint, length) for _ in range(count)])  # noqa: B023

        used()  # warms up
        for _ in range(effort.runs):
            counted = bare = 0.0
            for _ in range(PAIRS):
                counted += used()
                with uncounted():
                    bare += used()
            calls = PAIRS * count * length
            found.setdefault(f"{name}_us", []).append(counted / calls * 1e6)
            found.setdefault(f"{name}_counting_us", []).append((counted - bare) / calls * 1e6)
    return found
