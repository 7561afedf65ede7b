"""The world around the core: what it computes can be checked against queueing theory, and the core behaves in it as it does elsewhere."""

from __future__ import annotations

from typing import Any

import pytest

from forge_broker.core import invariants
from forge_broker.simulator.figures import Figures
from forge_broker.simulator.model import ServiceModel
from forge_broker.simulator.setup import Setup, as_simulated
from forge_broker.simulator.traces import Trace, trace_of
from forge_broker.simulator.world import World, simulate
from forge_contract.errors import ConfigError
from forge_contract.routing import Router
from tests.core.peers import built_in, spec

FIXED = ServiceModel(mean_s=0.02)


def setup(
    trace: Trace, model: ServiceModel = FIXED, *, of: dict[str, Any] | None = None, options: Any = None, **rest: Any
) -> Setup:
    """`of`: the service's configuration, `options`: its endpoint's."""
    return Setup(
        spec=spec(endpoint_options=options, **(of or {})), endpoint="predict", trace=trace, model=model, **rest
    )


def constant(rate: float, seconds: float) -> Trace:
    return trace_of("constant", rate, rate, seconds)


def at(*moments: float, seconds: float = 10.0) -> Trace:
    return Trace("recorded", seconds, lambda at: 0.0, 0.0, moments)


def answers(figures: Figures) -> list[tuple[float, float]]:
    """Of each call: how long it waited, and how long it took in all."""
    return [(round(wait, 6), round(whole, 6)) for wait, whole in zip(figures.waits, figures.latencies, strict=True)]


def test_the_same_seed_is_the_same_run_and_another_is_not() -> None:
    scattered = ServiceModel(mean_s=0.02, spread=1.0)
    one, again, other = (simulate(setup(constant(20, 100), scattered, seed=seed)).told() for seed in (1, 1, 2))
    assert one == again != other
    assert one["calls"] == one["succeeded"] + one["outstanding_at_end"]


def test_how_a_start_is_made_fast_is_not_simulated_and_that_is_said() -> None:
    """X2: `start_s` says how long one takes, and nothing waits beside the replicas."""
    plain, fast = (setup(at(1.0, 2.0), of=of) for of in ({}, {"warm_spares": 2, "preload": True}))
    assert simulate(plain).told()["replica_seconds"] == simulate(fast).told()["replica_seconds"]
    _, config, notes = as_simulated(fast)
    assert (config.warm_spares, config.preload) == (0, False)
    assert any("start_s" in note for note in notes)


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_waiting_for_one_server_is_what_pollaczek_and_khinchine_say(spread: float) -> None:
    """Half of the time busy: rate × E[S²] / 2 (1 − ρ)."""
    model = ServiceModel(mean_s=0.02, spread=spread)
    told = simulate(setup(constant(25, 500), model, of={"replica_max_concurrent_requests": 1})).told()
    expected = 25 * 0.02**2 * (1 + spread**2) / (2 * 0.5)
    assert told["waiting_s"]["mean"] == pytest.approx(expected, rel=0.1)
    assert told["running_s"]["mean"] == pytest.approx(0.02, rel=0.02)


def test_a_call_waits_for_room_and_what_a_replica_has_in_excess_waits_inside_it() -> None:
    """Two at once of the three that the replica may have: the third begins when the first has ended, the fourth is not even sent."""
    model = ServiceModel(mean_s=1.0, parallel=2)
    of = {"replica_max_concurrent_requests": 3}
    figures = simulate(setup(at(0.0, 0.1, 0.2, 0.3), model, of=of, sample_s=0.25))
    assert answers(figures) == [(0.0, 1.0), (0.0, 1.0), (0.8, 1.8), (0.8, 1.8)]
    assert [(sample.in_flight, sample.queued) for sample in figures.samples[:3]] == [(3, 0), (3, 1), (3, 1)]
    assert figures.busy_seconds == pytest.approx(4.0)


def test_batches_are_as_configured_and_take_base_and_items() -> None:
    """B1: full ones leave at once, others `batch_timeout` after their first call."""
    options = {"batch_mode": "call", "batch_size": 4, "batch_timeout": 0.5}
    model = ServiceModel(batch_base_s=0.1, batch_item_s=0.01)
    figures = simulate(setup(at(1.0, 1.0, 1.0, 1.0, 1.0, 2.0), model, options=options))
    assert answers(figures)[:4] == [(0.0, 0.14)] * 4
    assert answers(figures)[4:] == [(0.5, 0.61)] * 2
    assert figures.batches["reasons"] == {"size": 1, "timeout": 2}
    assert figures.batches["sizes"] == {"1": 2, "4": 1}


def test_under_load_batches_are_full_and_never_more() -> None:
    options = {"batch_mode": "call", "batch_size": 8, "batch_timeout": 0.01}
    model = ServiceModel(batch_base_s=0.05, batch_item_s=0.001, parallel=1)
    of = {"replica_max_concurrent_requests": 1}
    figures = simulate(setup(constant(200, 60), model, options=options, of=of))
    assert figures.batches["avg_size"] > 7.9
    assert set(figures.batches["sizes"]) <= {"1", "2", "4", "8"}
    assert not figures.failed


def test_sessions_are_open_and_each_is_pinned_once() -> None:
    world = World(setup(constant(50, 20), of={"num_replicas": 3}, sessions=30))
    world.deploy()
    figures = world.run()
    assert not figures.failed
    assert len(world.service.pins) == 30
    assert sum(replica.sessions for replica in world.service.replicas.values()) == 30
    assert all(replica.sessions for replica in world.service.replicas.values())
    invariants.check(world.core)


@pytest.mark.parametrize("interruptible", [True, False])
def test_calls_beyond_their_timeout_fail_and_their_room_comes_back(interruptible: bool) -> None:
    """F5: the first two calls take longer than anybody waits. An async method ends with its caller, a thread goes on."""
    model = ServiceModel(mean_s=1.0, parallel=1)
    figures = simulate(setup(at(0.0, 0.0, 5.0), model, timeout_s=0.5, interruptible=interruptible))
    assert figures.failed == {"CallTimeout": 3}
    quick = simulate(setup(at(0.0, 0.6, 1.1), ServiceModel(mean_s=0.4, parallel=1), timeout_s=0.5))
    assert not quick.failed


def test_a_full_queue_refuses_and_the_books_add_up() -> None:
    of = {"replica_max_concurrent_requests": 1, "max_queued_requests": 5}
    world = World(setup(constant(100, 30), ServiceModel(mean_s=0.05), of=of))
    world.deploy()
    told = world.run().told()
    assert told["errors"].keys() == {"Overloaded"}
    assert told["queue"]["longest"] == 5
    assert told["succeeded"] == pytest.approx(600, abs=5)  # one every 50 ms, all the time
    assert told["calls"] == told["succeeded"] + told["failed"] + told["outstanding_at_end"]
    invariants.check(world.core)


def test_what_runs_is_paid_for_from_its_launch_to_its_end() -> None:
    figures = simulate(setup(constant(1, 100), ServiceModel(start_s=30.0), of={"num_replicas": 3}))
    assert figures.replica_seconds == pytest.approx(300)  # the trace begins when all are there
    assert figures.told(price=2.0)["cost"] == pytest.approx(300 / 3600 * 2, abs=1e-5)


class Last(Router):
    def get_replica(self, healthy_replicas: Any, sess_id: Any = None, session_map: Any = None) -> Any:
        return healthy_replicas[-1]


def test_routers_are_the_real_ones_and_ones_own() -> None:
    """R3, R4"""
    shares = {}
    for name, router in (("RoundRobinRouter", built_in("RoundRobinRouter")), ("Last", {"code": b"Last"})):
        described = spec(num_replicas=2, routers={"predict": router})
        given = Setup(
            spec=described, endpoint="predict", trace=at(*range(8)), model=FIXED, unpickle=lambda code: Last()
        )
        world = World(given)
        world.deploy()
        world.run()
        shares[name] = [replica.stats.total for replica in world.service.replicas.values()]
    assert shares == {"RoundRobinRouter": [4, 4], "Last": [0, 8]}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"endpoint": "predit"}, "no endpoint 'predit'; there is predict"),
        ({"spec": spec(routers={"predict": {"code": b"x"}})}, "nobody said how to load it"),
    ],
)
def test_what_cannot_be_simulated_says_why(wrong: dict[str, Any], said: str) -> None:
    given = {"spec": spec(), "endpoint": "predict", "trace": at(1.0), "model": FIXED, **wrong}
    with pytest.raises(ConfigError) as error:
        simulate(Setup(**given))
    assert said in str(error.value)


def test_a_model_is_judged_whole() -> None:
    with pytest.raises(ConfigError) as error:
        ServiceModel(mean_s=-1.0, spread=float("nan"), parallel=0)
    for word in ("mean_s", "spread", "parallel"):
        assert word in str(error.value)
