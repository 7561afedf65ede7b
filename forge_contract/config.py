"""Configuration as frozen values: judged whole when made, every problem reported in one ConfigError.

`ServiceConfig` and `AutoscalingConfig` are what users write, with the names of the specification; `EndpointOptions` is what the
decorators take; `BrokerConfig` is what a broker is started with. Nothing here reads a file or the environment: the
programs do that and hand us values.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Hashable, Mapping
from dataclasses import InitVar, dataclass
from typing import Any, Final, Self, TypeVar

from forge_contract.addresses import check_address, read_http
from forge_contract.errors import ConfigError, did_you_mean
from forge_contract.routing import make_router
from forge_contract.scaling import DEFAULT_MOST, Limits, make_policy

Config = TypeVar("Config")

DELIVERIES = ("at_least_once", "at_most_once")
# Far beyond what anybody runs: a client's slip must not have the broker make a billion of something.
MOST_REPLICAS: Final = 4096


class _Problems(list[str]):
    """Gathers what is wrong with a configuration, so that it can be told in one go."""

    def types(self, config: Any) -> None:
        """Every field has its declared type. One that has not is set to its default after it was noted: later checks compare
        numbers and must not meet strings, and since there is a problem now, the object never escapes `tell`."""
        types_of_fields = _field_types(config.__class__)
        for one in dataclasses.fields(config):
            wanted = types_of_fields[one.name]
            value = getattr(config, one.name)
            if wanted and (not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted)):
                names = " or ".join("None" if kind is types.NoneType else kind.__name__ for kind in wanted)
                self.append(f"{one.name} must be {names}, not {value!r} ({type(value).__name__})")
                object.__setattr__(config, one.name, one.default)

    def need(self, holds: bool, problem: str) -> None:
        if not holds:
            self.append(problem)

    def at_least(self, config: Any, least: float, *names: str) -> None:
        for name in names:
            value = getattr(config, name)
            # `not >=` so that nan is a problem too
            self.need(value is None or value >= least, f"{name} must be at least {least}, not {value!r}")

    def at_most(self, config: Any, most: int, *names: str) -> None:
        for name in names:
            value = getattr(config, name)
            self.need(value is None or value <= most, f"{name} must be at most {most}, not {value!r}")

    def positive(self, config: Any, *names: str) -> None:
        for name in names:
            value = getattr(config, name)
            self.need(value is None or value > 0, f"{name} must be above 0, not {value!r}")

    def tell(self, where: str) -> None:
        if self:
            raise ConfigError(where=where, problems=list(self))


@functools.cache
def _field_types(cls: Hashable) -> dict[str, tuple[type, ...]]:
    """Each field's accepted types; empty where anything goes. An int is welcome where a float is."""
    assert isinstance(cls, type)  # Hashable is what `cache` asks for
    hints = typing.get_type_hints(cls)
    found: dict[str, tuple[type, ...]] = {}
    for one in dataclasses.fields(cls):
        hint = hints[one.name]
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        plain: list[type] = []
        for option in options:
            kind = typing.get_origin(option) or option
            if not isinstance(kind, type):
                plain = []
                break
            plain.append(kind)
        if float in plain:
            plain.append(int)
        found[one.name] = () if object in plain else tuple(plain)
    return found


def _unknown(known: frozenset[str], given: Mapping[str, Any]) -> list[str]:
    # A peer's map may have anything for a key.
    problems = [f"unknown option {name!r}{did_you_mean(str(name), known, '; ')}" for name in given if name not in known]
    return problems and [*problems, "the known ones are " + ", ".join(sorted(known))]


def _refuse_unknown(where: str, known: frozenset[str], given: Mapping[str, Any]) -> None:
    if problems := _unknown(known, given):
        raise ConfigError(where=where, problems=problems)


def field_names(cls: type) -> frozenset[str]:
    return frozenset(one.name for one in dataclasses.fields(cls))


def _judging_names(cls: type[Config]) -> type[Config]:
    """A configuration whose constructor refuses unknown fields, all of them with the closest known ones, and tells with them what is
    wrong with the others. Python's own TypeError would stop at the first and know none."""
    init = cls.__init__
    known = frozenset(inspect.signature(init).parameters) - {"self"}

    @functools.wraps(init)
    def judging(self: Config, **fields: Any) -> None:
        unknown = _unknown(known, fields)
        try:
            init(self, **{name: value for name, value in fields.items() if name in known})
        except ConfigError as error:
            raise ConfigError(where=cls.__name__, problems=[*error.problems, *unknown]) from None
        if unknown:
            raise ConfigError(where=cls.__name__, problems=unknown)

    cls.__init__ = judging  # type: ignore[assignment]
    return cls


@_judging_names
@dataclass(frozen=True, kw_only=True)
class AutoscalingConfig:
    """When to add and remove replicas. Defaults and names are the specification's; the policy acts on it in `scaling`."""

    scale_up_queue_depth_threshold: float = 5.0  # calls waiting per healthy replica
    scale_up_capacity_threshold: float = 0.8  # 0.0 … 1.0 of all room in use
    scale_up_request_rate_threshold: float = 10.0  # calls/s per healthy replica, counted only while something waits

    scale_down_capacity_threshold: float = 0.3
    scale_down_queue_depth_threshold: float = 1.0
    scale_down_idle_time_threshold: float = 300.0  # seconds below both thresholds

    min_time_between_scale_events: float = 60.0  # seconds
    scale_up_cooldown: float = 30.0  # seconds
    scale_down_cooldown: float = 120.0  # seconds

    scale_up_step_size: int = 1  # replicas
    scale_down_step_size: int = 1  # replicas

    max_queue_depth_emergency: float = 20.0  # calls waiting per healthy replica: ignores the cooldowns
    min_healthy_replicas_ratio: float = 0.5  # 0.0 … 1.0; no scale-down below it. What was never healthy does not count

    # None: the thresholds above. A `ScalingPolicy`: an instance, class or factory, which goes to the broker by value; or "module:qualname",
    # which the broker imports. Both only with trust.
    policy: object = None
    evaluate_every_s: float = 1.0
    smoothing_s: float = (
        10.0  # of queue and load, before they are compared with thresholds; an emergency is not smoothed
    )

    def __post_init__(self) -> None:
        problems = _Problems()
        problems.types(self)
        problems.at_least(self, 1, "scale_up_step_size", "scale_down_step_size")
        problems.at_least(self, 0.01, "evaluate_every_s")  # more often tells nothing new
        problems.at_least(
            self,
            0.0,
            *(name for name in field_names(type(self)) if not name.endswith(("_size", "_every_s", "policy"))),
        )
        for name in ("scale_up_capacity_threshold", "scale_down_capacity_threshold", "min_healthy_replicas_ratio"):
            problems.need(getattr(self, name) <= 1.0, f"{name} is a share, at most 1.0, not {getattr(self, name)!r}")
        for what in ("capacity", "queue_depth"):
            up, down = getattr(self, f"scale_up_{what}_threshold"), getattr(self, f"scale_down_{what}_threshold")
            problems.need(
                down < up,
                f"scale_down_{what}_threshold={down!r} must be below scale_up_{what}_threshold={up!r}, "
                "or replicas would be added and removed in turn",
            )
        problems.need(
            self.max_queue_depth_emergency >= self.scale_up_queue_depth_threshold,
            "max_queue_depth_emergency must not be below scale_up_queue_depth_threshold",
        )
        if isinstance(self.policy, str):
            problems.need(
                all(part.replace(".", "_").isidentifier() for part in self.policy.partition(":")[::2]),
                f"policy must be 'module:qualname', not {self.policy!r:.100}",
            )
        elif self.policy is not None:
            try:
                make_policy(self.policy)
            except ConfigError as error:
                problems.append(f"policy: {error.fields['message']}")
        problems.tell("AutoscalingConfig")

    def to_wire(self) -> dict[str, Any]:
        """All but a policy by value, which travels beside this."""
        fields = {name: getattr(self, name) for name in sorted(field_names(type(self)))}
        return fields | {"policy": self.policy if isinstance(self.policy, str) else None}


@_judging_names
@dataclass(frozen=True, kw_only=True)
class ServiceConfig:
    """How a service (or an actor) is placed and run. Given to `Service`, or field by field to `options()`."""

    # Shape
    procs: int = 1  # ranks per replica (per host when `hosts` is given)
    hosts: int | None = None  # distinct hosts a replica spreads over; None: wherever there is room
    with_gpus: bool = False  # one GPU per rank unless gpus_per_replica says otherwise
    gpus_per_replica: int | None = None  # a multiple of the ranks of a replica
    num_replicas: int | None = None  # at the start; `default_replicas` is another name for it; None: min_replicas or 1
    min_replicas: int | None = None
    max_replicas: int | None = None
    mesh_name: str | None = None  # how the service is called in names and logs; None: its class

    # Calls
    replica_max_concurrent_requests: int = 10
    mesh_concurrency: int = 1  # calls at once on a replica of several ranks: collectives of two calls must not cross
    return_first_rank_result: bool = True  # rank 0's value instead of a ValueMesh over all ranks
    errors: str = "raise"  # "return": an endpoint's exception comes back as the value
    delivery: str | None = None  # "at_least_once" (services), "at_most_once" (actors) when None
    # Seconds' worth of calls that a replica may get beyond what it runs at once, while it ends calls in microseconds; 0: none.
    dispatch_ahead_s: float = 0.002
    max_queued_requests: int = 100_000  # waiting per endpoint; past it `Overloaded`
    no_replica_grace_s: float = 60.0  # how long a call waits while no replica is healthy

    # Lives
    name: str | None = None  # a service deployed by name can be found by `get_service(name)`
    detached: bool = False  # outlives the client that started it
    health_poll_rate: float = (
        0.2  # seconds between calls of `health()`; False or an exception three times in a row restarts
    )
    max_attempts: int = 3  # a call in flight at so many deaths of replicas is poison; its last attempt runs alone
    # Names of exceptions ("ValueError", "package.module.Error") that mean the process is broken: raised, and the replica restarts.
    fatal_errors: tuple[str, ...] = ()
    start_timeout_s: float = 600.0  # for one start of a replica, from the decision to HEALTHY
    stop_grace_s: float = 5.0  # for running calls, when a replica is stopped
    restart_backoff_s: float = 0.5  # before the second restart in a row; doubles, with jitter
    restart_backoff_at_most_s: float = 30.0

    # Starts
    warm_spares: int = 0  # replicas' worth of processes that have imported the class and wait for a replica to start
    preload: bool = False  # processes are forked from one that has imported the class, unless its import forbids it

    # Sessions
    session_ttl_s: float | None = None  # a session unused for so long ends; None: only with its client
    session_checkpoint_every: int = (
        1  # calls between two exports of a session; more is faster, and a crash loses the last
    )
    on_session_loss: str = "restart"  # "raise": SessionLost instead of a fresh start, where no state could be kept

    autoscaling: AutoscalingConfig | None = None
    default_replicas: InitVar[int | None] = None

    def __post_init__(self, default_replicas: int | None) -> None:
        problems = _Problems()
        # A dataclass default of an InitVar stays behind as a class attribute, which `replace` would hand back to us.
        if default_replicas is not None:
            if isinstance(default_replicas, bool) or not isinstance(default_replicas, int):
                problems.append(f"default_replicas must be int, not {default_replicas!r}")
            elif self.num_replicas not in (None, default_replicas):
                problems.append(
                    f"num_replicas={self.num_replicas!r} and default_replicas={default_replicas!r} are the same "
                    "setting; give one"
                )
            else:
                object.__setattr__(self, "num_replicas", default_replicas)
        problems.types(self)
        self._judge(problems)
        problems.tell("ServiceConfig")

    def _judge(self, problems: _Problems) -> None:
        problems.at_least(
            self, 1, "procs", "hosts", "replica_max_concurrent_requests", "mesh_concurrency", "max_replicas"
        )
        problems.at_least(self, 1, "max_queued_requests", "session_checkpoint_every")
        problems.at_least(self, 2, "max_attempts")
        problems.need(
            self.on_session_loss in ("restart", "raise"),
            f"on_session_loss must be 'restart' or 'raise', not {self.on_session_loss!r}",
        )
        problems.need(
            all(isinstance(one, str) for one in self.fatal_errors),
            f"fatal_errors must be names of exceptions, not {self.fatal_errors!r}",
        )
        problems.at_most(
            self, MOST_REPLICAS, "procs", "hosts", "num_replicas", "min_replicas", "max_replicas", "warm_spares"
        )
        problems.at_most(self, 1_000_000, "replica_max_concurrent_requests", "mesh_concurrency")
        problems.at_least(
            self, 0, "num_replicas", "min_replicas", "gpus_per_replica", "no_replica_grace_s", "stop_grace_s"
        )
        problems.at_least(self, 0, "warm_spares")
        problems.at_least(self, 0, "dispatch_ahead_s")
        problems.at_most(self, 1, "dispatch_ahead_s")
        problems.at_least(self, 0, "restart_backoff_s", "restart_backoff_at_most_s")
        problems.positive(self, "health_poll_rate", "session_ttl_s", "start_timeout_s")
        least, most = self.min_replicas, self.max_replicas
        problems.need(
            least is None or most is None or least <= most, f"min_replicas={least} is above max_replicas={most}"
        )
        initial = self.initial_replicas
        problems.need(least is None or initial >= least, f"num_replicas={initial} is below min_replicas={least}")
        problems.need(
            most is None or initial <= most or self.num_replicas is None,
            f"num_replicas={initial} is above max_replicas={most}",
        )
        problems.need(
            initial > 0 or self.autoscaling is not None,
            "num_replicas=0 without autoscaling would never serve a call",
        )
        problems.need(self.errors in ("raise", "return"), f"errors must be 'raise' or 'return', not {self.errors!r}")
        problems.need(
            self.delivery in (None, *DELIVERIES),
            f"delivery must be one of {', '.join(DELIVERIES)}, not {self.delivery!r}",
        )
        problems.need(
            not self.gpus_per_replica or self.gpus_per_replica % max(self.world, 1) == 0,
            f"gpus_per_replica={self.gpus_per_replica} cannot be shared evenly by {self.world} ranks",
        )
        problems.need(
            not self.warm_spares or self.hosts in (None, 1),
            f"warm_spares={self.warm_spares} wait on the broker's machine, and a replica over hosts={self.hosts} could not "
            "use them",
        )
        for name in ("name", "mesh_name"):
            value = getattr(self, name)
            problems.need(
                value is None
                or (0 < len(value) <= 64 and all(letter.isalnum() or letter in "-_." for letter in value)),
                f"{name} must be 1 to 64 letters, digits, '-', '_' or '.', not {value!r}",
            )

    @property
    def initial_replicas(self) -> int:
        if self.num_replicas is not None:
            return self.num_replicas
        return 1 if self.min_replicas is None else self.min_replicas

    @property
    def limits(self) -> Limits:
        """How many replicas there may be. Where min_replicas is not given: 1, or 0 for a service that starts with none. Where max_replicas
        is not given, the policy may go to `DEFAULT_MOST`, or to twice as many as at the start if that is more; by hand, to any number."""
        initial = self.initial_replicas
        least = min(1, initial) if self.min_replicas is None else self.min_replicas
        unlimited = MOST_REPLICAS if self.autoscaling is None else max(DEFAULT_MOST, min(2 * initial, MOST_REPLICAS))
        most = unlimited if self.max_replicas is None else self.max_replicas
        return Limits(min(least, most), most)

    @property
    def world(self) -> int:
        """Ranks of one replica."""
        return self.procs * (self.hosts or 1)

    @property
    def gpus_per_rank(self) -> int:
        if self.gpus_per_replica is not None:
            return self.gpus_per_replica // self.world
        return 1 if self.with_gpus else 0

    @property
    def concurrency(self) -> int:
        """Calls a replica runs at once."""
        return self.replica_max_concurrent_requests if self.world == 1 else self.mesh_concurrency

    @property
    def mesh_sizes(self) -> dict[str, int]:
        """The dimensions of a replica's ranks, row-major."""
        return {"procs": self.procs} if self.hosts is None else {"hosts": self.hosts, "procs": self.procs}

    def replace(self, **options: Any) -> Self:
        """A copy with these options; what is not given is kept (A2). An unknown one fails, listing the known ones."""
        _refuse_unknown("options()", self.known_options(), options)
        if "default_replicas" in options and "num_replicas" not in options:
            options["num_replicas"] = options.pop("default_replicas")
        return dataclasses.replace(self, default_replicas=options.pop("default_replicas", None), **options)

    @classmethod
    def known_options(cls) -> frozenset[str]:
        return field_names(cls) | {"default_replicas"}

    def to_wire(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in sorted(field_names(type(self)))}
        return fields | {"autoscaling": None if self.autoscaling is None else self.autoscaling.to_wire()}

    @classmethod
    def from_wire(cls, fields: Any) -> Self:
        """Raises ConfigError for what is no such configuration. Unknown fields are a newer peer's: refused by name."""
        if not isinstance(fields, dict):
            raise ConfigError(where="ServiceConfig", message=f"a map was expected, not {type(fields).__name__}")
        _refuse_unknown("ServiceConfig", cls.known_options(), fields)
        problems = _Problems()
        autoscaling = fields.get("autoscaling")
        if isinstance(autoscaling, dict):
            made = AutoscalingConfig()
            try:
                # A peer's map may have anything for a key.
                made = AutoscalingConfig(**{str(name): value for name, value in autoscaling.items()})
            except ConfigError as error:
                problems.extend(f"autoscaling: {problem}" for problem in error.problems)
            fields = {**fields, "autoscaling": made}
        if isinstance(fields.get("fatal_errors"), list):  # a tuple, before it travelled
            fields = {**fields, "fatal_errors": tuple(fields["fatal_errors"])}
        try:
            config = cls(**fields)
        except ConfigError as error:
            problems.extend(error.problems)
        problems.tell("ServiceConfig")
        return config


_OF_BATCHES: Final = ("batch_weight", "batch_max_weight", "batch_key", "batch_eager", "batch_sessions", "collate")


@dataclass(frozen=True, kw_only=True)
class EndpointOptions:
    """What `@endpoint` and `@service_endpoint` take. Made once per endpoint, at decoration."""

    router: object = None  # instance, class or factory of a Router; None: round-robin
    batch_size: int = 1  # items per batch; 1: no batching
    batch_timeout: float = 0.01  # seconds after the first item
    batch_mode: str = "route"  # "call": the method takes lists
    batch_weight: object = None  # a function of the arguments, or the name of one: an item's weight, from 0 on; None: 1
    batch_max_weight: float | None = None  # of a batch; one item that weighs more goes alone
    batch_key: object = (
        None  # a function of the arguments, or the name of one: only items with equal keys share a batch
    )
    batch_eager: bool = False  # a batch leaves at once while a replica has room
    batch_sessions: bool = False  # calls of sessions share batches too, each session's in order
    collate: str | None = None  # "stack": arrays are stacked before the call, and the result is split after it
    threads: int = 1  # for a plain `def`: how many calls at once off the loop
    delivery: str | None = None  # None: the service's
    timeout: float | None = None  # seconds; a call's own `options(timeout=)` wins
    hang_timeout_s: float | None = None  # a call that runs longer restarts its replica; None: never
    replay_last: bool = False  # its last successful fan-out is played to replicas that start later (A11)

    def __post_init__(self) -> None:
        problems = _Problems()
        problems.types(self)
        problems.at_least(self, 1, "batch_size", "threads")
        problems.at_most(self, 1_000_000, "batch_size", "threads")
        problems.at_least(self, 0, "batch_timeout")
        problems.positive(self, "timeout", "hang_timeout_s", "batch_max_weight")
        for name in ("batch_weight", "batch_key"):
            one = getattr(self, name)
            # A bool is what the wire says of a function.
            problems.need(
                one is None or isinstance(one, (bool, str)) or callable(one),
                f"{name} must be a function of the arguments or the name of one, not {one!r:.60}",
            )
        problems.need(
            self.batch_max_weight is None or bool(self.batch_weight),
            "batch_max_weight needs batch_weight, which gives an item's weight",
        )
        problems.need(self.collate in (None, "stack"), f"collate must be 'stack', not {self.collate!r}")
        problems.need(self.collate is None or self.batch_mode == "call", "collate needs batch_mode='call'")
        if self.batch_size == 1:
            given = [name for name in _OF_BATCHES if getattr(self, name)]
            problems.need(not given, f"{', '.join(given)} without batch_size above 1: nothing is batched")
        problems.need(
            self.batch_mode in ("route", "call"), f"batch_mode must be 'route' or 'call', not {self.batch_mode!r}"
        )
        problems.need(
            self.delivery in (None, *DELIVERIES),
            f"delivery must be one of {', '.join(DELIVERIES)}, not {self.delivery!r}",
        )
        if self.router is not None:
            try:
                make_router(self.router)
            except ConfigError as error:
                problems.extend(error.fields.get("problems") or [f"router: {error.fields['message']}"])
        problems.tell("endpoint")

    @classmethod
    def checked(cls, where: str, options: Mapping[str, Any]) -> Self:
        _refuse_unknown(where, field_names(cls), options)
        return cls(**options)

    def to_wire(self) -> dict[str, Any]:
        """All but the router, which travels beside this, and what only clients ask, of which the wire says whether it is there."""
        fields = {name: getattr(self, name) for name in sorted(field_names(type(self)) - {"router"})}
        return fields | {name: True for name in ("batch_weight", "batch_key") if callable(fields[name])}


@dataclass(frozen=True, kw_only=True)
class BrokerConfig:
    """What a broker is started with. Times in seconds, sizes in bytes."""

    bind: tuple[str, ...] = ()  # addresses; empty: the user's own private ipc address
    insecure: bool = False  # allow binds beyond loopback, although nothing is encrypted
    http: str | None = None  # host:port for /metrics, /healthz, /readyz and /api/status; None: no HTTP
    log_dir: str | None = None  # workers' output; None: `logs` in the private directory
    max_workers: int = 64  # processes the local scaler may run at once
    gpus: tuple[str, ...] = ()  # GPU slots of this machine, as CUDA_VISIBLE_DEVICES names them
    embedded: bool = False  # started by a client: ends with it, and shows its workers' output

    heartbeat_s: float = 0.5
    liveness: int = 10  # heartbeats missed before a silent peer of another host is dead
    orphan_grace_s: float = 10.0  # how long workers and clients wait for a broker that vanished
    recovery_s: float = 3.0  # how long a broker that comes back waits for what its peers hold
    drain_grace_s: float = 30.0  # for running calls, when a worker or a replica is drained

    max_payload_bytes: int = 1 << 30  # arguments of one call, or one result
    max_message_bytes: int = 2 << 30  # one frame; libzmq drops the connection of who sends more
    link_bytes: int = 1 << 30  # unacknowledged, per peer and direction
    max_queue_bytes: int = 4 << 30  # arguments of all queued calls

    checkpoint_bytes: int = 256 << 20  # sessions' states kept, all together
    kept_reply_bytes: int = 64 << 20  # a worker's replies that no client is known to have yet
    shared_memory_from: int = 256 << 10  # a payload's arrays, from which peers of this machine share them; 0: never
    shared_memory_bytes: int = 1 << 30  # of one process; what has no room travels through the broker
    dead_letters: int = 1000
    dead_letter_bytes: int = 256 << 20  # their arguments, all together

    story_entries: int = 10_000  # remembered for `forge explain`

    def __post_init__(self) -> None:
        problems = _Problems()
        problems.types(self)
        problems.positive(self, "heartbeat_s", "orphan_grace_s", "recovery_s")
        problems.at_least(
            self, 0, "drain_grace_s", "checkpoint_bytes", "kept_reply_bytes", "dead_letters", "dead_letter_bytes"
        )
        problems.at_least(self, 0, "shared_memory_from", "shared_memory_bytes")
        problems.at_least(self, 1, "liveness", "story_entries", "max_payload_bytes", "link_bytes", "max_queue_bytes")
        problems.at_least(self, 0, "max_workers")
        problems.need(self.max_message_bytes >= self.max_payload_bytes, "max_message_bytes must hold max_payload_bytes")
        for name in ("bind", "gpus"):
            if not all(isinstance(one, str) for one in getattr(self, name)):
                problems.append(f"{name} must be str each, not {getattr(self, name)!r}")
                object.__setattr__(self, name, ())
        for address in self.bind:
            try:
                check_address(address, "bind")
            except ConfigError as error:
                problems.append(str(error))
        if self.http is not None:
            try:
                read_http(self.http)
            except ConfigError as error:
                problems.append(str(error))
        repeated = {gpu for gpu in self.gpus if self.gpus.count(gpu) > 1}
        problems.need(not repeated, f"gpus names {', '.join(sorted(repeated))} more than once")
        problems.tell("broker")

    @classmethod
    def checked(cls, options: Mapping[str, Any]) -> Self:
        _refuse_unknown("broker", field_names(cls), options)
        return cls(**options)
