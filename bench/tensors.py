"""What a large array costs: float32 echoed by one replica, one call at a time, through shared memory and through frames.

    python bench/tensors.py                   # a minute; a table, and with --json FILE the figures

GB/s are bytes of the array over the time of a round trip (it goes there and comes back). Each run is a program of its own with its own
broker, the two ways in turn, so that a machine that changes its speed changes both; medians of `--runs` runs (min–max). Peak memory is
what each process had at most while it echoed 16 MiB, above what it had before that (VmHWM), as multiples of the array, on a connection that
has served small calls. A copy of the array within one process stands beside them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

import numpy as np

if not __package__:  # run as a plain script
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from forge_client import ForgeActor, endpoint, shutdown

WAYS: Final = {"shared memory": "1", "frames": "0"}  # FORGE_SHARED_MEMORY_FROM
SIZES: Final = [1 << exponent for exponent in range(16, 25)]  # bytes: 64 KiB … 16 MiB
LARGEST: Final = SIZES[-1]
WARM: Final = 10  # calls
# Small ones before all others. libzmq takes memory for its queues, piece by piece, until each has come round once (256 frames); a piece
# taken from where a large frame was leaves a place that is too small for the next one, and counts as an array ever after.
SMALL: Final = 300


class Echo(ForgeActor):
    @endpoint
    async def pid(self) -> int:
        return os.getpid()

    @endpoint
    async def echo(self, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return array


def memory_bytes(pid: int, field: str) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) << 10


def begin_peak(pid: int) -> None:
    """Its VmHWM is its VmRSS again."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


async def run(calls: int) -> dict[str, Any]:
    """One run of one way: seconds of a round trip by size, and peaks above the start by process."""
    service = await Echo.options(num_replicas=1).as_service()
    for _ in range(SMALL):
        worker = await service.pid.route()
    processes = {"client": os.getpid(), "broker": parent_of(worker), "worker": worker}
    array = np.arange(LARGEST // 4, dtype=np.float32)
    before = {}
    for name, pid in processes.items():
        begin_peak(pid)
        before[name] = memory_bytes(pid, "VmRSS")
    times = {LARGEST: await round_trip_s(service, array, calls)}
    peaks = {name: memory_bytes(pid, "VmHWM") - before[name] for name, pid in processes.items()}
    for size in SIZES[:-1]:
        times[size] = await round_trip_s(service, array[: size // 4], calls)
    copies = []
    there = np.empty_like(array)
    for _ in range(calls):
        began = time.perf_counter()
        np.copyto(there, array)
        copies.append(time.perf_counter() - began)
    await shutdown()
    return {"times": times, "peaks": peaks, "copy": statistics.median(copies)}


async def round_trip_s(service: Any, array: np.ndarray[Any, Any], calls: int) -> float:
    found = []
    for call in range(WARM + calls):
        began = time.perf_counter()
        back = await service.echo.route(array)
        if call >= WARM:
            found.append(time.perf_counter() - began)
    assert np.array_equal(back, array)
    return statistics.median(found)


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def measure(runs: int, calls: int) -> dict[str, Any]:
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(runs):
        for way, least in WAYS.items():
            program = [sys.executable, __file__, "--one", "--calls", str(calls)]
            said = subprocess.run(
                program,
                env={**os.environ, "FORGE_SHARED_MEMORY_FROM": least},
                capture_output=True,
                timeout=300,
                check=True,
            )
            found[way].append(json.loads(said.stdout))
    ways = {}
    for way, all_runs in found.items():
        ways[way] = {
            "ms": {size: spread([one["times"][str(size)] * 1e3 for one in all_runs]) for size in SIZES},
            "GB/s": spread([LARGEST / one["times"][str(LARGEST)] / 1e9 for one in all_runs]),
            "peak, arrays": {
                name: spread([one["peaks"][name] / LARGEST for one in all_runs])
                for name in ("client", "broker", "worker")
            },
        }
    copies = [LARGEST / one["copy"] / 1e9 for all_runs in found.values() for one in all_runs]
    return {"ways": ways, "plain copy, GB/s": spread(copies)}


def show(results: dict[str, Any]) -> None:
    about = results["about"]
    print(
        f"float32 echoed by 1 replica, 1 call at a time, asyncio, medians of {about['runs']} runs of {about['calls']} calls (min–max); "
        f"{about['cpus']} CPUs, Python {about['python']}"
    )
    print(f"a plain copy of 16 MiB: {_cell(results['plain copy, GB/s'])} GB/s")
    for way, found in results["ways"].items():
        peaks = ", ".join(f"{name} {_cell(one, 1)}" for name, one in found["peak, arrays"].items())
        print(f"{way:<14} 16 MiB at {_cell(found['GB/s'])} GB/s; peak memory in arrays: {peaks}")
    print(f"{'KiB':>8}  " + "".join(f"{way + ', ms':<26}" for way in WAYS) + "ratio")
    for size in SIZES:
        cells = [results["ways"][way]["ms"][size] for way in WAYS]
        ratio = cells[1]["median"] / cells[0]["median"]
        print(f"{size >> 10:>8}  " + "".join(f"{_cell(cell, 3):<26}" for cell in cells) + f"{ratio:.2f}")


def _cell(one: dict[str, float], digits: int = 2) -> str:
    return f"{one['median']:.{digits}f} ({one['min']:.{digits}f}–{one['max']:.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--calls", type=int, default=40, help="of each size in each run")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # a run, for the program that counts them
    options = parser.parse_args()
    if options.one:
        print(json.dumps(asyncio.run(run(options.calls))))
        return
    results = measure(options.runs, options.calls)
    results["about"] = {
        "runs": options.runs,
        "calls": options.calls,
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "machine": platform.platform(),
    }
    show(results)
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
