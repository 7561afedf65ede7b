"""The life of a replica as a table, and the pool that answers the routers' questions without a scan (C3, R3)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forge_broker.core import replicas, requests, workers
from forge_broker.core.replicas import LEAVING, Replica, ReplicaMove, ReplicaPool, ReplicaState
from forge_contract.routing import ListPool

LIMIT = 3


def replica(idx: int) -> Replica:
    service: Any = SimpleNamespace(name="gen")
    return Replica(service, idx, idx, 1, LIMIT, 0.0)


@pytest.mark.parametrize(
    ("table", "states", "ends"),
    [
        (replicas.MOVES, replicas.ReplicaState, {replicas.ReplicaState.STOPPED}),
        (workers.MOVES, workers.WorkerState, {workers.WorkerState.GONE}),
        (
            requests.MOVES,
            requests.State,
            {requests.State.DONE, requests.State.FAILED, requests.State.CANCELLED, requests.State.EXPIRED},
        ),
    ],
    ids=["replica", "worker", "request"],
)
def test_a_life_is_a_table_with_every_state_and_its_ends_are_empty(table: Any, states: Any, ends: Any) -> None:
    """C3."""
    assert set(table) == set(states)
    assert {state for state, moves in table.items() if not moves} == ends
    first = next(iter(states))
    assert {after for moves in table.values() for after in moves.values()} | {first} == set(states)


@pytest.mark.parametrize("state", ReplicaState)
@pytest.mark.parametrize("move", ReplicaMove)
def test_a_move_follows_the_table_or_raises_with_the_replicas_story(state: ReplicaState, move: ReplicaMove) -> None:
    """C3."""
    one = replica(1)
    one.state = state
    after = replicas.MOVES[state].get(move)
    if after is not None:
        one.move(move)
        assert one.state is after
    else:
        with pytest.raises(RuntimeError, match=f"<Replica gen/1 {state.value} 0/3 in flight> of epoch 1.*{move.value}"):
            one.move(move)
        assert one.state is state


@settings(max_examples=80)
@given(
    st.lists(st.tuples(st.sampled_from("tgarco"), st.integers(0, 4), st.integers(1, 3)), max_size=40),
    st.integers(-1, 5),
)
def test_the_pool_agrees_with_a_scan_whatever_comes_and_goes(steps: list[tuple[str, int, int]], after: int) -> None:
    """R3: took, gave, admitted, removed, closed, opened, in any order."""
    pool = ReplicaPool(LIMIT)
    every = [replica(idx) for idx in range(5)]
    for step, idx, count in steps:
        one = every[idx]
        if step == "a" and one.pool is None:
            one.state = ReplicaState.HEALTHY
            pool.admit(one)
        elif one.pool is None:
            continue
        elif step == "t" and one.has_room:
            pool.took(one)
        elif step == "o" and one.closed:
            pool.open(one)
        elif step == "g" and one.active >= count:
            pool.gave(one, count)
        elif step == "c":
            pool.close(one, LEAVING)
        elif step == "r":
            pool.remove(one)
            one.state, one.active = ReplicaState.RECOVERING, 0
        scan = ListPool([one for one in every if one.pool is pool])
        assert pool.members == scan.members
        assert pool.with_room_after(after) is scan.with_room_after(after)
        assert pool.least_loaded_after(after) is scan.least_loaded_after(after)
        assert list(pool) == [pool[at] for at in range(len(pool))]
        assert [pool.by_idx(idx) for idx in range(6)] == [scan.by_idx(idx) for idx in range(6)]
