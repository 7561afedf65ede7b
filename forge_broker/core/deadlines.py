"""What has to be looked at, and when: one heap for the whole broker, cancelled lazily.

An entry says what to look at, not what to do: whoever is woken looks at the object as it is then, so nothing has to be
removed when a call is answered or a peer speaks (trio's Deadlines do the same).
"""

from __future__ import annotations

import enum
import heapq
from collections.abc import Callable, Iterator
from typing import Any


class Kind(enum.Enum):
    LINK = "a link owes an ack or waits for one"
    SILENCE = "a peer has been silent for long"
    CALL = "a call's time is up"
    AHEAD = "calls wait, or were sent ahead, and nobody has room"
    BATCH = "a batch has waited for its first call's patience"
    NO_REPLICA = "calls wait for a healthy replica"
    START = "a replica takes long to start"
    RESTART = "a replica may be tried again"
    KILL = "a worker told to stop has not"
    SESSION = "a session may be unused"
    METRICS = "metrics are due"
    RECOVERED = "the recovery window is over"
    HANG = "a call runs for long"
    SLOT = "a slot kept for a worker's successor"
    SCALE = "a service may have too few replicas, or too many"
    SPARE = "a spare may be made, or one takes long to import"
    UNREAD = "results of a worker that is gone may have been read"


class Deadlines:
    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Kind, Any]] = []
        self._count = 0  # breaks ties in the order of adding; kinds and keys do not compare

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, when: float, kind: Kind, key: Any) -> None:
        self._count += 1
        heapq.heappush(self._heap, (when, self._count, kind, key))

    def prune(self, keep: Callable[[Kind, Any], bool]) -> None:
        """Forget what need not be looked at any more; whoever adds much that is soon out of date calls this now and then."""
        self._heap = [entry for entry in self._heap if keep(entry[2], entry[3])]
        heapq.heapify(self._heap)

    def next(self) -> float | None:
        return self._heap[0][0] if self._heap else None

    def due(self, now: float) -> Iterator[tuple[Kind, Any]]:
        """Take out what is due. What is added meanwhile, at `now` or before, comes with it."""
        while self._heap and self._heap[0][0] <= now:
            _, _, kind, key = heapq.heappop(self._heap)
            yield kind, key
