"""A request: one call of one endpoint, from acceptance to its one reply.

On the hot path its state *is* the container that holds it (C3): a queue (QUEUED), a batcher's lane (BATCHED), the ledger under a replica
(IN_FLIGHT), none (over). `MOVES` is the table that `invariants` checks and that people read. Every accepted request is in its client's
`calls` until it is answered; one that was answered early (timeout, cancellation) stays in the ledger until its
replica has really ended it, because only then is the room free (F5).
"""

from __future__ import annotations

import enum
from itertools import accumulate, islice, repeat
from typing import Any, Final

from forge_contract.framing import Payload


class State(enum.Enum):
    QUEUED = "queued"
    BATCHED = "batched"
    IN_FLIGHT = "in flight"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


class Move(enum.Enum):
    BATCH = "joins a batch"
    DISPATCH = "is dispatched"
    REPLY = "is answered"
    ERROR = "fails"
    REPLICA_LOST = "loses its replica"
    CANCEL = "is cancelled"
    TIMEOUT = "runs out of time"


MOVES: Final[dict[State, dict[Move, State]]] = {
    State.QUEUED: {
        Move.BATCH: State.BATCHED,
        Move.DISPATCH: State.IN_FLIGHT,
        Move.ERROR: State.FAILED,
        Move.CANCEL: State.CANCELLED,
        Move.TIMEOUT: State.EXPIRED,
    },
    State.BATCHED: {
        Move.DISPATCH: State.IN_FLIGHT,
        Move.ERROR: State.FAILED,
        Move.CANCEL: State.CANCELLED,
        Move.TIMEOUT: State.EXPIRED,
    },
    State.IN_FLIGHT: {
        Move.REPLY: State.DONE,
        Move.ERROR: State.FAILED,
        Move.REPLICA_LOST: State.QUEUED,  # which joins a batch from there, if it did before
        Move.CANCEL: State.CANCELLED,
        Move.TIMEOUT: State.EXPIRED,
    },
    State.DONE: {},
    State.FAILED: {},
    State.CANCELLED: {},
    State.EXPIRED: {},
}


class Request:
    """One call. Made once per call on the hot path, hence slots and no defaults that need a call."""

    __slots__ = (
        "answered",
        "attempt",
        "batch",
        "batching",
        "client",
        "deadline",
        "deaths",
        "endpoint",
        "gather",
        "hints",
        "holder",
        "id",
        "parts",
        "payload",
        "priority",
        "queued_at",
        "rank",
        "session",
        "size",
        "started_at",
        "trusted",
    )

    def __init__(self, id: int, client: Any, endpoint: Any, payload: Payload, size: int, now: float) -> None:
        self.id = id
        self.client = client  # clients.Client
        self.endpoint = endpoint  # services.Endpoint
        self.payload = payload
        self.size = size  # bytes
        self.trusted: bool = client.trusted
        self.queued_at = now
        self.started_at = 0.0  # of the current attempt
        self.attempt = 0
        self.deaths = 0  # of replicas that died by themselves while they ran it: it is a suspect (F4)
        self.answered = False
        self.holder: Any = None  # the Queue or the Replica that has it
        self.deadline: float | None = None
        self.session: str | None = None
        self.priority = 0
        self.hints: dict[str, Any] | None = None
        self.rank: int | None = None  # only this rank of an actor's mesh
        self.parts: dict[int, tuple[int, Payload, bool]] | None = None  # by rank, when several answer
        self.gather: Gather | None = None  # the fan-out this is a part of
        self.batch: Batch | None = None  # that it is in flight with
        self.batching: tuple[int, Any, float] | None = None  # call shape, key, weight, where it says any (B2)

    def is_of(self, session: str) -> bool:
        return self.session == session


class Gather:
    """A fan-out under way: fixed targets, one reply made of their parts (A5). Stands in `Client.calls` for all of them."""

    __slots__ = ("children", "client", "deadline", "endpoint", "id", "parts", "payload", "queued_at", "size")

    def __init__(self, id: int, client: Any, endpoint: Any, payload: Payload, size: int, now: float) -> None:
        self.id = id
        self.client = client
        self.endpoint = endpoint
        self.payload = payload  # which the parts share
        self.size = size  # bytes
        self.queued_at = now
        self.deadline: float | None = None
        self.children: dict[int, Request] = {}  # replica idx → the part still awaited
        self.parts: dict[tuple[int, int], tuple[int, Payload, bool]] = {}  # (replica, rank) → status, payload, trusted


class Batch:
    """Calls that take one unit of room together (B2): it is free again when the last of them has ended."""

    __slots__ = ("open",)

    def __init__(self, size: int) -> None:
        self.open = size  # of its calls, in flight

    def ended(self, count: int) -> int:
        """So many of its calls have ended: the units of room that are free by it."""
        self.open -= count
        return not self.open


class Slice:
    """Calls of one envelope that go one way, held as one (C2): of one client to one endpoint, with nothing but small arguments, never tried
    before. It waits in its endpoint's queue, or is in flight on one replica; in flight its calls may be of `sessions` that live there, or a
    batch, with `batching` as its Requests would have it. A Slice stands for each of them in `Client.calls`, and in the ledger.

    Who needs one in flight by itself splits it first (`Client.call`, `Ledger.of`): they are Requests from then on. One that waits is not
    split for that, as a queue has no places between: it gives Requests that are `shown` for its calls and in no book, by which they can be
    looked at, answered, and taken out of the queue.
    """

    __slots__ = (
        "_at",
        "_ids",
        "_packed",
        "_sessions_by_id",
        "_sizes",
        "_start",
        "_starts",
        "batch",
        "batching",
        "client",
        "endpoint",
        "held",
        "holder",
        "left",
        "queued_at",
        "sessions",
        "started_at",
    )

    attempt = 0  # while it waits

    def __init__(self, ids: list[int], sizes: list[int], packed: bytes, client: Any, endpoint: Any, now: float) -> None:
        self.client = client
        self.endpoint = endpoint
        self.holder: Any = None  # the Queue or the Replica that has it
        self.held: dict[int, Request | Slice] = {}  # what the ledger has of that replica
        self.queued_at = now
        self.started_at = 0.0
        self.batch: Batch | None = None
        self.batching: tuple[int, Any, float] | None = None
        self.sessions: list[str] | None = None  # of each of its calls, as they came
        self.left = dict(zip(ids, sizes, strict=True))  # not ended: id → bytes of its arguments
        self._ids = ids
        self._sizes = sizes
        self._packed = packed  # all their arguments
        self._at = 0  # in `_ids` and `_sizes`: those before have been taken
        self._start = 0  # in `_packed`, the same
        self._starts: dict[int, int] | None = None  # in `_packed`, by id, once somebody has looked at one by itself
        self._sessions_by_id: dict[int, str] | None = None  # once they do not end together

    def is_of(self, session: str) -> bool:
        """Whether one of those left is."""
        sessions = self.sessions
        return sessions is not None and any(
            key in self.left for key, one in zip(self._ids, sessions, strict=True) if one == session
        )

    def sessions_of(self, ids: list[int]) -> list[str]:
        """Of these of its calls. Where it has `sessions`."""
        sessions = self.sessions
        assert sessions is not None
        if ids == self._ids:  # mostly: what left in one envelope comes back in one
            return sessions
        by_id = self._sessions_by_id
        if by_id is None:
            by_id = self._sessions_by_id = dict(zip(self._ids, sessions, strict=True))
        return [by_id[key] for key in ids]

    @property
    def place(self) -> int:
        """Its key in a queue: of none of its calls, nor of any other."""
        return ~self._ids[0]

    def columns(self) -> tuple[list[int], list[int], bytes]:
        """Ids, sizes and arguments of one that nobody has taken anything of."""
        return self._ids, self._sizes, self._packed

    def take(self, count: int) -> Slice:
        """The first `count` of those left, fewer if there are not so many, as one that nobody holds yet. For one that waits."""
        left, start = self.left, self._start
        ids = self._ids[self._at : self._at + count]
        if len(left) == len(self._ids) - self._at:  # none was cancelled
            sizes = self._sizes[self._at : self._at + count]
            self._at += count
            self._start = end = start + sum(sizes)
            packed = self._packed[start:end]
        else:
            ids = list(islice(left, count))
            sizes = [left[key] for key in ids]
            packed = b"".join(self._payload(key) for key in ids)
        for key in ids:
            del left[key]
        return Slice(ids, sizes, packed, self.client, self.endpoint, self.queued_at)

    def shown(self) -> list[Request]:
        """A Request for each that is left, in no book. For one that waits."""
        return [self.show(key) for key in self.left]

    def show(self, key: int) -> Request:
        request = Request(key, self.client, self.endpoint, self._payload(key), self.left[key], self.queued_at)
        request.holder = self.holder
        return request

    def _payload(self, key: int) -> bytes:
        starts = self._starts
        if starts is None:  # looked at for the first time
            ends = accumulate(self._sizes[self._at :], initial=self._start)
            starts = self._starts = dict(zip(self._ids[self._at :], ends, strict=False))
        start = starts[key]
        return self._packed[start : start + self.left[key]]

    def split(self) -> None:
        """Those that are left, each by itself from now on. For one in flight."""
        calls = self.client.calls
        at = 0
        for key, size, session in zip(self._ids, self._sizes, self.sessions or repeat(None), strict=False):
            start, at = at, at + size
            if key in self.left:
                request = Request(key, self.client, self.endpoint, self._packed[start:at], size, self.queued_at)
                request.started_at = self.started_at
                request.attempt = 1
                request.holder = self.holder
                request.batch = self.batch
                request.batching = self.batching
                request.session = session
                calls[key] = self.held[key] = request
        self.left = {}
