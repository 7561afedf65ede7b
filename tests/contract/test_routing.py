"""The built-in routers, and what may be given for one (R2, R3)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from forge_contract.errors import ConfigError
from forge_contract.routing import (
    ConsistentHashRouter,
    LeastLoadedRouter,
    ListPool,
    PowerOfTwoRouter,
    RoundRobinRouter,
    Router,
    SessionRouter,
    build_router,
    describe_router,
    make_router,
)


def views(*loads: int, limit: int = 10) -> list[Any]:
    return [SimpleNamespace(idx=idx, current_load=load, has_room=load < limit) for idx, load in enumerate(loads)]


def picks(router: Router, candidates: list[Any], count: int) -> list[int]:
    return [router.get_replica(candidates).idx for _ in range(count)]


def test_round_robin_takes_each_with_room_in_turn() -> None:
    """R3."""
    assert picks(RoundRobinRouter(), views(0, 10, 0, 0), 6) == [0, 2, 3, 0, 2, 3]


def test_least_loaded_rotates_among_equals() -> None:
    """R3."""
    assert picks(LeastLoadedRouter(), views(1, 0, 0, 5), 4) == [1, 2, 1, 2]


def test_power_of_two_prefers_the_less_loaded_and_skips_the_full() -> None:
    """R3: drawn from its own seed."""
    found = Counter(picks(PowerOfTwoRouter(seed=1), views(9, 0, 10), 400))
    assert found[1] > 200
    assert found[2] == 0
    assert picks(PowerOfTwoRouter(3), views(0, 0, 0), 20) == picks(PowerOfTwoRouter(3), views(0, 0, 0), 20)


def test_the_balancers_say_so_when_nobody_has_room() -> None:
    """R3: the broker never asks then; a custom router that filters may."""
    for router in (RoundRobinRouter(), LeastLoadedRouter(), PowerOfTwoRouter()):
        with pytest.raises(LookupError, match="has room"):
            router.get_replica(views(10, 10))


def test_a_key_stays_where_it_is_and_a_change_moves_only_its_share() -> None:
    """R3: Karger et al.; a fifth replica takes about a fifth of the keys, and nobody else's move."""
    router = ConsistentHashRouter()
    keys = [{"key": f"user-{n}"} for n in range(1000)]
    four = [router.get_replica(views(*[0] * 4), hints=key).idx for key in keys]
    five = [router.get_replica(views(*[0] * 5), hints=key).idx for key in keys]
    assert [router.get_replica(views(*[0] * 4), hints=key).idx for key in keys] == four
    moved = [(before, after) for before, after in zip(four, five, strict=True) if before != after]
    assert {after for _, after in moved} == {4}
    assert 100 < len(moved) < 350
    assert min(Counter(four).values()) > 100


def test_a_hash_falls_back_to_the_session_and_then_to_the_least_loaded_and_may_choose_a_full_one() -> None:
    """R2, R3."""
    router = ConsistentHashRouter()
    assert len({router.get_replica(views(0, 0, 0), "s").idx for _ in range(5)}) == 1
    assert router.get_replica(views(3, 1, 2)).idx == 1
    assert router.get_replica(views(10, 10), "s").has_room is False


def test_the_session_router_goes_where_the_session_is_pinned() -> None:
    """R3."""
    router = SessionRouter(RoundRobinRouter())
    assert router.get_replica(views(0, 10, 0), "s", {"s": 1}).idx == 1
    assert router.get_replica(views(0, 0, 0), "s", {"s": 9}).idx == 0
    assert router.get_replica(views(0, 0, 0)).idx == 1


@pytest.mark.parametrize(
    "router",
    [RoundRobinRouter(), LeastLoadedRouter(), PowerOfTwoRouter(1), ConsistentHashRouter(), SessionRouter()],
    ids=repr,
)
def test_no_built_in_router_looks_at_every_replica_of_a_pool(router: Router) -> None:
    """R3: for a call without a session, for one with, and for one whose session is pinned."""

    class Counted(ListPool):
        def __iter__(self) -> Iterator[Any]:
            raise AssertionError(f"{router} looks at all")

    pool: Any = Counted(views(0, 0, 0))
    for session, pins in ((None, {}), ("s", {}), ("s", {"s": 2}), ("s", {"s": 9})):
        assert router.get_replica(pool, session, pins) in pool._replicas


def test_an_instance_a_class_and_a_factory_are_accepted() -> None:
    """R2."""
    instance = LeastLoadedRouter()
    assert make_router(instance) is instance
    assert isinstance(make_router(LeastLoadedRouter), LeastLoadedRouter)
    assert isinstance(make_router(lambda: ConsistentHashRouter("user")), ConsistentHashRouter)
    assert isinstance(make_router(None), RoundRobinRouter)


@pytest.mark.parametrize(
    "given",
    [5, "RoundRobinRouter", Router, Router(), lambda: 5, lambda: 1 / 0, dict],
    ids=["number", "name", "Router", "Router()", "gives a number", "raises", "dict"],
)
def test_anything_else_is_a_value_error(given: Any) -> None:
    """R2."""
    with pytest.raises(ValueError, match="router"):
        make_router(given)


@pytest.mark.parametrize(
    "router",
    [
        RoundRobinRouter(),
        LeastLoadedRouter(),
        PowerOfTwoRouter(5),
        ConsistentHashRouter("user", 8),
        SessionRouter(SessionRouter(PowerOfTwoRouter(1))),
    ],
    ids=repr,
)
def test_a_built_in_router_is_described_and_built_again(router: Router) -> None:
    """PROTOCOL.md §7.1."""
    described = describe_router(router)
    assert described is not None
    assert describe_router(build_router(described)) == described


def test_a_custom_router_has_no_description() -> None:
    """R4: it travels by value, or not at all."""

    class Mine(RoundRobinRouter):
        pass

    assert describe_router(Mine()) is None
    assert describe_router(SessionRouter(Mine())) is None
    assert describe_router(None) == {"name": "RoundRobinRouter", "options": {}}


@pytest.mark.parametrize(
    "described",
    [
        None,
        {},
        {"name": ["x"]},
        {"name": "Router"},
        {"name": "RoundRobinRouter", "options": {"x": 1}},
        {"name": "ConsistentHashRouter", "options": {"points": 0}},
        {"name": "ConsistentHashRouter", "options": {"points": 2**40}},
        {"name": "ConsistentHashRouter", "options": {"points": "x"}},
        {"name": "SessionRouter", "options": {"fallback": 5}},
        {"name": "PowerOfTwoRouter", "options": {"seed": [1]}},
        {"name": "RoundRobinRouter", "options": [1]},
    ],
    ids=str,
)
def test_an_ill_formed_description_is_a_config_error(described: Any) -> None:
    """W8."""
    with pytest.raises(ConfigError):
        build_router(described)
