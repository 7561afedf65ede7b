"""What a worker's process takes of the machine: CPU, memory, and of its GPUs. Read in the heartbeat's thread, for its beats.

GPUs are asked through NVML, where nvidia-ml-py is installed (the extra `gpu`). It is imported at the second beat, so that a worker starts
no later for it, and does not initialise CUDA: the process stays as clean as the actor's `__init__` expects it. What a GPU does not tell
(a slice of one has no utilisation) is left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from forge_worker.machine import resident_bytes


class Vitals:
    """`gpus`: this worker's, as CUDA_VISIBLE_DEVICES names them; numbers are NVML's, in the order of the bus."""

    def __init__(self, gpus: Sequence[str]) -> None:
        self._gpus = tuple(gpus)
        self._read_gpus: Callable[[], dict[str, float]] | None = None
        self._beaten: tuple[float, float] | None = None  # monotonic and CPU seconds, at the last beat

    def read(self) -> dict[str, float]:
        now, used = time.monotonic(), time.process_time()
        told: dict[str, float] = {"rss": resident_bytes(), "cpu_s": round(used, 3)}
        if self._beaten is None:
            self._beaten = now, used
            return told
        then, before = self._beaten
        if now > then:
            told["cpu_share"] = round((used - before) / (now - then), 3)
        self._beaten = now, used
        if self._gpus:
            if self._read_gpus is None:
                self._read_gpus = _open(self._gpus)
            told |= self._read_gpus()
        return told


def _open(gpus: Sequence[str]) -> Callable[[], dict[str, float]]:
    """Who reads these GPUs; who reads nothing, where NVML is not there or knows none of them."""
    try:
        import pynvml
    except ImportError:
        return dict
    try:
        pynvml.nvmlInit()
        handles = [_handle(pynvml, gpu) for gpu in gpus]
    except pynvml.NVMLError:
        return dict
    return lambda: _read(pynvml, handles)


def _handle(nvml: Any, gpu: str) -> Any:
    return nvml.nvmlDeviceGetHandleByIndex(int(gpu)) if gpu.isdigit() else nvml.nvmlDeviceGetHandleByUUID(gpu)


def _read(nvml: Any, handles: Sequence[Any]) -> dict[str, float]:
    told: dict[str, float] = {}
    for name, read in (
        ("gpu_bytes", lambda: sum(int(nvml.nvmlDeviceGetMemoryInfo(one).used) for one in handles)),
        (
            "gpu_busy",
            lambda: sum(int(nvml.nvmlDeviceGetUtilizationRates(one).gpu) for one in handles) / 100 / len(handles),
        ),
    ):
        try:
            told[name] = read()
        except nvml.NVMLError:
            continue
    return told
