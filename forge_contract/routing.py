"""Which replica gets a call: the Router interface and the built-in routers (R2, R3).

The broker asks a router only when some replica has room. A custom router subclasses `Router` and sees *all* healthy replicas
as views; choosing a full one parks the call in that replica's own queue. The built-in load balancers choose among those with
room, and must not look at every replica for every call: they ask a `Pool` a few questions, which the broker's own pool
answers in constant time; a plain list is wrapped in one that scans, so that a custom router may filter the
candidates and hand the rest to a built-in one.
"""

from __future__ import annotations

import hashlib
import inspect
import random
from bisect import bisect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, overload

from forge_contract.errors import ConfigError


class ReplicaView(Protocol):
    """What a router sees of a replica. Loads are counts of calls; `capacity_utilization` is 0.0 … 1.0."""

    @property
    def idx(self) -> int: ...
    @property
    def healthy(self) -> bool: ...
    @property
    def has_room(self) -> bool: ...
    @property
    def free(self) -> int: ...  # how many more calls it would get now
    @property
    def current_load(self) -> int: ...  # active and waiting for it
    @property
    def active_requests(self) -> int: ...
    @property
    def queue_depth(self) -> int: ...  # waiting for this replica
    @property
    def max_concurrent_requests(self) -> int: ...
    @property
    def capacity_utilization(self) -> float: ...
    @property
    def sessions(self) -> int: ...  # pinned here


class Pool:
    """Healthy replicas, a sequence by position, and the questions that must not scan them.

    A plain class and not a Protocol: the built-in routers ask `isinstance` once per call.
    """

    members: tuple[int, ...] = ()  # their idx, by position

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, position: Any, /) -> Any:
        raise NotImplementedError

    def __iter__(self) -> Iterator[Any]:
        return (self[position] for position in range(len(self)))

    def by_idx(self, idx: int) -> Any | None:
        """The replica of this idx, if it is one of these."""
        raise NotImplementedError

    def count_with_room(self) -> int:
        """How many have room."""
        raise NotImplementedError

    def with_room_after(self, idx: int) -> Any | None:
        """The next replica with room in cyclic order of idx, after `idx` (-1: the first)."""
        raise NotImplementedError

    def least_loaded_after(self, idx: int) -> Any | None:
        """Of those with room, the least loaded; among equals the next after `idx`, so that ties rotate."""
        raise NotImplementedError


class ListPool(Pool):
    """A plain sequence of views as a Pool: it scans, which is fine where somebody filtered by hand."""

    def __init__(self, replicas: Sequence[Any]) -> None:
        self._replicas = sorted(replicas, key=lambda replica: replica.idx)
        self.members = tuple(replica.idx for replica in self._replicas)

    def __getitem__(self, position: Any, /) -> Any:
        return self._replicas[position]

    def by_idx(self, idx: int) -> Any | None:
        return next((replica for replica in self._replicas if replica.idx == idx), None)

    def count_with_room(self) -> int:
        return sum(replica.has_room for replica in self._replicas)

    def with_room_after(self, idx: int) -> Any | None:
        roomy = [replica for replica in self._replicas if replica.has_room]
        return next((replica for replica in roomy if replica.idx > idx), roomy[0] if roomy else None)

    def least_loaded_after(self, idx: int) -> Any | None:
        roomy = [replica for replica in self._replicas if replica.has_room]
        return min(roomy, key=lambda replica: (replica.current_load, replica.idx <= idx, replica.idx), default=None)


class Router:
    """Subclass and override `get_replica`. Each endpoint of each service has its own instance."""

    def get_replica(
        self,
        healthy_replicas: Sequence[Any],
        sess_id: str | None = None,
        session_map: Mapping[str, int] | None = None,
    ) -> Any:
        """Choose one of `healthy_replicas` (see ReplicaView) for a call of session `sess_id`, None if it has none.

        `session_map` tells where sessions are pinned: session id → replica idx. Declare `hints=None` as well to be
        given the call's or the session's routing hints, a mapping. Whatever is raised here fails this call with `RouterError`.
        """
        raise NotImplementedError(f"{type(self).__name__} does not override get_replica")

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    @property
    def takes_hints(self) -> bool:
        return "hints" in inspect.signature(self.get_replica).parameters


def _pool(replicas: Any) -> Pool:
    return replicas if isinstance(replicas, Pool) else ListPool(replicas)


def _chosen(replica: Any | None) -> Any:
    if replica is None:
        raise LookupError("no healthy replica has room")
    return replica


class RoundRobinRouter(Router):
    """Each replica with room in turn. The default."""

    def __init__(self) -> None:
        self._last = -1

    def get_replica(self, healthy_replicas: Any, sess_id: str | None = None, session_map: Any = None) -> Any:
        try:
            replica = healthy_replicas.with_room_after(self._last)
        except AttributeError:  # a plain list; asking first would cost every call of the broker's
            replica = ListPool(healthy_replicas).with_room_after(self._last)
        if replica is None:
            raise LookupError("no healthy replica has room")
        self._last = replica.idx
        return replica

    def deal(self, pool: Pool, count: int, least: int = 1) -> Iterator[tuple[Any, int]]:
        """The choices for `count` calls that come together, one share for each replica with room: calls side by side in an
        envelope stay side by side, and the books are kept once for each share. No share is smaller than `least`, while
        there are so many. Who iterates dispatches each share before asking for the next; fewer than `count` are dealt when
        room runs out."""
        while count > 0 and (roomy := pool.count_with_room()):
            share = max(-(-count // roomy), least)
            for _ in range(min(roomy, -(-count // share))):
                replica = _chosen(pool.with_room_after(self._last))
                dealt = min(share, count, replica.free)
                self._last = replica.idx
                count -= dealt
                yield replica, dealt


class LeastLoadedRouter(Router):
    """The replica with the fewest calls; equals in turn."""

    def __init__(self) -> None:
        self._last = -1

    def get_replica(self, healthy_replicas: Any, sess_id: str | None = None, session_map: Any = None) -> Any:
        try:
            replica = healthy_replicas.least_loaded_after(self._last)
        except AttributeError:
            replica = ListPool(healthy_replicas).least_loaded_after(self._last)
        if replica is None:
            raise LookupError("no healthy replica has room")
        self._last = replica.idx
        return replica


class PowerOfTwoRouter(Router):
    """The less loaded of two drawn at random (Mitzenmacher 2001, "The power of two choices"): nearly as even as the
    least loaded, and without the herd that follows one stale figure when several brokers choose."""

    def __init__(self, seed: int | None = None) -> None:
        self._seed = seed
        self._random = random.Random(seed)

    def get_replica(self, healthy_replicas: Any, sess_id: str | None = None, session_map: Any = None) -> Any:
        pool = _pool(healthy_replicas)
        first, second = self._draw(pool), self._draw(pool)
        return first if first.current_load <= second.current_load else second

    def _draw(self, pool: Pool) -> Any:
        drawn = pool[self._random.randrange(len(pool))]
        return drawn if drawn.has_room else _chosen(pool.with_room_after(drawn.idx))


class ConsistentHashRouter(Router):
    """The same key goes to the same replica, and a change of one replica moves only its share of the keys (Karger et
    al. 1997): for caches and shared prefixes. The key is the hint named `key`, else the session; a call with neither
    goes to the least loaded. A full replica parks the call, because affinity is what was asked for.
    """

    def __init__(self, key: str = "key", points: int = 64) -> None:
        if points not in range(1, 4097):  # also for what no integer is: both may come from a peer
            raise ConfigError(where="ConsistentHashRouter", message=f"points must be 1 to 4096, not {points!r:.60}")
        self.key = key
        self.points = points  # on the ring per replica: 64 keeps shares within about a quarter of each other
        self._ring: list[tuple[int, int]] = []
        self._members: tuple[int, ...] = ()
        self._balance = LeastLoadedRouter()

    def get_replica(
        self, healthy_replicas: Any, sess_id: str | None = None, session_map: Any = None, hints: Any = None
    ) -> Any:
        key = hints.get(self.key) if hints else None
        if key is None:
            key = sess_id
        if key is None:
            return self._balance.get_replica(healthy_replicas)
        pool = _pool(healthy_replicas)
        ring = self._ring_of(pool.members)
        return pool[ring[bisect(ring, (_point(repr(key)), -1)) % len(ring)][1]]

    def _ring_of(self, members: tuple[int, ...]) -> list[tuple[int, int]]:
        """Points and positions, made anew when the members change. The pool hands out the same tuple until then."""
        if members is not self._members and members != self._members:
            self._members = members
            self._ring = sorted(
                (_point(f"{idx}/{point}"), position)
                for position, idx in enumerate(members)
                for point in range(self.points)
            )
        return self._ring


def _point(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


class SessionRouter(Router):
    """A session goes where it is pinned; one without a pin, and a call without a session, to `fallback`."""

    def __init__(self, fallback: Router | None = None) -> None:
        if not isinstance(fallback, Router | None):
            raise ConfigError(where="SessionRouter", message=f"fallback must be a Router, not {fallback!r:.60}")
        self.fallback = fallback or LeastLoadedRouter()

    def get_replica(
        self, healthy_replicas: Any, sess_id: str | None = None, session_map: Mapping[str, int] | None = None
    ) -> Any:
        if sess_id is not None and session_map and sess_id in session_map:
            replica = _pool(healthy_replicas).by_idx(session_map[sess_id])
            if replica is not None:
                return replica
        return self.fallback.get_replica(healthy_replicas, sess_id, session_map)


_BUILT_IN: dict[type[Router], tuple[str, ...]] = {
    RoundRobinRouter: (),
    LeastLoadedRouter: (),
    PowerOfTwoRouter: ("_seed",),
    ConsistentHashRouter: ("key", "points"),
    SessionRouter: (),
}
_BY_NAME = {cls.__name__: cls for cls in _BUILT_IN}


def make_router(given: Any) -> Router:
    """The router behind an instance, a class or a factory (R2). Raises ValueError for anything else."""
    made = given
    if given is None:
        made = RoundRobinRouter()
    elif not isinstance(given, Router) and callable(given):
        try:
            made = given()
        except Exception as error:
            raise ConfigError(where="router", message=f"{given!r} raised {type(error).__name__}: {error}") from error
    if not isinstance(made, Router) or type(made).get_replica is Router.get_replica:
        raise ConfigError(
            where="router",
            message=f"{given!r} is no Router: give an instance, a subclass, or a function that makes one",
        )
    return made


@overload
def describe_router(router: Router) -> dict[str, Any] | None: ...
@overload
def describe_router(router: None) -> dict[str, Any]: ...
def describe_router(router: Router | None) -> dict[str, Any] | None:
    """A built-in router as a wire value; None for a custom one, which has to travel by value."""
    router = router or RoundRobinRouter()
    names = _BUILT_IN.get(type(router))
    if names is None:
        return None
    if isinstance(router, SessionRouter):
        fallback = describe_router(router.fallback)
        return None if fallback is None else {"name": "SessionRouter", "options": {"fallback": fallback}}
    return {"name": type(router).__name__, "options": {name.lstrip("_"): getattr(router, name) for name in names}}


def build_router(described: Any) -> Router:
    """The built-in router that `describe_router` described. Raises ConfigError for an unknown or ill-formed one."""
    if not isinstance(described, dict) or str(described.get("name")) not in _BY_NAME:
        raise ConfigError(
            where="router", message=f"{described!r:.100} is no built-in router; there are {', '.join(_BY_NAME)}"
        )
    options = described.get("options") or {}
    if isinstance(options, dict) and isinstance(options.get("fallback"), dict):
        options = {**options, "fallback": build_router(options["fallback"])}
    try:
        return _BY_NAME[str(described["name"])](**options)
    except TypeError as error:
        raise ConfigError(where="router", message=f"{described['name']}: {error}") from error
