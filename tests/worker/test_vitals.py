"""What a worker says of its process and its GPUs, in its heartbeat's thread (F1, X3)."""

from __future__ import annotations

import sys
import time
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from forge_worker.vitals import Vitals


class NVML(ModuleType):
    """Two GPUs, and a slice of a third that has no utilisation."""

    class NVMLError(Exception):
        pass

    def __init__(self, *, driver: bool = True) -> None:
        super().__init__("pynvml")
        self.driver = driver
        self.opened = 0

    def nvmlInit(self) -> None:
        self.opened += 1
        if not self.driver:
            raise self.NVMLError("driver not loaded")

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        if index > 1:
            raise self.NVMLError("invalid argument")
        return str(index)

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return uuid

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        return SimpleNamespace(used=(1 << 30) if handle == "0" else (3 << 30))

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:
        if handle.startswith("MIG"):
            raise self.NVMLError("not supported")
        return SimpleNamespace(gpu=20 if handle == "0" else 60)


def beats(monkeypatch: pytest.MonkeyPatch, nvml: NVML, *gpus: str) -> list[dict[str, float]]:
    """The first two."""
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    vitals = Vitals(gpus)
    return [vitals.read(), vitals.read()]


def test_cpu_is_told_in_seconds_and_as_a_share_since_the_last_beat() -> None:
    vitals = Vitals(())
    first = vitals.read()
    until = time.process_time() + 0.05
    while time.process_time() < until:
        pass
    second = vitals.read()
    assert second["cpu_s"] - first["cpu_s"] == pytest.approx(0.05, abs=0.03)
    assert "cpu_share" not in first
    assert 0.0 < second["cpu_share"] < 1.5
    assert second["rss"] > 1 << 20


def test_gpus_are_asked_from_the_second_beat_on_and_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A start waits for no driver."""
    nvml = NVML()
    first, second = beats(monkeypatch, nvml, "0", "1")
    assert "gpu_bytes" not in first
    assert second["gpu_bytes"] == 4 << 30
    assert second["gpu_busy"] == pytest.approx(0.4)
    assert nvml.opened == 1


def test_what_a_slice_of_a_gpu_does_not_tell_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    _, second = beats(monkeypatch, NVML(), "MIG-1b2c")
    assert second["gpu_bytes"] == 3 << 30
    assert "gpu_busy" not in second


@pytest.mark.parametrize(("nvml", "gpus"), [(NVML(driver=False), ("0",)), (NVML(), ("7",))], ids=["driver", "GPU"])
def test_without_a_driver_or_such_a_gpu_the_rest_is_told(
    monkeypatch: pytest.MonkeyPatch, nvml: NVML, gpus: tuple[str, ...]
) -> None:
    _, second = beats(monkeypatch, nvml, *gpus)
    assert second.keys() == {"rss", "cpu_s", "cpu_share"}


def test_a_worker_without_gpus_does_not_open_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = NVML()
    beats(monkeypatch, nvml)
    assert nvml.opened == 0
