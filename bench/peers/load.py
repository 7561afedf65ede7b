"""The load that every peer gets, in the peer's own environment: no-op, batch and tensor, one client process.

A peer's `serving(kind)` starts what serves one kind of call, and yields a function that returns awaitables; here it is
called in closed loops and timed. So all peers have the same client loop, and what differs is what lies behind the call;
and nobody is slowed down by idle workers of another kind. Only the standard library and numpy: it runs in every
environment. uvloop drives the loop wherever it is installed.

    python -m bench.peers.majordomo --seconds 1 --out figures.json
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import importlib.util
import json
import math
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

PAYLOAD: Final = b"x" * 64
OUTSTANDING: Final = (1, 64, 512)
REPLICAS: Final = 2

BATCH: Final = 32  # items at most
BATCH_WAIT_S: Final = 0.01
BATCH_OUTSTANDING: Final = 512

TENSOR_MIB: Final = 16
TENSOR_TRIPS: Final = (3, 50)  # at least, at most

WARM_S: Final = 0.5
ERROR_CHARS: Final = 300

NOOP: Final = "noop"  # bytes in, the same bytes out
BATCH_NOOP: Final = "batch"  # bytes in, `size_told` of its batch out
TENSOR: Final = "tensor"  # a float32 array in, an equal one out
KINDS: Final = (NOOP, TENSOR, BATCH_NOOP)

Call = Callable[[Any], Awaitable[Any]]
Serving = Callable[[str], AbstractAsyncContextManager[Call]]


def size_told(items: int) -> bytes:
    """What a batched no-op answers: how many were in the batch, in as many bytes as it was sent."""
    return items.to_bytes(len(PAYLOAD), "little")


async def closed_loop(
    call: Call, payload: Any, outstanding: int, seconds: float
) -> tuple[float, list[float], list[Any]]:
    """Calls/s of so many callers that each call again when answered; every call's seconds, and its answer."""
    took: list[float] = []
    answers: list[Any] = []
    clock = time.perf_counter
    began = clock()
    until = began + seconds

    async def caller() -> None:
        now = clock()
        while now < until:
            answers.append(await call(payload))
            after = clock()
            took.append(after - now)
            now = after

    await asyncio.gather(*(caller() for _ in range(outstanding)))
    return len(took) / (clock() - began), took, answers


def quantile(values: Sequence[float], share: float) -> float:
    """The value that this share of them does not exceed."""
    return sorted(values)[max(0, math.ceil(len(values) * share) - 1)]


async def noop(call: Call, outstanding: int, seconds: float) -> dict[str, float]:
    await closed_loop(call, PAYLOAD, outstanding, min(WARM_S, seconds))
    rate, took, answers = await closed_loop(call, PAYLOAD, outstanding, seconds)
    if set(answers) != {PAYLOAD}:
        raise RuntimeError("the no-op did not answer with what it was sent")
    return {
        "calls_per_s": rate,
        "median_ms": statistics.median(took) * 1e3,
        "p99_ms": quantile(took, 0.99) * 1e3,
        "calls": len(took),
    }


async def batch(call: Call, seconds: float) -> dict[str, float]:
    await closed_loop(call, PAYLOAD, BATCH_OUTSTANDING, min(WARM_S, seconds))
    rate, _, answers = await closed_loop(call, PAYLOAD, BATCH_OUTSTANDING, seconds)
    sizes = [int.from_bytes(answer, "little") for answer in answers]
    if not all(1 <= size <= BATCH for size in sizes):
        raise RuntimeError(f"batches of {min(sizes)} to {max(sizes)} items, where {BATCH} is the most")
    # Each item tells the size of its batch, so a batch of n is told n times: n × 1/n counts it once.
    return {"items_per_s": rate, "items_per_batch": len(sizes) / sum(1 / size for size in sizes)}


async def tensor(call: Call, seconds: float) -> dict[str, float]:
    sent = np.random.default_rng(0).random(TENSOR_MIB * 2**18, dtype=np.float32)
    for _ in range(2):
        answer = await call(sent)
        if not (answer.dtype == np.float32 and np.array_equal(answer, sent)):
            raise RuntimeError("the tensor that came back is not the one that was sent")
        del answer
    at_least, at_most = TENSOR_TRIPS
    took: list[float] = []
    until = time.perf_counter() + seconds
    while len(took) < at_least or (len(took) < at_most and time.perf_counter() < until):
        began = time.perf_counter()
        answer = await call(sent)
        took.append(time.perf_counter() - began)
        del answer  # as a user would who is done with it: a peer may use its memory again
    return {"gb_per_s": sent.nbytes / statistics.median(took) / 1e9, "median_ms": statistics.median(took) * 1e3}


async def measure(serving: Serving, kinds: Sequence[str], seconds: float) -> dict[str, Any]:
    """Every figure, by name; None for a kind that the peer does not have.

    What fails says so in its place: one unfit kind costs a peer no other figure.
    """
    works: dict[str, dict[str, Callable[[Call], Awaitable[dict[str, float]]]]] = {
        NOOP: {
            f"noop_{outstanding}": partial(noop, outstanding=outstanding, seconds=seconds)
            for outstanding in OUTSTANDING
        },
        TENSOR: {"tensor": partial(tensor, seconds=seconds)},
        BATCH_NOOP: {"batch": partial(batch, seconds=seconds)},
    }
    figures: dict[str, Any] = {name: None for kind in works.values() for name in kind}
    for kind in kinds:
        try:
            async with serving(kind) as call:
                for name, work in works[kind].items():
                    figures[name] = await work(call)
        except Exception as error:
            failed = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:ERROR_CHARS]}
            figures |= {name: failed for name in works[kind] if figures[name] is None}
    return figures


def run(serving: Serving, *packages: str, kinds: Sequence[str] = KINDS) -> None:
    """A peer's main program: measures, and writes the figures with the versions of these packages.

    `kinds`: those that the peer has. Who does not gather single calls into batches leaves out `BATCH_NOOP`.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=1.0, help="of each closed loop")
    parser.add_argument("--out", type=Path, required=True, help="the figures, as JSON")
    options = parser.parse_args()
    factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    if importlib.util.find_spec("uvloop"):
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        figures = runner.run(measure(serving, kinds, options.seconds))
    told = {
        "versions": {package: importlib.metadata.version(package) for package in packages},
        "loop": "uvloop" if factory else "asyncio",
        "figures": figures,
    }
    options.out.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
