"""What `targets` measures with real processes: calls through the embedded broker, `zmq.proxy` in the same round where they are compared.

Each function measures one row: it starts what it needs, runs so often, and gives the value of every run by the figure's name.
Whatever it started is gone when it returns.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Coroutine
from itertools import cycle
from pathlib import Path
from typing import Any, Final

from bench import zmq_proxy
from bench.closed_loop import (
    BATCH,
    MARK,
    PAYLOAD,
    REPLICAS,
    BatchEcho,
    Echo,
    Processes,
    latencies_ms,
    p99,
    rate,
    timed_rate,
)
from bench.effort import Effort, Figures, NotHere
from bench.many_clients import BARE, FORGE, PROXY, Crowd, loop_factory
from forge_client import ForgeActor, shutdown
from forge_client.connection import current_client

ROOM: Final = 1024
SESSIONS: Final = 10_000
OPENED_AT_ONCE: Final = 500
CALLS: Final = 1500  # one after another, in a run
PROCESSES, CONNECTIONS = 4, 8
TENSORS_S: Final = 400.0


def on_a_loop(measure: Coroutine[Any, Any, Figures], *, uvloop: bool = True) -> Figures:
    """Raises NotHere without uvloop, where that is what is measured."""
    factory = loop_factory() if uvloop else None
    if uvloop and factory is None:
        measure.close()
        raise NotHere("uvloop is not installed")
    os.environ[MARK] = str(os.getpid())
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(measure)


@contextlib.asynccontextmanager
async def serving(cls: type[ForgeActor] = Echo, room: int = ROOM) -> AsyncIterator[Any]:
    try:
        yield await cls.options(num_replicas=REPLICAS, replica_max_concurrent_requests=room).as_service()
    finally:
        await shutdown()


def closed_loop(effort: Effort, outstanding: int, *, uvloop: bool = True, room: int = ROOM) -> Figures:
    """Calls/s beside `zmq.proxy`, run by run, there once by the same loop of awaited calls and once by a client that awaits none."""

    async def measure() -> Figures:
        found: Figures = {
            name: [] for name in ("calls_per_s", "of_proxy", "proxy_per_s", "of_bare_proxy", "bare_per_s")
        }
        async with serving(room=room) as service:
            with zmq_proxy.running(REPLICAS) as address:
                awaited, bare = zmq_proxy.Awaited(address, REPLICAS), zmq_proxy.Client(address, REPLICAS)
                for call in (awaited.call, service.echo.route):
                    await rate(call, outstanding, effort.seconds)  # warm
                for _ in range(effort.runs):
                    ours = await rate(service.echo.route, outstanding, effort.seconds)
                    theirs = await rate(awaited.call, outstanding, effort.seconds)
                    barely = bare.rate(PAYLOAD, outstanding, effort.seconds)
                    for name, value in zip(found, (ours, ours / theirs, theirs, ours / barely, barely), strict=True):
                        found[name].append(value)
                awaited.close()
                bare.close()
        return found

    return on_a_loop(measure(), uvloop=uvloop)


def with_p99(effort: Effort, outstanding: int) -> Figures:
    async def measure() -> Figures:
        found: Figures = {"calls_per_s": [], "p99_ms": []}
        async with serving() as service:
            await rate(service.echo.route, outstanding, effort.seconds)
            for _ in range(effort.runs):
                calls, took = await timed_rate(service.echo.route, outstanding, effort.seconds)
                found["calls_per_s"].append(calls)
                found["p99_ms"].append(p99(took))
        return found

    return on_a_loop(measure())


def many_clients(effort: Effort) -> Figures:
    async def measure() -> Figures:
        async with serving():
            broker = (await current_client()).address
            with zmq_proxy.running(REPLICAS) as front, contextlib.ExitStack() as stack:
                crowds = []
                for kind, address in ((FORGE, broker), (PROXY, front), (BARE, front)):
                    crowds.append(await asyncio.to_thread(Crowd, kind, address, PROCESSES, CONNECTIONS))
                    stack.callback(crowds[-1].end)
                return await asyncio.to_thread(_in_turn, effort, Processes(), *crowds)

    return on_a_loop(measure())


def _in_turn(effort: Effort, processes: Processes, forge: Crowd, awaited: Crowd, bare: Crowd) -> Figures:
    found: Figures = {
        name: [] for name in ("calls_per_s", "of_proxy", "proxy_per_s", "of_bare_proxy", "bare_per_s", "broker_us")
    }
    for run in range(effort.runs + 1):
        before, began = processes.cpu_s(), time.perf_counter()
        ours = forge.rate(effort.seconds)
        calls = ours * (time.perf_counter() - began)
        used = processes.cpu_s()["broker"] - before["broker"]
        theirs, barely = awaited.rate(effort.seconds), bare.rate(effort.seconds)
        if run:  # the first warms up
            values = (ours, ours / theirs, theirs, ours / barely, barely, used / calls * 1e6)
            for name, value in zip(found, values, strict=True):
                found[name].append(value)
    return found


def one_outstanding(effort: Effort) -> Figures:
    async def measure() -> Figures:
        found: Figures = {"median_ms": [], "p99_ms": [], "proxy_median_ms": []}
        async with serving() as service:
            with zmq_proxy.running(REPLICAS) as address:
                proxy = zmq_proxy.Client(address, REPLICAS)
                calls = effort.of(CALLS)
                await latencies_ms(service.echo.route, calls)
                for _ in range(effort.runs):
                    took = await latencies_ms(service.echo.route, calls)
                    found["median_ms"].append(statistics.median(took))
                    found["p99_ms"].append(p99(took))
                    found["proxy_median_ms"].append(proxy.median_ms(PAYLOAD, calls))
                proxy.close()
        return found

    return on_a_loop(measure())


def over_sessions(effort: Effort, outstanding: int) -> Figures:
    """Beside the stateless rate of the same service: each call is of the next of the open sessions."""

    async def measure() -> Figures:
        found: Figures = {"of_stateless": [], "calls_per_s": [], "stateless_per_s": []}
        async with serving() as service:
            count = effort.of(SESSIONS)
            sids: list[str] = []
            while len(sids) < count:
                some = min(OPENED_AT_ONCE, count - len(sids))
                sids += await asyncio.gather(*(service.start_session() for _ in range(some)))
            route = service.echo.route
            following = cycle(sids)

            def in_session(payload: bytes) -> Awaitable[Any]:
                answer: Awaitable[Any] = route(payload, sess_id=next(following))
                return answer

            for _ in range(0, count, OPENED_AT_ONCE):  # each is pinned at its first call
                await asyncio.gather(*(in_session(PAYLOAD) for _ in range(min(OPENED_AT_ONCE, count))))
            await rate(route, outstanding, effort.seconds)
            for _ in range(effort.runs):
                ours = await rate(in_session, outstanding, effort.seconds)
                stateless = await rate(route, outstanding, effort.seconds)
                for name, value in zip(found, (ours / stateless, ours, stateless), strict=True):
                    found[name].append(value)
        return found

    return on_a_loop(measure())


def batches(effort: Effort, outstanding: int) -> Figures:
    async def measure() -> Figures:
        found: Figures = {"items_per_s": [], "items_per_batch": []}
        async with serving(BatchEcho) as service:
            sizes: list[int] = []

            async def call(payload: bytes) -> None:
                sizes.append(await service.batch.route(payload))

            await rate(service.batch.route, outstanding, effort.seconds)
            for _ in range(effort.runs):
                found["items_per_s"].append(await rate(service.batch.route, outstanding, effort.seconds))
                await asyncio.gather(*(call(PAYLOAD) for _ in range(outstanding)))
                # A batch of n says so n times.
                found["items_per_batch"].append(len(sizes) / sum(1 / size for size in sizes))
                sizes.clear()
        if max(found["items_per_batch"]) > BATCH:
            raise RuntimeError(f"batches of {max(found['items_per_batch'])} items, where {BATCH} is the most")
        return found

    return on_a_loop(measure())


def broker_cpu(effort: Effort, outstanding: int) -> Figures:
    """CPU of each program per call; `broker` has libzmq's thread in it, `broker_core` has not."""

    async def measure() -> Figures:
        found: Figures = {"broker_us": [], "broker_core_us": [], "workers_us": [], "client_us": []}
        async with serving() as service:
            processes = Processes()
            await rate(service.echo.route, outstanding, effort.seconds)
            for _ in range(effort.runs):
                before, began = processes.cpu_s(), time.perf_counter()
                calls = await rate(service.echo.route, outstanding, effort.seconds)
                calls *= time.perf_counter() - began
                for group, used in processes.cpu_s().items():
                    found[f"{group}_us"].append((used - before[group]) / calls * 1e6)
        return found

    return on_a_loop(measure())


def start(effort: Effort) -> Figures:
    """Seconds from `as_service()` to the first answer. For runs in processes of their own: what was imported stays imported."""

    async def seconds(replicas: int) -> tuple[float, Any]:
        began = time.perf_counter()
        service = await Echo.options(num_replicas=replicas).as_service()
        await service.echo.route(PAYLOAD)
        return time.perf_counter() - began, service

    async def measure() -> Figures:
        found: Figures = {}
        try:
            for replicas in (1, 4):
                with_broker, service = await seconds(replicas)
                await service.shutdown()
                alone, service = await seconds(replicas)
                found[f"{replicas}_s"], found[f"{replicas}_with_broker_s"] = [alone], [with_broker]
                await shutdown()
        finally:
            await shutdown()
        return found

    return on_a_loop(measure(), uvloop=False)


def tensors(effort: Effort) -> Figures:
    """As `tensors.py` beside us measures them. Of its runs it tells least, median and most, and so do we."""
    program = Path(__file__).with_name("tensors.py")
    if not program.exists():
        raise NotHere("bench/tensors.py is not in this checkout")
    with tempfile.TemporaryDirectory() as directory:
        told = Path(directory) / "figures.json"
        command = [sys.executable, str(program), "--runs", str(effort.runs), "--json", str(told)]
        subprocess.run(command, check=True, timeout=TENSORS_S, stdout=subprocess.DEVNULL)
        ways = json.loads(told.read_text(encoding="utf-8"))["ways"]

    def three(one: dict[str, float]) -> list[float]:
        return [one["min"], one["median"], one["max"]]

    frames = ways["frames"]["peak, arrays"]
    return {
        "frames_gb_s": three(ways["frames"]["GB/s"]),
        "frames_peak": three(max(frames.values(), key=lambda one: one["median"])),
        "shared_gb_s": three(ways["shared memory"]["GB/s"]),
    }
