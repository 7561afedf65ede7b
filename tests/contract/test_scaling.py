"""The policy: every parameter by what happens just below and just above it, and what holds for any load (X1)."""

from __future__ import annotations

import dataclasses
import random
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forge_contract.config import AutoscalingConfig, ServiceConfig
from forge_contract.scaling import (
    MOST_PATIENCE_S,
    Decision,
    Limits,
    Observation,
    PolicyState,
    ThresholdPolicy,
    decide,
    evaluate,
)
from tests.contract.policies import Says

DEFAULT = AutoscalingConfig()
BUSY = Observation(replicas=2, healthy=2, in_flight=10, capacity_utilization=0.5, request_rate=5.0)
QUIET = Observation(replicas=4, healthy=4)
FRESH = PolicyState()
LOW = PolicyState(low_since=-300.0, seen_at=-1.0)  # long enough for a removal, and never scaled


class Case(NamedTuple):
    observation: Observation
    state: PolicyState = FRESH
    limits: Limits = Limits(1, 10)
    config: dict[str, Any] = {}  # noqa: RUF012  (never written to)


def outcome(case: Case) -> tuple[int, str]:
    config = dataclasses.replace(DEFAULT, **case.config)
    decision = decide(case.observation, config, case.limits, case.state, 0.0)
    assert decision.reason
    return decision.delta, decision.rule


QUEUE, EMERGENCY = BUSY._replace(queued=10), BUSY._replace(queued=40)


@pytest.mark.parametrize(
    ("below", "above", "expected"),
    [
        # Up, each threshold per healthy replica.
        (Case(BUSY._replace(queued=9)), Case(QUEUE), ((0, "steady"), (1, "queue"))),
        (
            Case(BUSY._replace(capacity_utilization=0.79)),
            Case(BUSY._replace(capacity_utilization=0.8)),
            ((0, "steady"), (1, "capacity")),
        ),
        (
            Case(BUSY._replace(queued=1, request_rate=19.9)),
            Case(BUSY._replace(queued=1, request_rate=20.0)),
            ((0, "steady"), (1, "rate")),
        ),
        # A rate of what never waits is no reason.
        (
            Case(BUSY._replace(request_rate=99.0)),
            Case(BUSY._replace(queued=1, request_rate=99.0)),
            ((0, "steady"), (1, "rate")),
        ),
        (Case(BUSY._replace(queued=39)), Case(EMERGENCY), ((1, "queue"), (1, "emergency"))),
        # Those that start count as if they carried their share.
        (
            Case(BUSY._replace(queued=14, starting=1)),
            Case(BUSY._replace(queued=15, starting=1)),
            ((0, "steady"), (1, "queue")),
        ),
        (
            Case(BUSY._replace(queued=59, starting=1)),
            Case(BUSY._replace(queued=60, starting=1)),
            ((1, "queue"), (1, "emergency")),
        ),
        # What is past a threshold now was not on average, or the other way round.
        (
            Case(QUEUE, PolicyState(seen_at=-5.0)),
            Case(QUEUE, PolicyState(seen_at=-5.0, waiting=10.0)),
            ((0, "steady"), (1, "queue")),
        ),
        (
            Case(BUSY, PolicyState(seen_at=-1.0, waiting=99.0)),
            Case(QUEUE, PolicyState(seen_at=-1.0, waiting=99.0)),
            ((0, "steady"), (1, "queue")),
        ),
        (
            Case(QUEUE, PolicyState(seen_at=-5.0)),
            Case(QUEUE, PolicyState(seen_at=-5.0), config={"smoothing_s": 0.1}),
            ((0, "steady"), (1, "queue")),
        ),
        # Cooldowns.
        (
            Case(QUEUE, PolicyState(last_up=-59.9)),
            Case(QUEUE, PolicyState(last_up=-60.0)),
            ((0, "cooldown"), (1, "queue")),
        ),
        (
            Case(QUEUE, PolicyState(last_down=-59.9)),
            Case(QUEUE, PolicyState(last_down=-60.0)),
            ((0, "cooldown"), (1, "queue")),
        ),
        (
            Case(QUEUE, PolicyState(last_up=-29.9), config={"min_time_between_scale_events": 0.0}),
            Case(QUEUE, PolicyState(last_up=-30.0), config={"min_time_between_scale_events": 0.0}),
            ((0, "cooldown"), (1, "queue")),
        ),
        (
            Case(QUEUE, PolicyState(last_up=-1.0, last_down=-1.0)),
            Case(EMERGENCY, PolicyState(last_up=-1.0, last_down=-1.0)),
            ((0, "cooldown"), (1, "emergency")),
        ),
        (
            Case(QUIET, LOW._replace(last_down=-119.9)),
            Case(QUIET, LOW._replace(last_down=-120.0)),
            ((0, "cooldown"), (-1, "low")),
        ),
        (
            Case(QUIET, LOW._replace(last_up=-59.9)),
            Case(QUIET, LOW._replace(last_up=-60.0)),
            ((0, "cooldown"), (-1, "low")),
        ),
        # Steps and limits.
        (Case(QUEUE), Case(QUEUE, config={"scale_up_step_size": 3}), ((1, "queue"), (3, "queue"))),
        (
            Case(QUEUE, limits=Limits(1, 2)),
            Case(QUEUE, limits=Limits(1, 4), config={"scale_up_step_size": 3}),
            ((0, "limits"), (2, "queue")),
        ),
        (Case(EMERGENCY, limits=Limits(1, 2)), Case(EMERGENCY, limits=Limits(1, 3)), ((0, "limits"), (1, "emergency"))),
        (Case(QUIET, LOW), Case(QUIET, LOW, config={"scale_down_step_size": 9}), ((-1, "low"), (-3, "low"))),
        (Case(QUIET, LOW, Limits(4, 9)), Case(QUIET, LOW, Limits(3, 9)), ((0, "limits"), (-1, "low"))),
        (Case(QUIET, FRESH, Limits(6, 9)), Case(QUIET, FRESH, Limits(1, 2)), ((2, "limits"), (-2, "limits"))),
        # Down: low for long enough, in use and in queue.
        (Case(QUIET, LOW._replace(low_since=-299.9)), Case(QUIET, LOW), ((0, "low"), (-1, "low"))),
        (
            Case(QUIET._replace(capacity_utilization=0.31), LOW._replace(load=1.24)),
            Case(QUIET._replace(capacity_utilization=0.3), LOW._replace(load=1.2)),
            ((0, "steady"), (-1, "low")),
        ),
        (
            Case(QUIET._replace(queued=5), LOW._replace(waiting=5.0)),
            Case(QUIET._replace(queued=4), LOW._replace(waiting=4.0)),
            ((0, "steady"), (-1, "low")),
        ),
        (Case(QUIET._replace(healthy=1), LOW), Case(QUIET._replace(healthy=2), LOW), ((0, "ratio"), (-1, "low"))),
        (
            Case(QUIET._replace(healthy=2), LOW, config={"min_healthy_replicas_ratio": 0.6}),
            Case(QUIET._replace(healthy=1), LOW, config={"min_healthy_replicas_ratio": 0.25}),
            ((0, "ratio"), (-1, "low")),
        ),
        # What was never healthy is not missed: no place for it, or starts that fail.
        (
            Case(QUIET._replace(healthy=1, never_healthy=1), LOW),
            Case(QUIET._replace(healthy=1, never_healthy=2), LOW),
            ((0, "ratio"), (-1, "low")),
        ),
        # What would bring the rest near the threshold for adding stays.
        (
            Case(BUSY, LOW._replace(load=1.0), config={"scale_down_capacity_threshold": 0.6}),
            Case(
                BUSY,
                LOW._replace(load=1.0),
                config={"scale_down_capacity_threshold": 0.6, "scale_up_capacity_threshold": 1.0},
            ),
            ((0, "headroom"), (0, "headroom")),
        ),
        (
            Case(
                BUSY._replace(capacity_utilization=0.33),
                LOW._replace(load=0.66),
                config={"scale_down_capacity_threshold": 0.5},
            ),
            Case(
                BUSY._replace(capacity_utilization=0.31),
                LOW._replace(load=0.62),
                config={"scale_down_capacity_threshold": 0.5},
            ),
            ((0, "headroom"), (-1, "low")),
        ),
        # To zero and back.
        (
            Case(Observation(), limits=Limits(0, 9)),
            Case(Observation(queued=1), PolicyState(last_down=0.0), Limits(0, 9)),
            ((0, "limits"), (1, "wake")),
        ),
        (
            Case(QUIET._replace(replicas=1, healthy=1), LOW._replace(idle_since=-299.9), Limits(0, 9)),
            Case(QUIET._replace(replicas=1, healthy=1), LOW._replace(idle_since=-300.0), Limits(0, 9)),
            ((0, "steady"), (-1, "idle")),
        ),
        (
            Case(QUIET._replace(replicas=1, healthy=1, sessions=1), LOW._replace(idle_since=-300.0), Limits(0, 9)),
            Case(QUIET._replace(replicas=2, healthy=2, sessions=1), LOW._replace(idle_since=-300.0), Limits(0, 9)),
            ((0, "sessions"), (-1, "low")),
        ),
    ],
)
def test_each_parameter_decides_at_its_value(
    below: Case, above: Case, expected: tuple[tuple[int, str], tuple[int, str]]
) -> None:
    """X1: the specification's tables."""
    assert (outcome(below), outcome(above)) == expected


observations = st.builds(
    lambda healthy, starting, lost, **rest: Observation(
        replicas=healthy + starting + lost, healthy=healthy, starting=starting, never_healthy=starting, **rest
    ),
    *[st.integers(0, 12)] * 3,
    queued=st.sampled_from([0, 0, 1, 7, 30, 500]),
    in_flight=st.sampled_from([0, 3]),
    capacity_utilization=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    request_rate=st.sampled_from([0.0, 5.0, 500.0]),
    sessions=st.sampled_from([0, 2]),
)
configs = st.builds(
    AutoscalingConfig,
    min_time_between_scale_events=st.sampled_from([0.0, 5.0, 60.0]),
    scale_up_cooldown=st.sampled_from([0.0, 30.0]),
    scale_down_cooldown=st.sampled_from([0.0, 120.0]),
    scale_up_step_size=st.integers(1, 5),
    scale_down_step_size=st.integers(1, 5),
    scale_down_idle_time_threshold=st.sampled_from([0.0, 10.0]),
    min_healthy_replicas_ratio=st.sampled_from([0.0, 0.5, 1.0]),
    smoothing_s=st.sampled_from([0.0, 10.0]),
)
limits_of_any_kind = st.tuples(st.integers(0, 6), st.integers(0, 6)).map(lambda two: Limits(two[0], max(1, sum(two))))


@given(st.lists(st.tuples(observations, st.sampled_from([0.1, 1.0, 40.0])), max_size=30), configs, limits_of_any_kind)
def test_whatever_is_observed_limits_cooldowns_and_the_healthy_ratio_hold(
    course: list[tuple[Observation, float]], config: AutoscalingConfig, limits: Limits
) -> None:
    """X1: only an emergency, the limits and the first call ignore the cooldowns, and nothing ignores the limits."""
    state, now, ups, events = FRESH, 0.0, [-1e9], [-1e9]
    for observation, passed in course:
        now += passed
        decision, state, flaw = evaluate(ThresholdPolicy(), observation, config, limits, state, now)
        assert flaw is None
        assert limits.least <= observation.replicas + decision.delta <= limits.most
        if decision.rule in ("emergency", "limits", "wake"):
            assert not (decision.rule == "emergency" and decision.delta < 0)
        elif decision.delta:
            assert now - events[-1] >= config.min_time_between_scale_events
        if decision.rule in ("queue", "capacity", "rate"):
            assert 0 < decision.delta <= config.scale_up_step_size
            assert now - ups[-1] >= config.scale_up_cooldown
        if decision.rule in ("low", "idle") and decision.delta:
            assert -config.scale_down_step_size <= decision.delta < 0
            have_been = observation.replicas - observation.never_healthy
            assert observation.healthy >= config.min_healthy_replicas_ratio * have_been
        if decision.rule == "idle":
            assert observation.queued + observation.in_flight + observation.sessions == 0
        if decision.delta:
            events.append(now)
        if decision.delta > 0:
            ups.append(now)


@pytest.mark.parametrize("limit", [1, 10])
@pytest.mark.parametrize("work", [0.5, 2.9, 5.6])
def test_a_noisy_constant_load_settles(limit: int, work: float) -> None:
    """X1: after an hour, at most two events an hour. Arrivals and times of service are random; `work` is in calls at once, per `limit`."""
    chance, now, state, replicas = random.Random(f"{limit} {work}"), 0.0, FRESH, 4
    present, events = 0, []
    while now < 2 * 3600:
        now += 1.0
        # One second of an M/M/∞-like queue: whoever is served leaves with probability ½.
        present += sum(chance.expovariate(1.0) < 1.0 for _ in range(round(work * limit)))
        served = min(present, replicas * limit)
        present -= sum(chance.random() < 0.63 for _ in range(served))
        served = min(present, replicas * limit)
        seen = Observation(
            replicas, replicas, 0, present - served, served, served / (replicas * limit), work * limit, 0
        )
        decision, state, _ = evaluate(ThresholdPolicy(), seen, DEFAULT, Limits(1, 20), state, now)
        replicas += decision.delta
        if decision.delta:
            events.append(now)
    assert len([at for at in events if at > 3600]) <= 2, events
    assert replicas <= max(2, 4 * work)  # and not by having more than anybody needs


def test_a_removal_that_is_taken_back_soon_makes_the_next_one_wait_twice_as_long() -> None:
    """X1: up to an hour; each that lasts halves it. The load that takes it back has grown since."""

    def taken_back(state: PolicyState, after_s: float) -> PolicyState:
        removed = state.after(-1, (state.seen_at or 0.0) + 100.0)._replace(load_then=-1.0)
        at = (removed.last_down or 0.0) + after_s
        return evaluate(ThresholdPolicy(), EMERGENCY, DEFAULT, Limits(1, 9), removed, at).state

    state, waits = FRESH, []
    for after_s in [1.0] * 6 + [1e5] * 6:
        state = taken_back(state, after_s)
        waits.append(state.patience_s(DEFAULT))
    assert waits[:6] == [600, 1200, 2400, 3600, 3600, MOST_PATIENCE_S]
    assert waits[6:] == [3600, 3600, 2400, 1200, 600, 300]


@pytest.mark.parametrize(
    ("load_then", "after_s", "regrets"),
    [(1.5, 3599.0, 3), (1.5, 3601.0, 0), (0.0, 599.0, 2), (0.0, 601.0, 0)],
    ids=["the same load", "the same load, long after", "more load, soon after", "more load, later"],
)
def test_what_noise_takes_back_within_an_hour_counts_twice_and_a_load_that_has_grown_only_at_once(
    load_then: float, after_s: float, regrets: int
) -> None:
    """X1: two replicas' work asks for a replica more, after one regret. Noise asks so again and again; a grown load is another one."""
    full = Observation(replicas=2, healthy=2, in_flight=20, capacity_utilization=1.0, request_rate=9.0)
    removed = PolicyState(load=load_then, regrets=1).after(-1, 0.0)
    state = evaluate(ThresholdPolicy(), full, DEFAULT, Limits(1, 9), removed, after_s).state
    assert (state.last_up, state.regrets) == (after_s, regrets)


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (2, (2, "custom", None)),
        (Decision(-1, "mine", "because"), (-1, "mine", None)),
        (10**4000, (5, "clamped", "clamped")),
        (-(10**4000), (-2, "clamped", "clamped")),
        (ZeroDivisionError("oh"), (0, "raised", "raised")),
        (Mute(), (0, "raised", "raised")),
        (Decision(1, "x", "y", figures={"a": Mute()}), (0, "raised", "raised")),
        *((nonsense, (0, "nonsense", "nonsense")) for nonsense in (None, 1.5, True, "2", Decision("1", "x", "y"))),  # type: ignore[arg-type]
        (Decision(1, "x", "y", figures=5), (0, "nonsense", "nonsense")),  # type: ignore[arg-type]
    ],
)
def test_a_custom_policys_slips_are_cut_to_the_limits_or_change_nothing(
    answer: Any, expected: tuple[int, str, str | None]
) -> None:
    """X1: counted by their kind, and shown."""
    decision, _, flaw = evaluate(
        Says(answer), BUSY._replace(replicas=4, healthy=4), DEFAULT, Limits(2, 9), PolicyState(), 0.0
    )
    assert (decision.delta, decision.rule, flaw) == expected
    assert len(decision.reason) <= 500


def test_limits_that_are_not_given_are_one_and_a_documented_most() -> None:
    """X1, A3: by hand, where nothing scales by itself, there is no most."""
    on = AutoscalingConfig()
    assert ServiceConfig(autoscaling=on).limits == (1, 10)
    assert ServiceConfig(autoscaling=on, num_replicas=8).limits == (1, 16)
    assert ServiceConfig(autoscaling=on, num_replicas=0).limits == (0, 10)
    assert ServiceConfig(autoscaling=on, min_replicas=0, max_replicas=3).limits == (0, 3)
    assert ServiceConfig(num_replicas=2).limits == (1, 4096)
