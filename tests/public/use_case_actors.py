"""The actors of the three use cases. In a module of their own, so that workers import no test tools with them."""

from __future__ import annotations

import asyncio
import json
import os
from collections import deque
from pathlib import Path

from forge_client import ForgeActor, current_session, endpoint


class LinearModel(ForgeActor):
    """Model inference: weights are read from a file when a replica starts, on the GPU that it was given."""

    def __init__(self, model_path: str) -> None:
        self.model_path = Path(model_path)

    async def setup(self) -> None:
        self.weights: list[float] = json.loads(self.model_path.read_text("utf-8"))

    @endpoint
    async def predict(self, features: list[float]) -> float:
        await asyncio.sleep(0.001)  # what a GPU would take
        return sum(weight * feature for weight, feature in zip(self.weights, features, strict=True))

    @endpoint
    async def gpu(self) -> str:
        return os.environ["CUDA_VISIBLE_DEVICES"]


class ChunkCounter(ForgeActor):
    """A batch job: chunks of records."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size

    @endpoint
    async def pid(self) -> int:
        return os.getpid()

    @endpoint
    async def count_even(self, start: int) -> tuple[int, int]:
        await asyncio.sleep(0.05)  # a chunk's work
        records = range(start, start + self.batch_size)
        return start, sum(record % 2 == 0 for record in records)


class MovingSum(ForgeActor):
    """Streams: a session is one, and its window goes with it from replica to replica."""

    def __init__(self, window_size: int) -> None:
        self.window_size = window_size
        self.windows: dict[str | None, deque[int]] = {}

    @endpoint
    async def push(self, value: int) -> tuple[int, int]:
        """The sum of the last values of this stream, and where it was made."""
        window = self.windows.setdefault(current_session(), deque(maxlen=self.window_size))
        window.append(value)
        return sum(window), os.getpid()

    async def export_session(self, sess_id: str) -> list[int]:
        return list(self.windows[sess_id])

    async def import_session(self, sess_id: str, state: list[int]) -> None:
        self.windows[sess_id] = deque(state, maxlen=self.window_size)
