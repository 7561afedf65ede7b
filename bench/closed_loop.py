"""Closed loops of no-op calls through Forge broker, and what its processes use meanwhile. `round_trip` and `targets` measure with it.

A closed loop keeps so many calls outstanding: each caller calls again when it is answered. Nothing here imports more than a worker has
anyway, because workers import the actor from here.
"""

from __future__ import annotations

import asyncio
import os
import resource
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Final

from forge_client import ForgeActor, endpoint, service_endpoint

PAYLOAD: Final = b"x" * 64
REPLICAS: Final = 2
BATCH: Final = 32
MARK: Final = "FORGE_BENCH"  # in the environment of all that a measurement starts: the pid that it started from

Call = Callable[[bytes], Awaitable[Any]]


class Echo(ForgeActor):
    @endpoint
    async def echo(self, payload: bytes) -> bytes:
        return payload


class BatchEcho(ForgeActor):
    """A class of its own: a service that batches looks at every call that waits for company."""

    @service_endpoint(batch_size=BATCH, batch_timeout=0.01, batch_mode="call")
    async def batch(self, payloads: list[bytes]) -> list[int]:
        return [len(payloads)] * len(payloads)


async def rate(call: Call, outstanding: int, seconds: float) -> float:
    """Calls/s in a closed loop of `outstanding` callers."""
    calls = 0
    until = time.perf_counter() + seconds

    async def caller() -> None:
        nonlocal calls
        while time.perf_counter() < until:
            await call(PAYLOAD)
            calls += 1

    began = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(outstanding)))
    return calls / (time.perf_counter() - began)


async def timed_rate(call: Call, outstanding: int, seconds: float) -> tuple[float, list[float]]:
    """The same with each call's milliseconds, sorted; looking at the clock twice a call slows the loop down a little."""
    took: list[float] = []
    clock = time.perf_counter
    began = clock()
    until = began + seconds

    async def caller() -> None:
        now = clock()
        while now < until:
            await call(PAYLOAD)
            after = clock()
            took.append((after - now) * 1e3)
            now = after

    await asyncio.gather(*(caller() for _ in range(outstanding)))
    elapsed = clock() - began
    return len(took) / elapsed, sorted(took)


async def latencies_ms(call: Call, calls: int) -> list[float]:
    """Round trips one after another, sorted."""
    found = []
    for _ in range(calls):
        began = time.perf_counter()
        await call(PAYLOAD)
        found.append((time.perf_counter() - began) * 1e3)
    return sorted(found)


def p99(ordered: Sequence[float]) -> float:
    return ordered[int(len(ordered) * 0.99)]


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


class Processes:
    """CPU seconds used so far by us, and by the broker and its workers: those that run now and carry our mark.

    `broker_core`: what the broker's own thread used, without libzmq's.
    """

    def __init__(self) -> None:
        self._groups: dict[str, list[int]] = {"broker": [], "workers": []}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                command = (entry / "cmdline").read_bytes()
                environ = (entry / "environ").read_bytes()
            except OSError:
                continue
            if f"{MARK}={os.getpid()}".encode() not in environ.split(b"\0"):
                continue
            if b"forge_broker" in command:
                self._groups["broker"].append(int(entry.name))
            elif b"forge_worker" in command:
                self._groups["workers"].append(int(entry.name))

    def cpu_s(self) -> dict[str, float]:
        used = {group: sum(_used_s(f"/proc/{pid}/stat") for pid in pids) for group, pids in self._groups.items()}
        used["broker_core"] = sum(_used_s(f"/proc/{pid}/task/{pid}/stat") for pid in self._groups["broker"])
        own = resource.getrusage(resource.RUSAGE_SELF)
        return {**used, "client": own.ru_utime + own.ru_stime}


def _used_s(stat: str) -> float:
    fields = Path(stat).read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
