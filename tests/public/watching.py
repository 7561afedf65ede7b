"""Waiting for a service to be so, and a policy that does not take minutes about it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final

from forge_client import AutoscalingConfig, Service

BOUND_S: Final = 40.0
BRISK: Final = AutoscalingConfig(
    evaluate_every_s=0.1,
    smoothing_s=0.0,
    scale_up_cooldown=0.1,
    scale_down_cooldown=0.1,
    min_time_between_scale_events=0.1,
    scale_down_idle_time_threshold=0.5,
)


async def until(service: Service, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """What the service is like as soon as it is so: ask again and again, within a bound."""
    async with asyncio.timeout(BOUND_S):
        while not holds(state := await service.state()):
            continue
    return state


def healthy(state: dict[str, Any]) -> int:
    return sum(replica["healthy"] for replica in state["replicas"])
