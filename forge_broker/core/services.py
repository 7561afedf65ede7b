"""A service: replicas of one class, its endpoints with their queues and routers, its sessions and their pins.

Holds and checks; who moves what is `dispatch` (calls) and `lifecycle` (replicas).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from math import inf
from typing import Any, NamedTuple

from forge_broker.core.actions import Preload
from forge_broker.core.batcher import Batcher
from forge_broker.core.queues import Queue
from forge_broker.core.replicas import Replica, ReplicaPool
from forge_broker.core.requests import Request
from forge_broker.core.sizing import Sizing
from forge_broker.core.stats import EndpointStats, ServiceStats
from forge_contract.config import EndpointOptions, ServiceConfig
from forge_contract.errors import ConfigError, TrustRequired
from forge_contract.framing import Payload
from forge_contract.routing import LeastLoadedRouter, PowerOfTwoRouter, RoundRobinRouter, Router, build_router
from forge_contract.scaling import ScalingPolicy, ThresholdPolicy, make_policy


class Endpoint:
    """One method of one service. Slots because the hot path reads it for every call."""

    __slots__ = (
        "_worth",
        "at_most_once",
        "batcher",
        "hang_timeout_s",
        "id",
        "last",
        "method",
        "name",
        "options",
        "ordered",
        "pins_with",
        "queue",
        "replay_last",
        "router",
        "service",
        "share",
        "signature",
        "stats",
        "takes_hints",
    )

    def __init__(
        self, service: Service, id: int, method: int, spec: dict[str, Any], router: Router, queue: Queue
    ) -> None:
        self.service = service
        self.id = id
        self.method = method  # its index in the worker's list
        self.name: str = spec["name"]
        self.options: dict[str, Any] = spec["options"]
        self.signature = spec.get("signature")
        self.router = router
        self.takes_hints = router.takes_hints
        # A session is pinned by the endpoint's router where one was chosen for its affinity, else to the least loaded (S2).
        self.pins_with: Router = LeastLoadedRouter() if type(router) is RoundRobinRouter else router
        self.queue = queue
        self.ordered = service.kind == "actor"  # calls of one client start in the order sent (A6)
        delivery = self.options.get("delivery") or service.config.delivery
        default = "at_most_once" if service.kind == "actor" else "at_least_once"
        self.at_most_once = (delivery or default) == "at_most_once"
        self.last: Replica | None = None  # that got calls of it as a Slice
        # So many calls, at least, are worth an envelope to a replica, by what they have cost one of late.
        self.share = 1.0
        self._worth = 0  # what was said last
        self.hang_timeout_s: float | None = self.options.get("hang_timeout_s")
        # Calls of an actor keep their order across endpoints (A6), and do not wait for each other.
        batched = self.options.get("batch_size", 1) > 1 and service.kind == "service"
        self.batcher = Batcher(self.full_name, self.options) if batched else None
        if self.batcher is not None and service.exports:
            self.batcher.sessions = (
                False  # a session's state is exported after each of its calls: they run one at a time
            )
        self.replay_last: bool = bool(self.options.get("replay_last"))
        self.stats = EndpointStats()

    def __repr__(self) -> str:
        return f"<Endpoint {self.service.name}.{self.name} {self.queue.length} queued>"

    @property
    def full_name(self) -> str:
        return f"{self.service.name}.{self.name}"

    def worth(self, calls: int) -> None:
        """So many of its calls have been worth an envelope just now; 0: nobody knows. The larger of the last two counts, as a worker that
        the kernel interrupted says too few; and it is believed little by little, for nothing but a steady stream of short calls is to
        be kept together."""
        best, self._worth = max(calls, self._worth), calls
        share = self.share
        if not best:
            self.share = 1.0
        elif best > share:
            self.share = share + 0.125
        else:
            self.share = share - (share - best) / 4


class Session:
    """What the broker knows of one session; where it is pinned stands in `Service.pins`."""

    __slots__ = ("_hints", "client", "id", "lost", "service", "state", "suspects", "unpinned", "used_at")

    def __init__(self, id: str, service: Service, client: Any, hints: dict[str, Any], now: float) -> None:
        self.id = id
        self.service = service
        self.client = client
        self._hints = hints or None  # most have none: an empty map for each would be a sixth of what a session takes
        self.used_at = now  # since then: `Service.answered`
        self.unpinned = 0  # its calls in the service's `unpinned` queue
        self.suspects = 0  # its calls in the service's `suspects` queue
        self.state: Checkpoint | None = None  # the last one its replica sent (S3)
        self.lost = ""  # why its state is lost for good: what its calls fail with

    def __repr__(self) -> str:
        return f"<Session {self.id} of {self.service.name}>"

    @property
    def hints(self) -> dict[str, Any]:
        return self._hints or {}


class Checkpoint(NamedTuple):
    """A session's state as its replica exported it. `trusted`: the stamp for whoever imports it."""

    payload: Payload
    size: int  # bytes
    trusted: bool


class Replay(NamedTuple):
    payload: Payload  # the arguments
    trusted: bool


class Service:
    __slots__ = (
        "ahead_s",
        "batches",
        "cell",
        "class_name",
        "config",
        "endpoints",
        "exports",
        "fresh",
        "grace_at",
        "id",
        "init",
        "init_trusted",
        "kind",
        "looked_at",
        "looking",
        "metrics_at",
        "name",
        "open_replays",
        "owner",
        "pins",
        "pool",
        "preload_ready",
        "preload_why",
        "ready",
        "replays",
        "replicas",
        "resizes",
        "sessions",
        "sizing",
        "spare_at",
        "spare_deaths",
        "spare_why",
        "spares",
        "spec",
        "start_failure",
        "started",
        "state_epoch",
        "stats",
        "stopping",
        "suspects",
        "unhealthy_since",
        "unpinned",
        "waiting_start",
        "waiting_stop",
        "wanted",
        "watchers",
    )

    def __init__(
        self, id: int, name: str, spec: dict[str, Any], config: ServiceConfig, init: Payload, trusted: bool, now: float
    ) -> None:
        self.id = id
        self.name = name
        self.spec = spec
        self.config = config
        self.init = init  # the constructor's arguments, as they came
        self.init_trusted = trusted
        self.owner: Any = None  # clients.Client; None when it lives on by itself
        self.kind: str = spec["kind"]
        self.class_name: str = spec["class_name"]
        self.pool = ReplicaPool(config.concurrency)
        self.replicas: dict[int, Replica] = {}
        self.wanted = config.initial_replicas  # replicas, whatever they do, but those that leave for good
        self.resizes = 0  # how often that changed: of what peers hold of it, the latest counts (F10)
        self.sizing = Sizing(None, now)
        self.endpoints: list[Endpoint] = []
        self.batches = False  # some of them do
        self.ahead_s = 0.0  # so long calls may wait at a replica that others run on, 0.0: not at all
        self.looking = False  # `ahead` will look
        self.looked_at = -inf
        self.sessions: dict[str, Session] = {}
        self.pins: dict[str, int] = {}  # session id → replica idx; what routers see as `session_map`
        self.fresh: set[str] = set()  # sessions of which no replica has answered a call: they have no state to lose
        self.unpinned = Queue(f"{name} sessions")  # calls of sessions that have no replica yet, in order
        self.ready: deque[Queue] = deque()  # queues that may have something to give, in rotation (R1)
        self.suspects = Queue(f"{name} suspects")  # calls that have to run alone (F4), and what waits behind them
        self.cell: Replica | None = None  # the replica that is kept free for them
        self.exports = bool(spec.get("exports"))  # the class has hooks for its sessions' state (S3)
        # The last successful fan-out of each endpoint that wants it played to newcomers (A11), oldest first.
        self.replays: dict[int, Replay] = {}  # by method
        self.open_replays = 0  # such fan-outs under way: nobody becomes HEALTHY meanwhile
        self.started = False  # all replicas have been HEALTHY once
        self.stopping: Any = None  # the error for whoever calls now
        self.state_epoch = 1  # of an actor: how often its state began anew (A12)
        self.unhealthy_since: float | None = now
        self.grace_at: float | None = None  # when calls that wait for a healthy replica are looked at
        self.waiting_start: list[tuple[Any, int]] = []  # (client, control number)
        self.start_failure: Any = None  # fields and payload of the answer to those, when it stops instead
        self.waiting_stop: list[tuple[Any, int]] = []
        self.preload_ready = False  # its workers are forked
        self.preload_why = ""  # why they are not, though they were to be
        self.spares: dict[int, Any] = {}  # state.Spare by number: those that wait for a replica of ours to start
        self.spare_deaths = 0  # in a row
        self.spare_at = 0.0  # no new one before that
        self.spare_why = ""  # why there are fewer than wanted
        self.watchers: set[str] = set()  # clients that get its metrics
        self.metrics_at = 0.0  # when the next snapshot goes out; 0.0: none is due
        self.stats = ServiceStats()

    def __repr__(self) -> str:
        return f"<Service {self.name} {len(self.pool)}/{len(self.replicas)} healthy>"

    @property
    def rotation(self) -> list[Queue]:
        """Its queues that take turns, but those of the replicas: each once, though an actor's endpoints share one. In a lane calls may wait
        for others, in the rest only for room."""
        found = {id(endpoint.queue): endpoint.queue for endpoint in self.endpoints}
        lanes = [lane for one in self.endpoints if one.batcher is not None for lane in one.batcher.lanes.values()]
        return [*found.values(), self.unpinned, *lanes]

    @property
    def queues(self) -> list[Queue]:
        """All where a call of no replica may wait."""
        return [*self.rotation, self.suspects]

    @property
    def source(self) -> dict[str, Any]:
        """Where the class comes from, for whoever is to import it."""
        spec = self.spec
        return {
            "name": self.name,
            "class_name": self.class_name,
            "target": spec["target"],
            "path": spec.get("path") or [],
            "cwd": spec.get("cwd"),
            "trusted": self.init_trusted,
        }

    @property
    def preload(self) -> Preload | None:
        """For launches, as long as nobody has declined."""
        if not self.config.preload or self.preload_why:
            return None
        source = {**self.source, "gpus": []}
        return Preload(self.id, f"{self.class_name}/preload", source, self.config.gpus_per_rank > 0)

    @property
    def spares_name(self) -> str:
        """What its spares are called, in stories and as holders of GPUs."""
        return f"{self.name}/spares"

    @property
    def current(self) -> list[Replica]:
        """Its replicas but those that leave for good."""
        return [replica for replica in self.replicas.values() if not replica.leaving]

    def resize(self, wanted: int) -> None:
        self.wanted = wanted
        self.resizes += 1

    def deed(self) -> dict[str, Any]:
        """What a broker without memory needs to have this service again (PROTOCOL.md §7.2)."""
        return {
            "service": self.id,
            "name": self.name,
            "spec": self.spec,
            "endpoints": [endpoint.id for endpoint in self.endpoints],
            "owner": 0 if self.owner is None else self.owner.id,
            "trusted": self.init_trusted,
            "wanted": self.wanted,
            "resizes": self.resizes,
        }

    def pin(self, session: str, replica: Replica) -> None:
        self.unpin(session)
        self.pins[session] = replica.idx
        replica.sessions += 1

    def unpin(self, session: str) -> None:
        idx = self.pins.pop(session, None)
        if idx is not None and idx in self.replicas:
            self.replicas[idx].sessions -= 1

    def answered(self, sessions: Sequence[str], now: float) -> None:
        """A replica has answered calls of these sessions, some of which may be over.

        To look one up among many costs 0.2 µs, for it is not in any cache by now. So nothing is noted at a session that nobody wants to
        know: few are fresh, and when one was used matters to `session_ttl_s` alone.
        """
        if self.fresh:
            self.fresh.difference_update(sessions)
        if self.config.session_ttl_s is not None:
            self.used(sessions, now)

    def used(self, sessions: Sequence[str], now: float) -> None:
        """Calls of these have run until now."""
        for session in map(self.sessions.get, sessions):
            if session is not None:
                session.used_at = now

    def unqueue(self, request: Request) -> None:
        """Take a waiting call out of whichever queue of ours has it."""
        queue: Queue = request.holder
        queue.remove(request)
        request.holder = None
        if request.session in self.sessions:
            self.sessions[request.session].unpinned -= queue is self.unpinned
            self.sessions[request.session].suspects -= queue is self.suspects

    def wake(self, queue: Queue) -> None:
        """Put a queue into the rotation of the pump, if it has anything. Suspects take no turn: they wait for their cell."""
        if not queue.waiting and queue.length and queue is not self.suspects:
            queue.waiting = True
            self.ready.append(queue)

    def free_idx(self) -> int:
        """The lowest replica number not in use: names stay short however often it scales."""
        return next(idx for idx in range(len(self.replicas) + 1) if idx not in self.replicas)


def read_spec(spec: Any, trusted: bool) -> ServiceConfig:
    """Judge what a client wants deployed (PROTOCOL.md §7.1). Raises ConfigError or TrustRequired."""
    if not isinstance(spec, dict):
        raise ConfigError(where="deploy", message="the spec is no map")
    problems = [
        f"{name} must be {kind.__name__}, not {spec.get(name)!r:.60}"
        for name, kind in (("class_name", str), ("target", dict), ("endpoints", list))
        if not isinstance(spec.get(name), kind)
    ]
    if spec.get("kind") not in ("service", "actor"):
        problems.append(f"kind must be 'service' or 'actor', not {spec.get('kind')!r:.60}")
    if problems:
        raise ConfigError(where="deploy", problems=problems)
    target = spec["target"]
    if "code" in target:
        if not trusted:
            raise TrustRequired(what=f"class {spec['class_name']} by value")
    elif not isinstance(target.get("ref"), str):
        raise ConfigError(where="deploy", message="target has neither a ref nor code")
    names = [one.get("name") if isinstance(one, dict) else None for one in spec["endpoints"]]
    if not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
        raise ConfigError(where="deploy", message=f"endpoints need distinct names, not {names!r:.100}")
    config = ServiceConfig.from_wire(spec.get("config") or {})
    if spec["kind"] == "actor" and config.autoscaling is not None:
        raise ConfigError(where="deploy", message="an actor is one replica; autoscaling is for services")
    for one in spec["endpoints"]:
        options = one.get("options")
        if not isinstance(options, dict):
            raise ConfigError(where="deploy", message=f"endpoint {one['name']} has no options")
        EndpointOptions.checked(f"endpoint {one['name']}", options)
    return config


def read_router(
    described: Any, trusted: bool, unpickle: Callable[[bytes], Any], seed: Callable[[], int], where: str
) -> Router:
    """An endpoint's own router: a built-in one by name, or the user's by value where there is trust (R4)."""
    if isinstance(described, dict) and isinstance(described.get("code"), bytes):
        if not trusted:
            raise TrustRequired(what=f"a custom router for {where}")
        try:
            router = unpickle(described["code"])
        except Exception as error:
            raise ConfigError(
                where=where, message=f"its router cannot be loaded in the broker: {type(error).__name__}: {error}"
            ) from error
        if not isinstance(router, Router):
            raise ConfigError(where=where, message=f"{router!r:.100} is no Router")
        return router
    router = build_router(described)
    if isinstance(router, PowerOfTwoRouter) and (described.get("options") or {}).get("seed") is None:
        return PowerOfTwoRouter(seed())
    return router


def read_policy(
    config: ServiceConfig,
    spec: dict[str, Any],
    trusted: bool,
    unpickle: Callable[[bytes], Any],
    load: Callable[[str, list[str]], Any],
) -> ScalingPolicy | None:
    """A service's own scaling policy: the thresholds, or the user's, by value or by name where there is trust (X1). None where nothing
    scales by itself."""
    if config.autoscaling is None:
        return None
    described, named = spec.get("policy"), config.autoscaling.policy
    code = described.get("code") if isinstance(described, dict) else None
    if not isinstance(code, bytes) and not isinstance(named, str):
        return ThresholdPolicy()
    what = f"the scaling policy of {spec['class_name']}"
    if not trusted:
        raise TrustRequired(what=what)
    try:
        if isinstance(code, bytes):
            given = unpickle(code)
        else:
            given = load(str(named), [entry for entry in spec.get("path") or () if isinstance(entry, str)])
        return make_policy(given)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            where="autoscaling", message=f"{what} cannot be loaded in the broker: {type(error).__name__}: {error}"
        ) from error
