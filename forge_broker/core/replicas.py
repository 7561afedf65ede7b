"""A replica: the workers of one group of ranks acting as one, its life as a table, and the pool that routers choose from.

`lifecycle` moves replicas along the table; `dispatch` tells the pool how their loads change. What a replica holds is in
the ledger; who its workers are, in `workers`.
"""

from __future__ import annotations

import enum
from typing import Any, Final

from forge_broker.core.queues import Queue
from forge_broker.core.stats import ReplicaStats
from forge_contract.routing import Pool


class ReplicaState(enum.Enum):
    """The names users see."""

    UNINITIALIZED = "UNINITIALIZED"  # pending or loading for the first time
    HEALTHY = "HEALTHY"
    RECOVERING = "RECOVERING"  # lost, on its way back
    UNHEALTHY = "UNHEALTHY"  # keeps dying; tried ever more slowly
    DRAINING = "DRAINING"  # told to stop, finishing
    STOPPED = "STOPPED"


class ReplicaMove(enum.Enum):
    READY = "all its ranks are ready"
    LOST = "a rank is lost"
    GIVE_UP = "it keeps dying"
    TRY_AGAIN = "it is tried again"
    STOP = "it is told to stop"
    STOPPED = "its last worker is gone"
    RETURN = "its last worker is gone, and it starts anew"


MOVES: Final[dict[ReplicaState, dict[ReplicaMove, ReplicaState]]] = {
    ReplicaState.UNINITIALIZED: {
        ReplicaMove.READY: ReplicaState.HEALTHY,
        ReplicaMove.LOST: ReplicaState.RECOVERING,
        ReplicaMove.STOP: ReplicaState.DRAINING,
    },
    ReplicaState.HEALTHY: {
        ReplicaMove.LOST: ReplicaState.RECOVERING,
        ReplicaMove.STOP: ReplicaState.DRAINING,
    },
    ReplicaState.RECOVERING: {
        ReplicaMove.READY: ReplicaState.HEALTHY,
        ReplicaMove.LOST: ReplicaState.RECOVERING,
        ReplicaMove.GIVE_UP: ReplicaState.UNHEALTHY,
        ReplicaMove.STOP: ReplicaState.DRAINING,
    },
    ReplicaState.UNHEALTHY: {
        ReplicaMove.TRY_AGAIN: ReplicaState.RECOVERING,
        ReplicaMove.STOP: ReplicaState.DRAINING,
    },
    ReplicaState.DRAINING: {
        ReplicaMove.LOST: ReplicaState.DRAINING,
        ReplicaMove.STOP: ReplicaState.DRAINING,
        ReplicaMove.STOPPED: ReplicaState.STOPPED,
        ReplicaMove.RETURN: ReplicaState.RECOVERING,
    },
    ReplicaState.STOPPED: {},
}


LEAVING: Final = "leaving"
ALONE: Final = "alone"

AHEAD_AT_MOST: Final = 512  # calls that wait at a replica, beyond those that it runs


class Pace:
    """How fast a replica ends what it is given, for `ahead`."""

    __slots__ = ("crowded", "ended", "recalled", "seen")

    def __init__(self) -> None:
        self.ended = 0  # units of room, ever
        self.seen = 0  # of them, when somebody looked last
        self.crowded = False  # it had more than it runs at once, then
        self.recalled = False  # it was told to give them back

    def since_last_look(self) -> int:
        since, self.seen = self.ended - self.seen, self.ended
        return since


class Replica:
    """One replica over all its epochs. The properties below `name` are the view that routers see (R2)."""

    __slots__ = (
        "_name",
        "active",
        "answered_before",
        "closed",
        "comes_back",
        "deaths",
        "epoch",
        "hang_watches",
        "healthy_at",
        "idx",
        "key",
        "last_error",
        "limit",
        "master",
        "pace",
        "parked",
        "pending_why",
        "pool",
        "ranks",
        "restarts",
        "room",
        "seats",
        "service",
        "sessions",
        "started_at",
        "state",
        "stats",
    )

    def __init__(self, service: Any, key: int, idx: int, world: int, limit: int, now: float) -> None:
        self.service = service
        self.key = key  # unique in the broker, for the ledger
        self.idx = idx
        self.limit = limit  # calls at once
        self.room = limit  # calls that it may have: more, while some are sent ahead
        self.pace = Pace()
        self.epoch = 1
        self.hang_watches: set[int] = set()  # endpoints whose running calls are looked after (`hang_timeout_s`)
        self.state = ReplicaState.UNINITIALIZED
        self.ranks: list[Any] = [None] * world  # workers.Worker
        # Why it gets nothing new though it is HEALTHY: LEAVING, a worker of this epoch gave calls back and will be gone;
        # ALONE, it is kept for a suspect (F4).
        self.closed = ""
        self.comes_back = False  # DRAINING: it starts anew when the last of its workers is gone
        self.active = 0  # calls in flight; the ledger's count, kept here because routers ask for every call
        self.sessions = 0  # pinned here
        self.master: tuple[str, int] | None = None  # rank 0's rendezvous of this epoch
        self.started_at = now  # of this epoch's start
        self.healthy_at = 0.0
        self.answered_before = 0  # calls, when it became HEALTHY
        self.seats: list[Any] = []  # placement.Seat by rank, of this epoch
        self.pending_why = ""  # why it could not be placed, while it cannot
        self.deaths = 0  # in a row, without having been HEALTHY for a while
        self.restarts = 0
        self.last_error = ""
        self._name = f"{service.name}/{idx}"
        self.parked = Queue(f"{self._name} parked", self)
        self.stats = ReplicaStats(now)
        self.pool: ReplicaPool | None = None  # while HEALTHY

    @property
    def name(self) -> str:
        return self._name

    def __repr__(self) -> str:
        return f"<Replica {self._name} {self.state.value} {self.active}/{self.limit} in flight>"

    @property
    def leaving(self) -> bool:
        """For good: not to start anew."""
        return self.state in (ReplicaState.DRAINING, ReplicaState.STOPPED) and not self.comes_back

    def ranks_for(self, rank: int | None) -> list[Any]:
        """The workers that run a call: every rank, or the one it is meant for."""
        ranks = self.ranks if rank is None else self.ranks[rank : rank + 1]
        return [worker for worker in ranks if worker is not None]

    def move(self, move: ReplicaMove) -> None:
        """Along the table; an impossible move is a bug and says so with everything it knows."""
        after = MOVES[self.state].get(move)
        if after is None:
            raise RuntimeError(f"{self!r} of epoch {self.epoch} cannot take the move {move.value!r}")
        self.state = after

    @property
    def healthy(self) -> bool:
        return self.state is ReplicaState.HEALTHY

    @property
    def has_room(self) -> bool:
        return self.active < self.room and self.state is ReplicaState.HEALTHY and not self.closed

    @property
    def current_load(self) -> int:
        return self.active + self.parked.length

    @property
    def most(self) -> int:
        """So many calls it never has more than."""
        return self.limit + (AHEAD_AT_MOST if self.service.ahead_s else 0)

    @property
    def free(self) -> int:
        return self.room - self.active if self.has_room else 0

    # Of what it has, it runs so many; the others wait there for it, as those do that are parked here.

    @property
    def active_requests(self) -> int:
        return min(self.active, self.limit)

    @property
    def queue_depth(self) -> int:
        return self.parked.length + max(0, self.active - self.limit)

    @property
    def max_concurrent_requests(self) -> int:
        return self.limit

    @property
    def capacity_utilization(self) -> float:
        return self.active_requests / self.limit


class ReplicaPool(Pool):
    """The healthy replicas of a service. Who has room is a set of bits by idx, one set per load, so that the questions of
    the built-in routers cost the same for 2 replicas and for 1,000: a shift and a lowest bit, not a scan."""

    __slots__ = ("_at", "_by_load", "_lowest", "_views", "members", "roomy")

    def __init__(self, limit: int) -> None:
        self.members: tuple[int, ...] = ()
        self.roomy = 0  # bit idx: that replica has room
        self._views: list[Replica] = []
        self._at: dict[int, Replica] = {}
        self._by_load = [0] * (limit + AHEAD_AT_MOST + 1)  # of those with room
        self._lowest = 0  # no level below it has a bit

    def __getitem__(self, position: Any, /) -> Any:
        return self._views[position]

    def __iter__(self) -> Any:
        return iter(self._views)

    def __repr__(self) -> str:
        return f"<ReplicaPool {len(self._views)} healthy, {self.roomy.bit_count()} with room>"

    def admit(self, replica: Replica) -> None:
        self._at[replica.idx] = replica
        replica.pool = self
        replica.room = replica.limit
        replica.pace = Pace()
        self._rebuild()
        self.open(replica)

    def remove(self, replica: Replica) -> None:
        if replica.pool is None:
            return
        del self._at[replica.idx]
        replica.pool = None
        self._clear(replica)
        self._rebuild()

    def close(self, replica: Replica, why: str) -> None:
        """It stays among the healthy, but has no room until it is opened or admitted anew."""
        replica.closed = why
        self._clear(replica)

    def open(self, replica: Replica) -> None:
        replica.closed = ""
        if replica.active < replica.room:
            self._set(replica.idx, replica.active)

    def resize(self, replica: Replica, room: int) -> None:
        """From now on it may have so many calls, at least `limit`; it may have more already."""
        before, replica.room = replica.room, room
        if replica.closed:
            return
        bit = 1 << replica.idx
        if replica.active < before:
            self._by_load[replica.active] ^= bit
            self.roomy ^= bit
        if replica.active < room:
            self._set(replica.idx, replica.active)

    def _clear(self, replica: Replica) -> None:
        bit = ~(1 << replica.idx)
        self.roomy &= bit
        self._by_load = [level & bit for level in self._by_load]

    def _rebuild(self) -> None:
        self._views = sorted(self._at.values(), key=lambda replica: replica.idx)
        self.members = tuple(replica.idx for replica in self._views)

    def _set(self, idx: int, load: int) -> None:
        bit = 1 << idx
        self.roomy |= bit
        self._by_load[load] |= bit
        self._lowest = min(self._lowest, load)

    def took(self, replica: Replica, count: int = 1) -> None:
        """The replica, which had the room, has `count` more calls in flight."""
        load = replica.active
        replica.active = load + count
        if replica.closed:
            return  # a suspect's, in no set
        bit = 1 << replica.idx
        self._by_load[load] ^= bit
        if load + count < replica.room:
            self._by_load[load + count] |= bit
        else:
            self.roomy ^= bit

    def gave(self, replica: Replica, count: int) -> None:
        """`count` of its calls have ended."""
        before = replica.active
        after = replica.active = before - count
        if replica.closed:
            return
        if before < replica.room:
            self._by_load[before] ^= 1 << replica.idx
        if after < replica.room:  # else it has more than it would be given now
            self._set(replica.idx, after)

    def by_idx(self, idx: int) -> Replica | None:
        return self._at.get(idx)

    def count_with_room(self) -> int:
        return self.roomy.bit_count()

    def with_room_after(self, idx: int) -> Replica | None:
        roomy = self.roomy
        if not roomy:
            return None
        above = roomy >> (idx + 1)
        if above:
            return self._at[idx + (above & -above).bit_length()]
        return self._at[(roomy & -roomy).bit_length() - 1]

    def least_loaded_after(self, idx: int) -> Replica | None:
        if not self.roomy:
            return None
        levels = self._by_load
        lowest = self._lowest
        while not levels[lowest]:
            lowest += 1
        self._lowest = lowest
        least = levels[lowest]
        above = least >> (idx + 1)
        if above:
            return self._at[idx + (above & -above).bit_length()]
        return self._at[(least & -least).bit_length() - 1]
