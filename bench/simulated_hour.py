"""How long `forge simulate` takes for an hour of 100 calls a second: one core of this machine, virtual time, the real core in it."""

from __future__ import annotations

import time
from typing import Final

from bench.effort import Effort, Figures
from forge_broker.simulator.model import ServiceModel
from forge_broker.simulator.setup import Setup
from forge_broker.simulator.traces import trace_of
from forge_broker.simulator.world import simulate
from forge_contract.config import AutoscalingConfig, EndpointOptions, ServiceConfig

HOUR_S: Final = 3600.0
RATE: Final = 100.0  # calls/s
SPEC: Final = {
    "kind": "service",
    "class_name": "Echo",
    "target": {"ref": "bench.closed_loop:Echo"},
    "path": [],
    "cwd": None,
    "exports": False,
    "config": ServiceConfig(num_replicas=2, max_replicas=8, autoscaling=AutoscalingConfig()).to_wire(),
    "endpoints": [
        {
            "name": "echo",
            "router": {"name": "RoundRobinRouter", "options": {}},
            "options": EndpointOptions().to_wire(),
            "signature": None,
        }
    ],
}


def simulated_hour(effort: Effort) -> Figures:
    """Of the step, whose replicas come and go; on average 100 calls/s: 60 and 140. Scaled to the hour."""
    seconds = max(1.0, HOUR_S * effort.scale)
    setup = Setup(
        spec=SPEC,
        endpoint="echo",
        trace=trace_of("step", 0.6 * RATE, 1.4 * RATE, seconds),
        model=ServiceModel(mean_s=0.1, spread=0.5),
    )
    found: Figures = {"wall_s": [], "cpu_s": [], "us": []}
    for _ in range(effort.runs):
        began, used = time.perf_counter(), time.process_time()
        figures = simulate(setup)
        took, cpu = time.perf_counter() - began, time.process_time() - used
        if figures.failed or not figures.calls:
            raise RuntimeError(f"{figures.calls} calls, and {dict(figures.failed)} failed")
        found["wall_s"].append(took * HOUR_S / seconds)
        found["cpu_s"].append(cpu * HOUR_S / seconds)
        found["us"].append(cpu / figures.calls * 1e6)
    return found
