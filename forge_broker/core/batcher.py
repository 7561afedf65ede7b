"""Where calls wait to be batched (B1–B3): one lane for those that may share a batch, and when a lane has one to give.

A batch does not exist before it leaves: its calls wait in their lane, cancelled and ordered like any others, until the lane is *ripe*
and a replica has room; what comes while all are busy still fills it. `dispatch` asks `ripe` and takes the batch, which is in flight from
then on. Why each was flushed, how large it was and how long its first call waited is counted here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import inf
from typing import Any, Final

from forge_broker.core.queues import Queue
from forge_broker.core.requests import Request

LANES_AT_MOST: Final = 256  # of one endpoint, that are kept when they are empty; keys may be many
SHARE_OF_PATIENCE: Final = 0.5  # of a call's timeout that may pass before its batch leaves: the rest is to run in

PLAIN: Final = (0, None, 1.0)
"""Shape, key and weight of a call that says nothing."""


class BatchStats:
    """Batches of one endpoint that have left."""

    __slots__ = ("items", "reasons", "sizes", "waited_s")

    def __init__(self) -> None:
        self.reasons: Counter[str] = Counter()
        self.sizes: Counter[int] = Counter()  # by the power of two that is not below
        self.items = 0
        self.waited_s = 0.0  # of each batch's first call, all together

    def left(self, reason: str, size: int, waited_s: float, count: int = 1) -> None:
        self.reasons[reason] += count
        self.sizes[1 << (size - 1).bit_length()] += count
        self.items += size * count
        self.waited_s += waited_s * count

    def snapshot(self) -> dict[str, Any]:
        batches = self.reasons.total()
        return {
            "batches": batches,
            "items": self.items,
            "avg_size": self.items / batches if batches else 0.0,
            "avg_wait_s": self.waited_s / batches if batches else 0.0,
            "reasons": dict(self.reasons),
            "sizes": {str(size): count for size, count in sorted(self.sizes.items())},
        }


class Batcher:
    """The lanes of one endpoint. `timeout_s`: seconds after a batch's first call."""

    def __init__(self, name: str, options: dict[str, Any]) -> None:
        self.name = name
        self.size: int = options["batch_size"]
        self.timeout_s: float = options.get("batch_timeout", 0.01)
        self.max_weight: float = options.get("batch_max_weight") or inf
        self.eager: bool = bool(options.get("batch_eager"))
        self.lanes: dict[tuple[int, Any, bool], Lane] = {}  # by shape, key and trust
        self.length = 0  # calls in all of them
        self.stats = BatchStats()

    def __repr__(self) -> str:
        return f"<Batcher {self.name} {self.length} waiting in {len(self.lanes)} lanes>"

    def lane_of(self, request: Request) -> Lane:
        """Where this call waits."""
        shape, key, _ = request.batching or PLAIN
        return self.lane(shape, key, request.trusted)

    def lane(self, shape: int, key: Any, trusted: bool) -> Lane:
        found = self.lanes.get((shape, key, trusted))
        if found is None:
            found = self.lanes[shape, key, trusted] = Lane(self, (shape, key, trusted))
        return found


class Lane(Queue):
    """Calls that may share a batch. `flush_at`: when the first of them has waited long enough, inf while there is none."""

    __slots__ = ("batcher", "flush_at", "kind", "timer_at", "weight", "why")

    def __init__(self, batcher: Batcher, kind: tuple[int, Any, bool]) -> None:
        super().__init__(f"{batcher.name} batches")
        self.batcher = batcher
        self.kind = kind
        self.weight = 0.0  # of all its calls
        self.flush_at = inf
        self.why = ""  # of `flush_at`
        self.timer_at = inf  # when the deadline heap will look at it

    def ripe(self, now: float) -> str:
        """Why a batch is to leave now: "size", "weight", "timeout", "deadline", "drain", "loss", "eager". Empty: none is."""
        batcher = self.batcher
        if self.length >= batcher.size:
            return "size"
        if self.weight >= batcher.max_weight:
            return "weight"
        if self.flush_at <= now:
            return self.why
        return "eager" if batcher.eager and self.length else ""

    def hurry(self, why: str, now: float) -> None:
        """What is here has waited enough."""
        if self.length and self.flush_at > now:
            self.flush_at, self.why = now, why

    def batch(self) -> list[Request]:
        """Take out the next one: as many as the size and the weight allow, and at least one call."""
        most = self.batcher.size
        if self.weight > self.batcher.max_weight:
            weight = 0.0
            for at, request in enumerate(self):
                weight += _weight(request)
                if weight > self.batcher.max_weight and at:
                    most = min(most, at)
                    break
        return self.take(most)

    # A queue's ways in and out, with what a lane counts.

    def push(self, request: Request) -> None:
        super().push(request)
        self.batcher.length += 1
        self.weight += _weight(request)
        self._expect(request)

    def push_front(self, requests: Sequence[Request]) -> None:
        super().push_front(requests)
        self.batcher.length += len(requests)
        self.weight += sum(map(_weight, requests))
        for request in requests:
            self._expect(request)

    def pop(self) -> Request:
        request = super().pop()
        self._left([request])
        return request

    def take(self, count: int) -> list[Request]:
        taken = super().take(count)
        self._left(taken)
        return taken

    def remove(self, request: Request) -> None:
        super().remove(request)
        self._left([request])

    def drain(self) -> list[Request]:
        found = super().drain()
        self._left(found)
        return found

    def _expect(self, request: Request) -> None:
        due, why = request.queued_at + self.batcher.timeout_s, "timeout"
        if request.deadline is not None:
            patience_s = (request.deadline - request.queued_at) * SHARE_OF_PATIENCE
            if request.queued_at + patience_s < due:
                due, why = request.queued_at + patience_s, "deadline"
        if due < self.flush_at:
            self.flush_at, self.why = due, why

    def _left(self, requests: list[Request]) -> None:
        self.batcher.length -= len(requests)
        self.weight -= sum(map(_weight, requests))
        if not self.length:
            self.weight = 0.0  # and not what rounding has left
            if len(self.batcher.lanes) > LANES_AT_MOST:
                self.batcher.lanes.pop(self.kind, None)
        if self.length < self.batcher.size:  # a full lane is ripe whatever the time
            self.flush_at, self.why = inf, ""
            for request in self:
                self._expect(request)


def _weight(request: Request) -> float:
    return 1.0 if request.batching is None else request.batching[2]
