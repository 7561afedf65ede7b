"""Scaling through the public door: real processes come and go under load, and no call fails for it (X1, X2, S3)."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from forge_client import AutoscalingConfig, ConfigError, Decision, ScalingPolicy
from tests.public.actors import Counter, Predictor
from tests.public.watching import BRISK, healthy, until


async def test_a_burst_brings_replicas_quiet_takes_them_all_and_the_next_call_brings_one_back() -> None:
    """X1, X2, A10: nothing fails on the way up, on the way down, or at zero."""
    options = {"replica_max_concurrent_requests": 2, "autoscaling": BRISK}
    service = await Predictor.options(num_replicas=1, min_replicas=0, max_replicas=3, **options).as_service()
    enough = asyncio.Event()

    async def caller() -> list[tuple[int, int]]:
        answers: list[tuple[int, int]] = []
        while not enough.is_set():
            answers.append(await service.predict.route(len(answers)))
        return answers

    callers = [asyncio.create_task(caller()) for _ in range(48)]
    await until(service, lambda state: healthy(state) == 3)
    enough.set()
    answers = await asyncio.gather(*callers)
    assert all(value == at + 1 for one in answers for at, (value, _) in enumerate(one))

    at_zero = await until(service, lambda state: not state["replicas"])
    assert at_zero["scaling"]["wanted"] == 0
    assert at_zero["scaling"]["last_change"]["rule"] == "idle"
    assert await asyncio.gather(*(service.predict.route(x) for x in range(4)))
    assert healthy(await service.state()) >= 1


async def test_sessions_keep_their_state_when_their_replica_is_scaled_away() -> None:
    """X2, S3: by hand, up and down, while they are used."""
    service = await Counter.options(num_replicas=1, max_replicas=3).as_service()
    with pytest.raises(ConfigError, match="cannot have 4"):
        await service.scale(4)
    await service.scale(2, wait=True)
    sessions = [await service.start_session() for _ in range(4)]
    for n in range(3):
        assert [await service.add.route(1, sess_id=sid) for sid in sessions] == [n + 1] * 4
    homes = (await service.state())["session_replica_map"]
    assert set(homes.values()) == {0, 1}
    await service.scale(1, wait=True)
    assert [await service.add.route(1, sess_id=sid) for sid in sessions] == [4] * 4
    assert len((await service.state())["replicas"]) == 1


class AsManyAsAsked(ScalingPolicy):
    def decide(self, observation: Any, *_: Any) -> Decision:
        return Decision(observation.sessions - observation.replicas, "sessions", "one replica for each session")


@pytest.mark.parametrize(
    "policy", [AsManyAsAsked(), "tests.public.test_scaling:AsManyAsAsked"], ids=["by value", "by name"]
)
async def test_a_policy_of_ones_own_decides(policy: Any) -> None:
    """X1, W6."""
    scaling = AutoscalingConfig(policy=policy, evaluate_every_s=0.05)
    service = await Predictor.options(num_replicas=1, max_replicas=2, autoscaling=scaling).as_service()
    for _ in range(2):
        await service.start_session()
    state = await until(service, lambda state: healthy(state) == 2)
    assert state["scaling"]["last_change"]["reason"] == "one replica for each session"


async def test_a_policy_the_broker_cannot_import_is_the_deployers_error() -> None:
    """X1, A3: nothing of the service is left."""
    scaling = AutoscalingConfig(policy="tests.public.test_scaling:Nobody")
    for _ in range(2):
        with pytest.raises(ConfigError, match="cannot be loaded in the broker: AttributeError"):
            await Predictor.options(name="mine", autoscaling=scaling).as_service()
