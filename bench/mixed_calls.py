"""Short calls beside long ones: what sending calls ahead of a replica's room does to them (`dispatch_ahead_s`).

    python bench/mixed_calls.py        # a minute; a table

2 replicas with room for 10 each, 256 callers of an endpoint that does nothing; beside them callers of one that waits 0.3 s, and of one that
holds its replica's loop for 20 ms. Each load once with calls sent ahead and once without, in turn; medians of `--runs` runs.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Final

if not __package__:  # run as a plain script
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.closed_loop import REPLICAS, Echo, p99, timed_rate
from bench.many_clients import loop_factory
from forge_client import endpoint, shutdown
from forge_contract.config import ServiceConfig

ROOM: Final = 10
CALLERS: Final = 256
WAIT_S, HOLD_S = 0.3, 0.02
PAUSE_S: Final = 0.2  # of a caller of long ones, between two
LOADS: Final = ((0, 0), (12, 0), (24, 0), (0, 2), (12, 2))  # callers that wait, and that hold
AHEAD: Final = {"not ahead": 0.0, "ahead": ServiceConfig.dispatch_ahead_s}


class Mixed(Echo):
    @endpoint
    async def wait(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    @endpoint
    async def hold(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            pass


async def run(service: Any, waiting: int, holding: int, seconds: float) -> tuple[float, list[float]]:
    """Short calls/s, and the milliseconds of each, sorted."""
    until = time.perf_counter() + seconds

    async def long(call: Any, lasting_s: float) -> None:
        while time.perf_counter() < until:
            await call(lasting_s)
            await asyncio.sleep(PAUSE_S)

    callers = [long(service.wait.route, WAIT_S) for _ in range(waiting)]
    callers += [long(service.hold.route, HOLD_S) for _ in range(holding)]
    short, _ = await asyncio.gather(timed_rate(service.echo.route, CALLERS, seconds), asyncio.gather(*callers))
    return short


async def measure(runs: int, seconds: float) -> None:
    print(f"{'waiting':>8}{'holding':>8}  {'':<10}{'calls/s':>10}{'p50, ms':>10}{'p99, ms':>10}{'most, ms':>10}")
    try:
        services = {
            name: await Mixed.options(
                num_replicas=REPLICAS, replica_max_concurrent_requests=ROOM, dispatch_ahead_s=ahead_s
            ).as_service()
            for name, ahead_s in AHEAD.items()
        }
        for waiting, holding in LOADS:
            found: dict[str, list[tuple[float, float, float, float]]] = {name: [] for name in AHEAD}
            for _ in range(runs):
                for name, service in services.items():
                    rate, took = await run(service, waiting, holding, seconds)
                    found[name].append((rate, statistics.median(took), p99(took), took[-1]))
            for name, rows in found.items():
                rate, median, late, most = map(statistics.median, zip(*rows, strict=True))
                print(
                    f"{waiting:>8}{holding:>8}  {name:<10}{rate:>10,.0f}{median:>10.2f}{late:>10.2f}{most:>10.2f}",
                    flush=True,
                )
    finally:
        await shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each run")
    options = parser.parse_args()
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(measure(options.runs, options.seconds))


if __name__ == "__main__":
    main()
