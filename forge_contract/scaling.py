"""When a service grows and shrinks: the policy as a pure function, and the interface of custom ones (X1).

Nobody here measures, waits or starts anything. Whoever has a service (the broker's core, a simulator) makes an `Observation` of it,
gives it to `evaluate` with the state that the last evaluation returned, and does what the `Decision` says. The decision is one also when
it says that nothing is to be done: its rule and its reason are what `forge why-scale` shows.

Three figures are smoothed over `smoothing_s`, because a sample of a random process crosses any threshold sooner or later: the calls
that wait, the rate, and the load, in replicas' worth of work (utilisation × healthy replicas), which does not change with the number of
replicas.
Adding asks that the sample *and* the smoothed figure are past the threshold, so that neither a spike nor the memory of one is enough;
only an emergency believes the sample alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from forge_contract.errors import ConfigError

if TYPE_CHECKING:
    from forge_contract.config import AutoscalingConfig

DEFAULT_MOST: Final = 10  # replicas, where max_replicas is not given: one machine's worth, and no surprise on a bill
# A removal has to leave the rest this far below the threshold for adding: their noise comes on top of it.
HEADROOM: Final = 0.8
# How long low load is waited for at most, after removals that were taken back: twice an hour, no service flaps more often.
MOST_PATIENCE_S: Final = 3600.0
NOISE: Final = 1.0  # replicas' worth of work: by so much load may differ from what it was, and be the same
MOST_ASKED: Final = 1_000_000  # of a custom policy's number, more is the same: it may be too long to print
_NOTHING: Final = 1e-3  # of a call or of a replica's work: what decays never reaches zero


class Limits(NamedTuple):
    """How many replicas there may be, both included."""

    least: int
    most: int


class Observation(NamedTuple):
    """A service at one moment. Replicas that are being drained or stopped are not in it."""

    replicas: int = 0  # wanted, whatever they do
    healthy: int = 0
    starting: int = 0  # on their first way to being healthy, those without a place included; not those that recover
    queued: int = 0  # calls that wait for a replica; not those that wait only for company in a batch
    in_flight: int = 0
    capacity_utilization: float = (
        0.0  # 0.0 … 1.0: mean of in flight / limit over healthy replicas; 0 when there is none
    )
    request_rate: float = 0.0  # calls/s of the service, since the last observation or over some other window of time
    sessions: int = 0  # open
    never_healthy: int = 0  # `starting`, and those whose starts fail again and again

    @property
    def avg_queue_depth(self) -> float:
        """Calls waiting per healthy replica, of which at least one is supposed."""
        return self.queued / max(1, self.healthy)

    def figures(self) -> dict[str, Any]:
        shown = self._asdict() | {"avg_queue_depth": round(self.avg_queue_depth, 3)}
        return shown | {name: round(shown[name], 3) for name in ("capacity_utilization", "request_rate")}


class Decision(NamedTuple):
    """What to do (`delta` replicas more or less, 0: nothing), the rule that said so, and why.

    Rules that act: emergency, queue, capacity, rate (more), idle, low (fewer), wake (from zero), limits (into the limits).
    Rules that do not: steady, low, cooldown, limits, ratio, headroom, sessions; of the broker, pending. Of a custom policy:
    what it says, or custom, raised, clamped, nonsense.
    """

    delta: int
    rule: str
    reason: str
    figures: Mapping[str, Any] = {}


class PolicyState(NamedTuple):
    """What a policy knows from before; `evaluate` returns it anew. Times are those of the caller's clock."""

    last_up: float | None = None
    last_down: float | None = None
    low_since: float | None = None  # smoothed load and queue are at or below the thresholds for removing
    idle_since: float | None = None  # no call waits, runs or has come
    waiting: float = 0.0  # calls, smoothed
    load: float = 0.0  # replicas' worth of work, smoothed
    rate: float = 0.0  # calls/s, smoothed
    peak: float = 0.0  # the highest `load` of late, while it is low; forgotten as slowly as a removal is waited for
    regrets: int = (
        0  # one for a removal that was soon taken back, two if it was by noise, less one for each that lasted
    )
    load_then: float = 0.0  # `load` when a replica was last removed
    seen_at: float | None = None

    def seen(self, observation: Observation, config: AutoscalingConfig, now: float) -> PolicyState:
        """The state after an observation; a second time at the same moment changes nothing."""
        waiting, load = float(observation.queued), observation.capacity_utilization * observation.healthy
        rate = observation.request_rate
        passed = 0.0 if self.seen_at is None else max(0.0, now - self.seen_at)
        if self.seen_at is not None:
            kept = _kept(passed, config.smoothing_s)
            waiting, load = waiting + kept * (self.waiting - waiting), load + kept * (self.load - load)
            rate += kept * (self.rate - rate)
        waiting, load = (0.0 if value < _NOTHING else value for value in (waiting, load))
        healthy = max(1, observation.healthy)
        low_since, idle_since = self.low_since, self.idle_since
        peak = load
        if (
            load / healthy > config.scale_down_capacity_threshold
            or waiting / healthy > config.scale_down_queue_depth_threshold
        ):
            low_since = None
        elif low_since is None:
            low_since = now
        else:
            peak = max(load, self.peak * _kept(passed, config.scale_down_idle_time_threshold))
        if observation.queued or observation.in_flight or observation.request_rate > 0:
            idle_since = None
        elif idle_since is None:
            idle_since = now
        return self._replace(
            low_since=low_since,
            idle_since=idle_since,
            waiting=waiting,
            load=load,
            rate=rate,
            peak=peak,
            seen_at=now,
        )

    def after(self, delta: int, now: float) -> PolicyState:
        """The state after replicas were added or removed, by a decision or by hand."""
        if delta > 0:
            return self._replace(last_up=now)
        return self._replace(last_down=now, load_then=self.load) if delta < 0 else self

    def regretting(self, config: AutoscalingConfig, now: float) -> PolicyState:
        """The state when load asks for a replica more. If the last removal is taken back at once, the next one waits twice as long; if
        it lasted, half as long.

        Four times as long when it is taken back within an hour for hardly more load than there was then: that is noise, which asks
        again however long low load was waited for, so that a wait of minutes must soon become one of an hour.
        """
        if self.last_down is None or (self.last_up is not None and self.last_up > self.last_down):
            return self
        lasted_s = now - self.last_down
        if self.load <= self.load_then + NOISE and lasted_s <= MOST_PATIENCE_S:
            change = 2
        else:
            change = 1 if lasted_s <= self.patience_s(config) else -1
        return self._replace(regrets=min(max(0, self.regrets + change), 32))

    def patience_s(self, config: AutoscalingConfig) -> float:
        """How long load has to be low before a replica goes: `scale_down_idle_time_threshold`, doubled for each regret,
        up to an hour."""
        least = config.scale_down_idle_time_threshold
        return max(least, min(least * 2.0**self.regrets, MOST_PATIENCE_S))


def _kept(passed_s: float, over_s: float) -> float:
    """The share of an old value that is left."""
    return math.exp(-passed_s / over_s) if over_s > 0 else 0.0


class ScalingPolicy:
    """Subclass and override `decide`. Each service has its own instance, which must not need a clock or do I/O: it runs
    in the broker, between calls."""

    def decide(
        self, observation: Observation, config: AutoscalingConfig, limits: Limits, state: PolicyState, now: float
    ) -> Decision | int:
        """How many replicas more or fewer (a number, or a Decision with its reason). `now` is in seconds of a monotonic clock,
        `state` says when replicas were last added and removed. What is outside `limits` is cut to them and counted;
        what raises or is no decision changes nothing and is counted."""
        raise NotImplementedError(f"{type(self).__name__} does not override decide")

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class ThresholdPolicy(ScalingPolicy):
    """The one that AutoscalingConfig's thresholds describe: `decide` of this module. The default."""

    def decide(
        self, observation: Observation, config: AutoscalingConfig, limits: Limits, state: PolicyState, now: float
    ) -> Decision | int:
        return decide(observation, config, limits, state, now)


def decide(
    observation: Observation, config: AutoscalingConfig, limits: Limits, state: PolicyState, now: float
) -> Decision:
    """How many replicas a service should have more or fewer, and why (X1). Called once per evaluation.

    Replicas that are still starting count as if they carried their share already: while one loads, load is divided by one more, and asks
    for another only if it is too much even so. Nothing is added twice for the same load, and one that never gets ready does not
    block the service. An emergency counts in the same way; it ignores the cooldowns, so that each evaluation may add a step.

    1. Limits and the first call: below the least, above the most, or none at all while a call waits.
    2. Up: emergency, else queue, capacity or rate, which wait for the cooldowns.
    3. Down: low load for long enough, and all that speaks against a removal.
    """
    state = state.seen(observation, config, now)
    case = _Case(observation, config, limits, state, now)
    return case.into_limits() or case.up() or case.down()


class _Case(NamedTuple):
    observation: Observation
    config: AutoscalingConfig
    limits: Limits
    state: PolicyState
    now: float

    def says(self, delta: int, rule: str, reason: str) -> Decision:
        smoothed = {"smoothed_queue": round(self.state.waiting, 3), "smoothed_load": round(self.state.load, 3)}
        return Decision(delta, rule, reason, self.observation.figures() | smoothed)

    def into_limits(self) -> Decision | None:
        seen, limits = self.observation, self.limits
        if seen.replicas < limits.least:
            return self.says(limits.least - seen.replicas, "limits", f"{seen.replicas} of min_replicas={limits.least}")
        if seen.replicas > limits.most:
            return self.says(limits.most - seen.replicas, "limits", f"{seen.replicas} of max_replicas={limits.most}")
        if not seen.replicas and seen.queued and limits.most:
            return self.says(1, "wake", f"{seen.queued} waiting, and there is no replica")
        return None

    def up(self) -> Decision | None:
        seen, config = self.observation, self.config
        expected = max(1, seen.healthy + seen.starting)
        sample = seen.queued / expected
        if sample >= config.max_queue_depth_emergency:
            why = f"{sample:.1f} waiting per replica, max_queue_depth_emergency={config.max_queue_depth_emergency:g}"
            return self._add("emergency", why)
        past = self._past_a_threshold(expected)
        if past is None:
            return None
        if seen.replicas < self.limits.most and (cooling := self._cooling("up")):
            return self.says(0, "cooldown", f"{past[1]}; {cooling}")
        return self._add(*past)

    def _past_a_threshold(self, expected: int) -> tuple[str, str] | None:
        seen, config, state = self.observation, self.config, self.state
        waiting = min(seen.queued, state.waiting)
        if (depth := waiting / expected) >= (most := config.scale_up_queue_depth_threshold):
            return "queue", f"{depth:.1f} waiting per replica, scale_up_queue_depth_threshold={most:g}"
        load = min(seen.capacity_utilization * seen.healthy, state.load)
        if (share := load / expected) >= (most := config.scale_up_capacity_threshold):
            return "capacity", f"{share:.2f} of the room in use, scale_up_capacity_threshold={most:g}"
        # A rate alone says nothing of how long a call takes: it counts while a call waits, now and on average.
        rate = min(seen.request_rate, state.rate) / expected
        if waiting >= 1 and rate >= (most := config.scale_up_request_rate_threshold):
            return "rate", f"{rate:.1f} calls/s per replica, scale_up_request_rate_threshold={most:g}"
        return None

    def _add(self, rule: str, why: str) -> Decision:
        room = self.limits.most - self.observation.replicas
        if room <= 0:
            return self.says(0, "limits", f"{why}, but max_replicas={self.limits.most}")
        return self.says(min(room, self.config.scale_up_step_size), rule, why)

    def _cooling(self, direction: str) -> str:
        """Which time has to pass before the next event of this direction; empty when none has."""
        state, config = self.state, self.config
        last, cooldown = (
            (state.last_up, config.scale_up_cooldown)
            if direction == "up"
            else (state.last_down, config.scale_down_cooldown)
        )
        latest = max((at for at in (state.last_up, state.last_down) if at is not None), default=None)
        for since, wait, name in (
            (last, cooldown, f"scale_{direction}_cooldown"),
            (latest, config.min_time_between_scale_events, "min_time_between_scale_events"),
        ):
            if since is not None and self.now - since < wait:
                return f"{self.now - since:.1f} s of {name}={wait:g} have passed"
        return ""

    def down(self) -> Decision:
        seen, config, limits, state = self.observation, self.config, self.limits, self.state
        if state.low_since is None:
            return self.says(0, "steady", "no threshold is passed")
        if seen.replicas <= limits.least:
            return self.says(0, "limits", f"load is low, and min_replicas={limits.least}")
        low_s, patience = self.now - state.low_since, state.patience_s(config)
        if low_s < patience:
            again = ", longer for removals that were taken back" if state.regrets else ""
            return self.says(0, "low", f"load is low for {low_s:.1f} of {patience:g} s{again}")
        # Low load means little while replicas that carried it are gone. What has never carried any hides none: a place that is not
        # found, or a start that always fails, would else keep a service large for ever.
        have_been = seen.replicas - seen.never_healthy
        if seen.healthy < config.min_healthy_replicas_ratio * have_been:
            ratio = f"min_healthy_replicas_ratio={config.min_healthy_replicas_ratio:g}"
            return self.says(0, "ratio", f"{seen.healthy} of {have_been} replicas are healthy, {ratio}")
        if cooling := self._cooling("down"):
            return self.says(0, "cooldown", f"load is low; {cooling}")
        # To nothing only when there was nothing to do, and nobody's session would be lost.
        idle = state.idle_since is not None and self.now - state.idle_since >= patience
        least = limits.least if idle and not seen.sessions else max(1, limits.least)
        if seen.replicas <= least:
            if idle:
                return self.says(0, "sessions", f"the last replica stays for {seen.sessions} open sessions")
            return self.says(0, "steady", "the last replica stays while calls come")
        removed = min(config.scale_down_step_size, seen.replicas - least)
        most = HEADROOM * config.scale_up_capacity_threshold
        # Those that are not healthy go first and carried nothing.
        while removed and not self._bearable(seen.replicas - removed, most):
            removed -= 1
        if not removed:
            load = f"{state.peak:.2f} replicas' worth of work on {seen.replicas - 1}"
            return self.says(0, "headroom", f"load is low, but {load} would be near scale_up_capacity_threshold")
        return self.says(
            -removed, "low" if seen.replicas - removed else "idle", f"load is low for {low_s:.1f} of {patience:g} s"
        )

    def _bearable(self, remaining: int, most: float) -> bool:
        healthy = min(self.observation.healthy, remaining)
        return not healthy or self.state.peak < most * healthy


def make_policy(given: object) -> ScalingPolicy:
    """The policy behind an instance, a class or a factory. Raises ConfigError for anything else."""
    made = given
    if not isinstance(given, ScalingPolicy) and callable(given):
        try:
            made = given()
        except Exception as error:
            raise ConfigError(
                where="policy", message=f"{given!r:.100} raised {type(error).__name__}: {error}"
            ) from error
    if not isinstance(made, ScalingPolicy) or type(made).decide is ScalingPolicy.decide:
        raise ConfigError(
            where="policy",
            message=f"{given!r:.100} is no ScalingPolicy: give an instance, a subclass, a function that makes one, or 'module:qualname'",
        )
    return made


class Evaluation(NamedTuple):
    """A decision that may be carried out, the state for the next one, and what was wrong with the policy, if anything."""

    decision: Decision
    state: PolicyState
    flaw: str | None = None  # "raised", "clamped", "nonsense"


_FROM_LOAD: Final = frozenset({"emergency", "queue", "capacity", "rate", "wake"})


def evaluate(
    policy: ScalingPolicy,
    observation: Observation,
    config: AutoscalingConfig,
    limits: Limits,
    state: PolicyState,
    now: float,
) -> Evaluation:
    """Ask `policy` once, and make something that can be carried out of whatever it says. Never raises for a policy's sake."""
    state = state.seen(observation, config, now)
    flaw: str | None = None
    try:
        answer = policy.decide(observation, config, limits, state, now)
        decision = _as_decision(answer, observation)
    except Exception as error:
        flaw, why = "raised", f"{type(policy).__name__} raised {type(error).__name__}: {_text(error)}"
        decision = Decision(0, flaw, why[:500], observation.figures())
    else:
        if decision is None:
            flaw = "nonsense"
            why = f"{type(policy).__name__} returned {type(answer).__name__}, which is no Decision and no number"
            decision = Decision(0, flaw, why, observation.figures())
    possible = min(max(observation.replicas + decision.delta, limits.least), limits.most) - observation.replicas
    if possible != decision.delta and flaw is None:
        flaw = "clamped"
        asked = f"{decision.rule} asked for {decision.delta:+d}, cut to {limits.least} … {limits.most} replicas"
        decision = decision._replace(delta=possible, rule=flaw, reason=f"{asked}: {decision.reason}"[:500])
    if decision.delta > 0 and decision.rule in _FROM_LOAD:
        state = state.regretting(config, now)
    return Evaluation(decision, state.after(decision.delta, now), flaw)


def _text(error: Exception) -> str:
    try:
        return str(error)
    except Exception:  # it is the user's class
        return "an error without a text"


def _as_decision(answer: object, observation: Observation) -> Decision | None:
    """What a policy returned as a Decision of plain and bounded values, which can be shown anywhere; None for what is none."""
    if type(answer) is int:
        answer = Decision(answer, "custom", "a custom policy's number", observation.figures())
    if not isinstance(answer, Decision):
        return None
    fields: tuple[Any, ...] = answer  # of whatever types the policy gave them
    delta, rule, reason, figures = fields
    if not (type(delta) is int and isinstance(rule, str) and isinstance(reason, str) and isinstance(figures, Mapping)):
        return None
    shown = {
        str(name)[:40]: value if type(value) in (int, float) and abs(value) < 1e15 else str(value)[:100]
        for name, value in list(figures.items())[:32]
    }
    return Decision(min(max(delta, -MOST_ASKED), MOST_ASKED), rule[:40], reason[:500], shown)
