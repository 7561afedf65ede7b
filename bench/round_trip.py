"""What a call costs: no-op calls through the embedded broker, beside libzmq's `zmq.proxy` in the same run.

    python bench/round_trip.py                # about a minute; a table, and with --json FILE the figures
    python bench/round_trip.py --uvloop       # the client on uvloop

One client process, 2 replicas, 64-byte payload. Every figure is the median of `--runs` runs, forge and proxy in turn so that a machine
that changes its speed changes both, with the spread (min–max) beside it. Read ratios, not absolute figures.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

if not __package__:  # run as a plain script
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import zmq_proxy
from bench.closed_loop import MARK, PAYLOAD, REPLICAS, Echo, Processes, latencies_ms, p99, rate, spread
from forge_client import shutdown

LATENCY_CALLS = 2000


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    os.environ[MARK] = str(os.getpid())
    results: dict[str, Any] = {"figures": []}
    services = {
        room: await Echo.options(num_replicas=REPLICAS, replica_max_concurrent_requests=room).as_service()
        for room in (1024, 10)
    }
    processes = Processes()
    with zmq_proxy.running(REPLICAS) as address:
        proxy = zmq_proxy.Client(address, REPLICAS)
        for room, service in services.items():
            await rate(service.echo.route, 512, 1.0)  # warm
            for outstanding in (512, 64):
                ours, theirs = [], []
                cpu: dict[str, list[float]] = {}
                for _ in range(options.runs):
                    before, began = processes.cpu_s(), time.perf_counter()
                    ours.append(await rate(service.echo.route, outstanding, options.seconds))
                    calls = ours[-1] * (time.perf_counter() - began)
                    for group, used in processes.cpu_s().items():
                        cpu.setdefault(group, []).append((used - before[group]) / calls * 1e6)
                    theirs.append(proxy.rate(PAYLOAD, outstanding, options.seconds))
                results["figures"].append(
                    {
                        "what": "calls/s",
                        "outstanding": outstanding,
                        "replica_max_concurrent_requests": room,
                        "forge": spread(ours),
                        "zmq_proxy": spread(theirs),
                        "ratio": spread([a / b for a, b in zip(ours, theirs, strict=True)]),
                        "cpu_us_per_call": {group: statistics.median(values) for group, values in cpu.items()},
                    }
                )
            ours, theirs, slowest = [], [], []
            for _ in range(options.runs):
                found = await latencies_ms(service.echo.route, LATENCY_CALLS)
                ours.append(statistics.median(found))
                slowest.append(p99(found))
                theirs.append(proxy.median_ms(PAYLOAD, LATENCY_CALLS))
            results["figures"].append(
                {
                    "what": "round trip, ms",
                    "outstanding": 1,
                    "replica_max_concurrent_requests": room,
                    "forge": spread(ours),
                    "forge_p99": spread(slowest),
                    "zmq_proxy": spread(theirs),
                    "ratio": spread([a / b for a, b in zip(ours, theirs, strict=True)]),
                }
            )
        proxy.close()
    await shutdown()
    return results


def show(results: dict[str, Any]) -> None:
    about = results["about"]
    print(
        f"loop {about['loop']}, 1 client, {REPLICAS} replicas, {len(PAYLOAD)}-byte payload, medians of {about['runs']} runs "
        f"of {about['seconds']} s (min–max); {about['cpus']} CPUs, Python {about['python']}"
    )
    print(f"{'what':<16}{'outstanding':>12}{'room':>6}  {'forge':<28}{'zmq.proxy':<28}ratio")
    for figure in results["figures"]:
        digits = 0 if figure["what"] == "calls/s" else 3
        cells = [
            f"{one['median']:,.{digits}f} ({one['min']:,.{digits}f}–{one['max']:,.{digits}f})"
            for one in (figure["forge"], figure["zmq_proxy"])
        ]
        room = figure["replica_max_concurrent_requests"]
        print(
            f"{figure['what']:<16}{figure['outstanding']:>12}{room:>6}  {cells[0]:<28}{cells[1]:<28}"
            f"{figure['ratio']['median']:.2f}"
        )
        if "cpu_us_per_call" in figure:
            shares = ", ".join(f"{group} {used:.1f}" for group, used in figure["cpu_us_per_call"].items())
            print(f"{'':<36}CPU µs per call: {shares}")
        if "forge_p99" in figure:
            print(f"{'':<36}p99 {figure['forge_p99']['median']:.3f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each run")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--uvloop", action="store_true", help="run the client on uvloop")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    if options.uvloop:
        import uvloop

        results = uvloop.run(measure(options))
    else:
        results = asyncio.run(measure(options))
    results["about"] = {
        "loop": "uvloop" if options.uvloop else "asyncio",
        "runs": options.runs,
        "seconds": options.seconds,
        "payload_bytes": len(PAYLOAD),
        "replicas": REPLICAS,
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "machine": platform.platform(),
    }
    show(results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
