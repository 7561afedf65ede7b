"""The three use cases of the service's specification at small size: each configuration with fewer replicas and shorter times, under
the load that it is for (X1, X2). The broker has 8 declared GPUs."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from forge_client import Service, ServiceConfig
from tests.public.use_case_actors import ChunkCounter, LinearModel, MovingSum
from tests.public.watching import BRISK, healthy, until

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def settings() -> dict[str, str]:
    return {"FORGE_GPUS": "8"}


async def test_serving_grows_with_its_load_gives_each_replica_a_gpu_of_its_own_and_shrinks_to_min_replicas(
    tmp_path: Path,
) -> None:
    """X1, X2, X4: ML model serving. Every answer is right, whoever came or went meanwhile."""
    weights = tmp_path / "weights.json"
    weights.write_text(json.dumps([1.0, -2.0, 0.5]), "utf-8")
    config = ServiceConfig(
        gpus_per_replica=1,
        min_replicas=1,
        max_replicas=3,
        default_replicas=2,
        replica_max_concurrent_requests=8,
        autoscaling=dataclasses.replace(BRISK, scale_up_capacity_threshold=0.7, scale_up_queue_depth_threshold=3.0),
    )
    async with Service(config, LinearModel, model_path=str(weights)) as service:
        enough = asyncio.Event()

        async def caller(number: int) -> int:
            calls = 0
            while not enough.is_set():
                assert await service.predict.route([number, calls, 4.0]) == number - 2.0 * calls + 2.0
                calls += 1
            return calls

        callers = [asyncio.create_task(caller(number)) for number in range(48)]
        grown = await until(service, lambda state: healthy(state) == 3)
        assert grown["scaling"]["last_change"]["rule"] in ("queue", "capacity")
        assert len(set(await service.gpu.fanout())) == 3
        enough.set()
        calls = sum(await asyncio.gather(*callers))

        shrunk = await until(service, lambda state: len(state["replicas"]) == 1)
        assert shrunk["scaling"]["last_change"]["rule"] == "low"
        told = (await service.get_metrics_summary())["service"]
        assert told["endpoints"]["predict"]["outcomes"] == {"ok": calls}
        assert told["wanted_replicas"] == 1
        assert told["scalings"]["down"] == told["scalings"]["up"] + 1 >= 2


async def test_a_batch_job_grows_with_its_queue_and_loses_no_chunk_to_a_worker_that_dies() -> None:
    """X1, X2, F2: batch processing. A replica that dies in the midst of five chunks gives them to others."""
    config = ServiceConfig(
        gpus_per_replica=2,
        min_replicas=1,
        max_replicas=2,
        default_replicas=1,
        replica_max_concurrent_requests=5,
        autoscaling=dataclasses.replace(
            BRISK,
            scale_up_queue_depth_threshold=10.0,
            max_queue_depth_emergency=1000.0,
            scale_down_idle_time_threshold=600.0,
        ),
    )
    async with Service(config, ChunkCounter, batch_size=100) as service:
        pid = await service.pid.route()
        starts = range(0, 20_000, 100)
        chunks = [service.count_even.route(start) for start in starts]
        grown = await until(service, lambda state: healthy(state) == 2)
        assert grown["scaling"]["last_change"]["rule"] == "queue"
        os.kill(pid, signal.SIGKILL)
        assert await asyncio.gather(*chunks) == [(start, 50) for start in starts]

        await until(service, lambda state: healthy(state) == 2)
        told = (await service.get_metrics_summary())["service"]
        assert told["endpoints"]["count_even"]["outcomes"] == {"ok": len(starts)}
        assert 1 <= told["retries"] <= 5
        assert (told["restarts"], told["total_replicas"]) == (1, 2)


def expected_sums(window: int) -> Iterator[int]:
    """Of a stream of 1, 2, 3, …"""
    last = 0
    while True:
        last += 1
        yield sum(range(max(1, last - window + 1), last + 1))


async def test_streams_stay_on_their_replica_grow_with_their_rate_and_go_on_when_it_is_scaled_away() -> None:
    """X1, X2, S2, S3: real-time analytics. Each stream has its own window, which moves with it."""
    config = ServiceConfig(
        gpus_per_replica=1,
        min_replicas=1,
        max_replicas=3,
        default_replicas=2,
        replica_max_concurrent_requests=20,
        autoscaling=dataclasses.replace(
            BRISK,
            scale_up_request_rate_threshold=50.0,
            scale_up_capacity_threshold=0.6,
            # Streams wait for themselves, value by value: here, a queue says nothing of what is missing.
            scale_up_queue_depth_threshold=1000.0,
            max_queue_depth_emergency=1000.0,
        ),
    )
    async with Service(config, MovingSum, window_size=10) as service:
        streams = {await service.start_session(): expected_sums(10) for _ in range(6)}
        sent = dict.fromkeys(streams, 0)

        async def push(stream: str, count: int) -> set[int]:
            """The processes in which these values were summed up."""
            values = range(sent[stream] + 1, sent[stream] + count + 1)
            sent[stream] += count
            answers = await asyncio.gather(*(service.push.route(value, sess_id=stream) for value in values))
            assert [total for total, _ in answers] == [next(streams[stream]) for _ in values]
            return {pid for _, pid in answers}

        async def follow(stream: str) -> set[int]:
            homes: set[int] = set()
            while not enough.is_set():
                homes |= await push(stream, 20)
            return homes

        enough = asyncio.Event()
        followers = [asyncio.create_task(follow(stream)) for stream in streams]
        grown = await until(service, lambda state: healthy(state) == 3)
        enough.set()
        homes = await asyncio.gather(*followers)
        assert grown["scaling"]["last_change"]["rule"] in ("rate", "capacity")
        assert [len(one) for one in homes] == [1] * 6
        assert len(set().union(*homes)) == 2  # those that were there when the streams began

        await until(service, lambda state: len(state["replicas"]) == 1)
        moved = await asyncio.gather(*(push(stream, 20) for stream in streams))
        assert moved != homes
        assert len(set().union(*moved)) == 1
