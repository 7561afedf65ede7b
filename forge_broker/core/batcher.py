"""Where calls wait to be batched (B1–B3): one lane for those that may share a batch, and when a lane has one to give.

A batch does not exist before it leaves: its calls wait in their lane, cancelled and ordered like any others, until the lane is *ripe*
and a replica has room; what comes while all are busy still fills it. `dispatch` asks `ripe` and takes the batch, which is in flight from
then on. Calls of sessions that share batches (`batch_sessions`) wait where all calls of their replica do, for their order; `next_of` finds
batches among them. Why each was flushed, how large it was and how long its first call waited is counted here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from math import inf
from typing import Any, Final

from forge_broker.core.queues import Queue
from forge_broker.core.requests import Request

LANES_AT_MOST: Final = 256  # of one endpoint, that are kept when they are empty; keys may be many
SHARE_OF_PATIENCE: Final = 0.5  # of a call's timeout that may pass before its batch leaves: the rest is to run in

LOOKED_AT: Final = 4  # sizes of a batch: how far into a replica's queue company is looked for

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
        self.sessions: bool = bool(options.get("batch_sessions"))
        self.lanes: dict[tuple[int, Any, bool], Lane] = {}  # by shape, key and trust
        self.length = 0  # calls in all of them
        self.stats = BatchStats()

    def __repr__(self) -> str:
        return f"<Batcher {self.name} {self.length} waiting in {len(self.lanes)} lanes>"

    def patience(self, request: Request) -> tuple[float, str]:
        """Until when this call waits for company, and what has passed then."""
        due, why = request.queued_at + self.timeout_s, "timeout"
        if request.deadline is not None:
            half = request.queued_at + (request.deadline - request.queued_at) * SHARE_OF_PATIENCE
            if half < due:
                due, why = half, "deadline"
        return due, why

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

    __slots__ = ("batcher", "flush_at", "kind", "weight", "why")

    def __init__(self, batcher: Batcher, kind: tuple[int, Any, bool]) -> None:
        super().__init__(f"{batcher.name} batches")
        self.batcher = batcher
        self.kind = kind
        self.weight = 0.0  # of all its calls
        self.flush_at = inf
        self.why = ""  # of `flush_at`

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
        most, heaviest = self.batcher.size, self.batcher.max_weight
        if heaviest < inf:
            # Added up anew: `weight` is a running sum, and after 1e18 has come and gone it knows nothing of the small ones.
            weight = 0.0
            for at, request in zip(range(most), self, strict=False):
                weight += _weight(request)
                if weight > heaviest and at:
                    most = at
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
        due, why = self.batcher.patience(request)
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


def lane_of(request: Request) -> Lane | None:
    """Where a call that is batched waits, or would; None: it runs by itself (S4)."""
    batcher: Batcher | None = request.endpoint.batcher
    if batcher is None or request.gather is not None or (request.session is not None and not batcher.sessions):
        return None
    return batcher.lane_of(request)


def next_of(waiting: Iterable[Request], now: float) -> tuple[list[Request], Lane | None, str, float]:
    """Of the calls that wait for one replica, in order: those that are to leave now, the lane they are a batch of (None: one that runs by
    itself) and why; none, and when to look again, while all wait for company. Each session's calls keep their order.
    """
    found: dict[int, tuple[Lane, list[Request]]] = {}
    place: dict[str, int] = {}  # session → the lane that its calls wait in here; 0: none after them may go before
    looked = 0
    for request in waiting:
        lane = lane_of(request)
        session = request.session
        if session is not None and session in place and (lane is None or place[session] != id(lane)):
            place[session] = 0
            continue
        if lane is None:
            return [request], None, "", inf
        batcher = lane.batcher
        _, members = found.setdefault(id(lane), (lane, []))
        if members and sum(map(_weight, members)) + _weight(request) > batcher.max_weight:
            return members, lane, "weight", inf
        members.append(request)
        if session is not None:
            place[session] = id(lane)
        if len(members) == batcher.size:
            return members, lane, "size", inf
        looked += 1
        if looked > LOOKED_AT * batcher.size:
            break
    again = inf
    for lane, members in found.values():
        due, why = min(map(lane.batcher.patience, members))
        if due <= now or lane.batcher.eager:
            return members, lane, why if due <= now else "eager", inf
        again = min(again, due)
    return [], None, "", again
