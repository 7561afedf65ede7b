"""Handwritten digits through the broker: train a small classifier here, serve it with two replicas, read every image there.

The data is scikit-learn's bundled copy of the UCI handwritten digits: 1,797 scans of 8 × 8 pixels. A quarter of them is
held out from training. The trained weights are the constructor's argument, so they travel to the replicas with `as_service`;
after that each image is one call, up to `OUTSTANDING` of them at a time: once to `read_one`, which runs the model on it, and once
to `read`, whose calls the broker gathers into batches, so that the model runs on up to 32 images at once. Both figures are printed.

    python examples/digits.py
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Awaitable, Callable

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from forge_client import ForgeActor, LeastLoadedRouter, service_endpoint, shutdown

SEED = 0
OUTSTANDING = 128  # calls at once: two batches for each of two replicas, so that one fills while another is read


def make_model() -> nn.Sequential:
    """64 pixels in, the logits of 10 digits out."""
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def train(pixels: NDArray[np.float32], digits: NDArray[np.int64], epochs: int) -> dict[str, Tensor]:
    """The weights after `epochs` passes. pixels: (n, 64), 0.0 … 1.0; digits: (n,), 0 … 9."""
    torch.manual_seed(SEED)
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    images, labels = torch.from_numpy(pixels), torch.from_numpy(digits)
    for _ in range(epochs):
        for batch in torch.split(torch.randperm(len(images)), 32):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
            torch.autograd.backward(loss)
            optimizer.step()
    return model.state_dict()


class DigitReader(ForgeActor):
    """One replica: the trained model in a process of its own."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        torch.set_num_threads(1)  # the replicas are the parallelism; more threads would only contend with each other
        self.model = make_model()
        self.model.load_state_dict(weights)
        self.model.eval()
        self.looks = 0

    def look(self, images: NDArray[np.float32]) -> list[tuple[int, float]]:
        """images: (n, 64). For each the digit, and how sure the model is of it."""
        self.looks += 1
        with torch.inference_mode():
            sure, digits = self.model(torch.from_numpy(images)).softmax(dim=1).max(dim=1)
        return list(zip(digits.tolist(), sure.tolist(), strict=True))

    @service_endpoint(router=LeastLoadedRouter())
    async def read_one(self, pixels: NDArray[np.float32]) -> tuple[int, float]:
        """pixels: (64,), 0.0 … 1.0. The digit it shows, and how sure the model is of it, 0.0 … 1.0."""
        return self.look(pixels[np.newaxis])[0]

    @service_endpoint(router=LeastLoadedRouter(), batch_size=32, batch_timeout=0.01, batch_mode="call")
    async def read(self, pixels: list[NDArray[np.float32]]) -> list[tuple[int, float]]:
        """For its callers the same as `read_one`: each sends (64,) and gets one answer. The broker makes the lists."""
        return self.look(np.stack(pixels))

    @service_endpoint()
    async def looked(self) -> int:
        """How often the model has run."""
        return self.looks


async def read_all(
    route: Callable[[NDArray[np.float32]], Awaitable[tuple[int, float]]], pixels: NDArray[np.float32]
) -> tuple[NDArray[np.int64], float]:
    """The digits read, and the seconds it took, with `OUTSTANDING` calls at once."""
    answers = np.zeros(len(pixels), dtype=np.int64)
    room = asyncio.Semaphore(OUTSTANDING)

    async def read(index: int) -> None:
        async with room:
            answers[index], _ = await route(pixels[index])

    began = time.perf_counter()
    await asyncio.gather(*(read(index) for index in range(len(pixels))))
    return answers, time.perf_counter() - began


async def main(replicas: int, epochs: int) -> None:
    torch.set_num_threads(
        1
    )  # a step is too small to share: two threads would wait for each other, and ten times as long when busy
    data = load_digits()
    pixels = (data.data / 16.0).astype(np.float32)
    digits = data.target.astype(np.int64)
    seen, held_out = train_test_split(np.arange(len(digits)), test_size=0.25, random_state=SEED, stratify=digits)

    began = time.perf_counter()
    weights = train(pixels[seen], digits[seen], epochs)
    print(f"trained on {len(seen)} images in {time.perf_counter() - began:.1f} s; {len(held_out)} are held out")

    began = time.perf_counter()
    # Room for all that is outstanding. A batch takes one unit of it, but each call to `read_one` takes one as well.
    configured = DigitReader.options(num_replicas=replicas, replica_max_concurrent_requests=OUTSTANDING)
    reader = await configured.as_service(weights)
    print(f"{replicas} replicas up in {time.perf_counter() - began:.1f} s")

    await asyncio.gather(*(reader.read_one.route(pixels[index]) for index in range(OUTSTANDING)))  # the first are slow
    one_by_one, one_by_one_s = await read_all(reader.read_one.route, pixels)
    looks = sum(await reader.looked.fanout())
    answers, took_s = await read_all(reader.read.route, pixels)
    looks = sum(await reader.looked.fanout()) - looks

    count = len(digits)
    print(
        f"one by one: {count} images in {one_by_one_s:.2f} s: {count / one_by_one_s:,.0f} images/s, {OUTSTANDING} outstanding"
    )
    print(
        f"batched:    {count} images in {took_s:.2f} s: {count / took_s:,.0f} images/s, {count / looks:.1f} images a batch: "
        f"× {one_by_one_s / took_s:.2f}"
    )
    print(f"the two agree on {(answers == one_by_one).sum()} images")
    right = answers == digits
    print(f"accuracy {right[held_out].mean():.1%} on the held-out images, {right.mean():.1%} on all")
    summary = await reader.get_metrics_summary()
    for idx, figures in summary["replicas"].items():
        print(
            f"replica {idx}: {figures['successful_requests']} calls, "
            f"{figures['failed_requests']} failed, mean latency {figures['avg_latency'] * 1e3:.1f} ms"
        )

    await reader.shutdown()
    await shutdown()


if __name__ == "__main__":
    options = argparse.ArgumentParser(description="Serve a digit classifier and read 1,797 images with it.")
    options.add_argument("--replicas", type=int, default=2)
    options.add_argument("--epochs", type=int, default=20)
    options.add_argument("--quick", action="store_true", help="train for 4 passes only")
    chosen = options.parse_args()
    asyncio.run(main(chosen.replicas, 4 if chosen.quick else chosen.epochs))
