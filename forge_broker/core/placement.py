"""Where the ranks of a replica go: a pure function from what is idle and what may be launched to a plan, or to a reason.

`lifecycle` asks it whenever something became free, and carries the plan out. Idle workers first (X2), all ranks of a replica or none.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple


class Need(NamedTuple):
    procs: int  # ranks; per host when `hosts` is given
    hosts: int | None
    gpus_per_rank: int


class Idle(NamedTuple):
    name: str
    host: str
    gpus: tuple[str, ...]


class Seat(NamedTuple):
    """Where one rank goes: an idle worker, or a launch with these GPUs."""

    host: str
    gpus: tuple[str, ...]
    worker: str | None  # None: launch


class Pending(NamedTuple):
    why: str


def place(
    need: Need, idle: Sequence[Idle], here: str, free_gpus: Sequence[str], free_processes: int
) -> list[Seat] | Pending:
    """Seats in rank order, or why there are none. `here`: the broker's own host, the only one where it can launch."""
    by_host: dict[str, list[Seat]] = defaultdict(list)
    for worker in idle:
        if len(worker.gpus) == need.gpus_per_rank:
            by_host[worker.host].append(Seat(worker.host, worker.gpus, worker.name))
    by_host[here] += _launches(need, here, free_gpus, free_processes)
    # The host with the most seats first, so that the ranks of a replica are close to each other; among equals the one with
    # the most idle workers, so that nothing is launched while somebody idles.
    hosts = sorted(
        by_host.items(), key=lambda item: (-len(item[1]), -sum(bool(seat.worker) for seat in item[1]), item[0])
    )
    if need.hosts is None:
        seats = [seat for _, seats in hosts for seat in seats]
        if len(seats) >= need.procs:
            return seats[: need.procs]
        return Pending(_why(need, need.procs, len(seats), idle, free_gpus, free_processes))
    fitting = [seats for _, seats in hosts if len(seats) >= need.procs]
    if len(fitting) >= need.hosts:
        return [seat for seats in fitting[: need.hosts] for seat in seats[: need.procs]]
    return Pending(
        f"needs {need.procs} ranks on each of {need.hosts} hosts; {len(fitting)} have room for them "
        "(start `forge worker` on the others)"
    )


def _launches(need: Need, here: str, free_gpus: Sequence[str], free_processes: int) -> list[Seat]:
    wanted = need.gpus_per_rank
    count = free_processes if wanted == 0 else min(free_processes, len(free_gpus) // wanted)
    return [Seat(here, tuple(free_gpus[n * wanted : (n + 1) * wanted]), None) for n in range(min(count, need.procs))]


def _why(
    need: Need, wanted: int, found: int, idle: Sequence[Idle], free_gpus: Sequence[str], free_processes: int
) -> str:
    gpus = need.gpus_per_rank
    each = f" with {gpus} GPU{'s' if gpus > 1 else ''}{' each' if wanted > 1 else ''}" if gpus else ""
    fitting = sum(len(worker.gpus) == gpus for worker in idle)
    left = f"{free_processes} processes below max_workers"
    if gpus:
        left = f"{len(free_gpus)} GPUs free, {left}"
    return (
        f"needs {wanted} worker{'s' if wanted > 1 else ''}{each}: {fitting} fitting ones are idle, "
        f"{found - fitting} more can be launched here ({left}); start `forge worker` where there is room"
    )
