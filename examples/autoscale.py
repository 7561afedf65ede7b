"""A burst of calls, and a service that grows for it and shrinks again: load, replicas and latency, drawn over time.

The digit classifier of `digits.py` reads scans that each replica fetches first, from a store that takes `FETCH_S` for one. A replica
fetches two at a time, so it serves some 80 calls/s. Calls arrive at random, whether the earlier ones are answered or not: 20 a
second, in the burst 200, then 20 again. Nobody tells the service; the broker sees the queue, and adds and removes replicas. Every
answer is compared with what the model says here.

    python examples/autoscale.py
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from digits import make_model, train  # the example beside this one
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from forge_client import AutoscalingConfig, ForgeActor, LeastLoadedRouter, Service, service_endpoint, shutdown

SEED = 0
FETCH_S = 0.025
CALM = 20.0  # calls/s
BURST = 50.0  # calls/s for each replica that there may be: they can keep up, and one cannot
LOOK_EVERY_S = 0.25
BOUND_S = 60.0  # for replicas to come, or to go

# A minute's demonstration: with the defaults, which suit a service that runs for months, it would take half an hour.
SCALING = AutoscalingConfig(
    scale_up_queue_depth_threshold=4.0,
    scale_up_capacity_threshold=0.9,
    scale_up_request_rate_threshold=100.0,
    smoothing_s=2.0,
    scale_up_cooldown=1.0,
    scale_down_cooldown=1.5,
    min_time_between_scale_events=1.0,
    scale_down_idle_time_threshold=2.0,
    evaluate_every_s=0.5,
)


def read(model: Callable[[torch.Tensor], torch.Tensor], scans: NDArray[np.float32]) -> list[int]:
    """scans: (n, 64). The digit on each."""
    with torch.inference_mode():
        digits: list[int] = model(torch.from_numpy(scans)).argmax(dim=1).tolist()
    return digits


class ScanReader(ForgeActor):
    """A replica: the trained model, and its way to the scans."""

    def __init__(self, weights: dict[str, torch.Tensor], scans: NDArray[np.float32]) -> None:
        torch.set_num_threads(1)
        self.model = make_model()
        self.model.load_state_dict(weights)
        self.scans = scans

    @service_endpoint(router=LeastLoadedRouter())
    async def read_scan(self, index: int) -> int:
        await asyncio.sleep(FETCH_S)  # the store
        return read(self.model, self.scans[index : index + 1])[0]


class Look(NamedTuple):
    """The service at one moment; `at` in seconds since the first call."""

    at: float
    healthy: int
    wanted: int
    waiting: int


class Watch:
    """What is drawn: every call with its arrival and latency in seconds, and how the service was meanwhile."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.calls: list[tuple[float, float]] = []
        self.looks: list[Look] = []
        self.wrong = 0
        self.failed: list[BaseException] = []
        self.changed = asyncio.Event()

    @property
    def now(self) -> float:
        return time.perf_counter() - self.began

    async def call(self, service: Service, index: int, digit: int) -> None:
        arrived = self.now
        try:
            self.wrong += await service.read_scan.route(index) != digit
        except Exception as error:
            self.failed.append(error)
        self.calls.append((arrived, self.now - arrived))

    async def look(self, service: Service) -> None:
        """Until cancelled; prints each change with its reason."""
        told = ""
        while True:
            state = await service.state()
            scaling = state["scaling"]
            healthy = sum(replica["healthy"] for replica in state["replicas"])
            waiting = sum(state["queues"].values()) + sum(replica["queue_size"] for replica in state["replicas"])
            self.looks.append(Look(self.now, healthy, scaling["wanted"], waiting))
            change = scaling["last_change"]
            if change is not None and (said := f"{change['wanted']} {change['rule']}: {change['reason']}") != told:
                told = said
                print(f"{self.now:5.1f} s  {change['delta']:+d} → {told}")
            self.changed.set()
            await asyncio.sleep(LOOK_EVERY_S)

    async def until(self, healthy: int) -> None:
        """So many replicas are healthy, and none is on its way."""
        async with asyncio.timeout(BOUND_S):
            while not self.looks or self.looks[-1][1:3] != (healthy, healthy):
                self.changed.clear()
                await self.changed.wait()


class Arrivals:
    """Calls at random moments, `rate` a second on average, whatever becomes of the earlier ones."""

    def __init__(self, service: Service, watch: Watch, answers: NDArray[np.int64]) -> None:
        self.rate = CALM
        self._service, self._watch, self._answers = service, watch, answers
        self._chance = random.Random(SEED)
        self._calls: set[asyncio.Task[None]] = set()
        self._arriving = asyncio.create_task(self._arrive())

    async def _arrive(self) -> None:
        due = self._watch.now
        while True:
            due += self._chance.expovariate(self.rate)
            await asyncio.sleep(max(0.0, due - self._watch.now))
            index = self._chance.randrange(len(self._answers))
            call = asyncio.create_task(self._watch.call(self._service, index, int(self._answers[index])))
            self._calls.add(call)
            call.add_done_callback(self._calls.discard)

    async def end(self) -> None:
        """No more; returns when all are answered."""
        self._arriving.cancel()
        await asyncio.gather(*self._calls)


def draw(watch: Watch, path: Path) -> None:
    """Load, replicas and latency, one below the other, as PNG."""
    from matplotlib.figure import Figure

    arrived, latency = np.array(watch.calls).T
    seconds = np.arange(int(arrived.max()) + 1)
    each = [latency[(arrived >= second) & (arrived < second + 1)] for second in seconds]
    looks = np.array(watch.looks)
    figure = Figure(figsize=(8, 6.5), layout="constrained")
    load, size, wait = figure.subplots(3, sharex=True)
    load.step(seconds, [len(one) for one in each], where="post", color="tab:blue", label="calls that arrive")
    load.plot(looks[:, 0], looks[:, 3], color="tab:orange", label="calls that wait")
    load.set_ylabel("calls/s, calls")
    size.step(looks[:, 0], looks[:, 2], where="post", color="tab:gray", linestyle="--", label="wanted")
    size.step(looks[:, 0], looks[:, 1], where="post", color="tab:green", label="healthy")
    size.set_ylabel("replicas")
    size.set_ylim(0, looks[:, 1:3].max() + 0.5)
    for share, style in ((50, "-"), (99, ":")):
        line = [np.percentile(one, share) * 1e3 if len(one) else np.nan for one in each]
        wait.plot(seconds + 0.5, line, style, color="tab:red", label=f"p{share}")
    wait.set_ylabel("latency, ms")
    wait.set_yscale("log")
    wait.set_xlabel("seconds")
    for part in (load, size, wait):
        part.legend(loc="upper right", frameon=False)
        part.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


async def main(most: int, calm_s: float, burst_s: float, plot: Path | None) -> None:
    torch.set_num_threads(1)
    data = load_digits()
    pixels = (data.data / 16.0).astype(np.float32)
    weights = train(pixels, data.target.astype(np.int64), epochs=4)
    options: dict[str, Any] = {"min_replicas": 1, "max_replicas": most, "replica_max_concurrent_requests": 2}
    service = await ScanReader.options(num_replicas=1, autoscaling=SCALING, **options).as_service(weights, pixels)

    model = make_model()
    model.load_state_dict(weights)
    answers = np.array(read(model, pixels))
    watch = Watch()
    looking = asyncio.create_task(watch.look(service))
    arrivals = Arrivals(service, watch, answers)
    await asyncio.sleep(calm_s)
    arrivals.rate = BURST * most
    print(f"{watch.now:5.1f} s  the burst begins: {arrivals.rate:.0f} calls/s instead of {CALM:.0f}")
    await watch.until(healthy=most)
    await asyncio.sleep(burst_s)
    arrivals.rate = CALM
    print(f"{watch.now:5.1f} s  the burst is over")
    await watch.until(healthy=1)
    await asyncio.sleep(calm_s)
    await arrivals.end()
    looking.cancel()

    sizes = [look.wanted for look in watch.looks]
    steps = [size for at, size in enumerate(sizes) if at == 0 or size != sizes[at - 1]]
    print("replicas wanted:", " → ".join(map(str, steps)))
    latencies = np.array([latency for _, latency in watch.calls]) * 1e3
    print(
        f"{len(watch.calls):,} calls in {watch.now:.0f} s: {len(watch.failed)} failed, {watch.wrong} wrong; latency "
        f"p50 {np.percentile(latencies, 50):.0f} ms, p99 {np.percentile(latencies, 99):.0f} ms"
    )
    if plot is not None:
        draw(watch, plot)
        print(f"drawn in {plot}")
    await service.shutdown()
    await shutdown()
    if watch.failed:
        raise watch.failed[0]


if __name__ == "__main__":
    chosen = argparse.ArgumentParser(description="Serve a burst of calls with as many replicas as it takes.")
    chosen.add_argument("--replicas", type=int, default=4, help="the most there may be")
    chosen.add_argument("--quick", action="store_true", help="two replicas at most, and a short burst")
    chosen.add_argument("--plot", type=Path, default=Path("autoscale.png"), help="where to draw it (PNG)")
    given = chosen.parse_args()
    quick = given.quick
    asyncio.run(main(2 if quick else given.replicas, 0.5 if quick else 4.0, 0.5 if quick else 14.0, given.plot))
