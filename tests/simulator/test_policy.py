"""The policy with the mechanism and a service around it, for hours: what it must never do (X1, X2). A replica does four calls at once, of
four seconds each: so many calls a second as there are replicas keep all of them busy."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from forge_broker.core import invariants
from forge_broker.simulator.figures import Figures
from forge_broker.simulator.model import ServiceModel
from forge_broker.simulator.setup import Setup
from forge_broker.simulator.traces import Trace, trace_of
from forge_broker.simulator.world import World
from forge_contract.config import AutoscalingConfig
from tests.core.peers import spec

FOUR = ServiceModel(mean_s=4.0, spread=0.5, start_s=5.0)
HOUR_S = 3600.0
SETTLED_S = 1800.0


def world(trace: Trace, model: ServiceModel = FOUR, *, sample_s: float = 1.0, seed: int = 1, **options: Any) -> World:
    """`options`: of ServiceConfig and, where they are, of AutoscalingConfig."""
    names = AutoscalingConfig.__dataclass_fields__.keys() & options.keys()
    autoscaling = AutoscalingConfig(**{name: options.pop(name) for name in names})
    config = {"replica_max_concurrent_requests": 4, "max_replicas": 20, **options}
    described = spec(autoscaling=autoscaling, **config)
    made = World(Setup(spec=described, endpoint="predict", trace=trace, model=model, sample_s=sample_s, seed=seed))
    made.deploy()
    return made


def ran(*args: Any, **options: Any) -> Figures:
    made = world(*args, **options)
    figures = made.run()
    invariants.check(made.core)
    assert not figures.failed, figures.failed
    return figures


def constant(rate: float, seconds: float = SETTLED_S + HOUR_S) -> Trace:
    return trace_of("constant", rate, rate, seconds)


def bursts(*when: tuple[float, int], seconds: float) -> Trace:
    """So many calls at once, at these moments."""
    return Trace("bursts", seconds, lambda at: 0.0, 0.0, tuple(at for at, count in when for _ in range(count)))


NEAR: Any = {"scale_up_capacity_threshold": 0.6, "scale_down_capacity_threshold": 0.5}


@pytest.mark.parametrize(
    ("rate", "options"),
    [
        (1.25, {"num_replicas": 1}),
        (2.4, {"num_replicas": 1, "scale_down_idle_time_threshold": 60.0}),  # 0.8 of three replicas
        (1.0, {"num_replicas": 10, "scale_down_idle_time_threshold": 60.0}),
        (0.6, {"num_replicas": 4, "replica_max_concurrent_requests": 1}),
        # Low for four replicas, and now and then too much for three.
        (1.5, {"num_replicas": 5, "scale_down_idle_time_threshold": 60.0, **NEAR}),
        (1.5, {"num_replicas": 5, **NEAR}),
    ],
    ids=["grows", "at the threshold", "shrinks", "one call at a time", "near and soon", "near"],
)
def test_a_noisy_constant_load_settles(rate: float, options: dict[str, Any]) -> None:
    """X1: at most two scale events in the hour after the first half."""
    figures = ran(constant(rate), min_replicas=1, sample_s=60.0, **options)
    late = [event for event in figures.events if event.at > SETTLED_S]
    assert len(late) <= 2, late
    load = [sample.in_flight for sample in figures.samples[30:]]
    assert sum(load) / len(load) == pytest.approx(4 * rate, rel=0.25)  # it is served as fast as it comes
    work = 4 * rate / options.get("replica_max_concurrent_requests", 4)  # replicas that it keeps busy
    assert work < figures.samples[-1].wanted <= 4 * work


def test_a_day_is_followed_up_and_down_without_a_failed_call_nor_less_than_min_replicas() -> None:
    """X1, X2: a day of an hour, from half a replica's work to six times as much and back."""
    figures = ran(
        trace_of("diurnal", 0.5, 6.0, HOUR_S),
        num_replicas=2,
        min_replicas=2,
        scale_down_idle_time_threshold=60.0,
        min_time_between_scale_events=30.0,
        scale_down_cooldown=30.0,
        sample_s=5.0,
    )
    wanted = [sample.wanted for sample in figures.samples]
    assert max(wanted) >= 7
    assert wanted[-1] <= 5
    assert min(wanted) == 2
    assert min(sample.healthy for sample in figures.samples) >= 2
    assert figures.told()["waiting_s"]["p90"] < 1.0
    # As many for the whole hour would be hardly quicker.
    assert figures.replica_seconds < 0.75 * max(wanted) * HOUR_S


def test_no_replica_is_removed_while_less_than_the_ratio_is_healthy() -> None:
    """X1: three of four die while there is next to nothing to do, and take ten minutes to come back."""
    made = world(
        constant(0.2, 1500.0),
        ServiceModel(mean_s=1.0, start_s=600.0),
        num_replicas=4,
        min_replicas=1,
        scale_down_idle_time_threshold=60.0,
        min_healthy_replicas_ratio=0.5,
        start_timeout_s=900.0,
    )
    doomed = sorted(made.core.state.launches)[:3]
    for launch in doomed:
        made.later(10.0, lambda launch=launch: made.end_process(launch, "signal SIGKILL"))  # type: ignore[misc]
    figures = made.run()
    assert figures.decisions["ratio"] > 400
    for event in figures.events:
        before = [sample for sample in figures.samples if sample.at <= event.at][-1]
        assert event.delta < 0
        assert before.healthy >= 0.5 * before.wanted, event
    assert figures.events[0].at > 600.0
    assert figures.told()["replicas"]["fewest_healthy"] == 1


def test_an_emergency_is_answered_within_one_evaluation_whatever_the_cooldowns() -> None:
    """X1: a second after the last change, 200 calls come at once."""
    options = {"min_time_between_scale_events": 3000.0, "scale_up_cooldown": 3000.0, "evaluate_every_s": 2.0}
    figures = ran(bursts((100.0, 5), (101.0, 200), seconds=400.0), num_replicas=1, min_replicas=1, **options)
    first = figures.events[0]
    assert (first.rule, first.delta) == ("emergency", 1)
    assert 101.0 <= first.at <= 103.0
    assert all(event.rule == "emergency" for event in figures.events if event.delta > 0)
    # One more for each evaluation, as long as those that start would not be enough.
    ups = [event.at for event in figures.events if event.delta > 0]
    assert len(ups) > 2
    assert {round(after - before, 6) for before, after in pairwise(ups)} == {2.0}


def test_an_emergency_stays_within_max_replicas() -> None:
    figures = ran(bursts((10.0, 2000), seconds=900.0), num_replicas=1, min_replicas=1, max_replicas=5)
    assert max(sample.wanted for sample in figures.samples) == 5
    assert max(sample.processes for sample in figures.samples) == 5


def test_a_service_goes_to_zero_when_idle_and_comes_back_for_the_first_call_which_waits() -> None:
    """X1: nothing is paid for in between."""
    figures = ran(
        bursts((10.0, 1), (2000.0, 1), seconds=2100.0),
        ServiceModel(mean_s=1.0, start_s=7.0),
        num_replicas=1,
        min_replicas=0,
        scale_down_idle_time_threshold=60.0,
    )
    assert [(event.delta, event.rule) for event in figures.events[:2]] == [(-1, "idle"), (1, "wake")]
    down, up = figures.events[:2]
    assert 70.0 <= down.at <= 140.0
    assert up.at == pytest.approx(2000.0, abs=0.01)
    assert list(figures.latencies) == pytest.approx([1.0, 7.0 + 1.0], abs=0.05)
    between = [sample for sample in figures.samples if down.at + 5 < sample.at < 2000.0]
    assert {(sample.wanted, sample.processes) for sample in between} == {(0, 0)}
    assert figures.replica_seconds == pytest.approx(sum(sample.processes for sample in figures.samples), abs=5.0)
    assert figures.told()["replicas"] == {"fewest": 0, "most": 1, "at_end": 1, "fewest_healthy": 0}


def test_a_service_that_starts_with_nothing_comes_for_its_first_call() -> None:
    """X1"""
    figures = ran(bursts((50.0, 3), seconds=100.0), num_replicas=0, min_replicas=0)
    first = figures.events[0]
    assert first.rule == "wake"
    assert first.at == pytest.approx(50.0, abs=0.01)
    assert len(figures.latencies) == 3
    assert max(sample.wanted for sample in figures.samples) == 1
