"""Which GPUs this machine has for us, as CUDA_VISIBLE_DEVICES names them. Nothing here imports torch or starts CUDA.

A worker validates `--gpu` by it, the command and a client that starts an embedded broker declare slots by it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from forge_contract.errors import ConfigError

NVIDIA_DRIVER: Final = Path("/proc/driver/nvidia/gpus")


def find_gpus(environ: Mapping[str, str]) -> tuple[str, ...]:
    """The names of the usable GPUs, from the first that knows: FORGE_GPUS, CUDA_VISIBLE_DEVICES, NVML, the driver.

    FORGE_GPUS is a count ("2" means 0 and 1), names ("0,3", "GPU-8f2e…") or "none": how tests, and machines where
    detection fails, declare them. Raises ConfigError when it cannot be read.
    """
    declared = environ.get("FORGE_GPUS")
    if declared is not None:
        return _declared(declared.strip())
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return _visible(visible)
    count = _nvml_count()
    if count is None:
        count = len(list(NVIDIA_DRIVER.iterdir())) if NVIDIA_DRIVER.is_dir() else 0
    return tuple(str(index) for index in range(count))


def check_gpus(wanted: Sequence[str], environ: Mapping[str, str]) -> None:
    """Raises ConfigError, naming what there is, when a GPU of `wanted` is not on this machine or is named twice."""
    found = find_gpus(environ)
    problems = [f"GPU {gpu!r} is named twice" for gpu in sorted(set(wanted)) if list(wanted).count(gpu) > 1]
    missing = [gpu for gpu in dict.fromkeys(wanted) if gpu not in found]
    if missing:
        there = f"it has {', '.join(found)}" if found else "it has none"
        source = next((f" ({name} says so)" for name in ("FORGE_GPUS", "CUDA_VISIBLE_DEVICES") if name in environ), "")
        problems.append(
            f"no GPU {', '.join(missing)} on this machine; {there}{source}. "
            "Use `--gpu none` for a worker without GPU, or declare GPUs with FORGE_GPUS"
        )
    if problems:
        raise ConfigError(where="--gpu", problems=problems)


def _declared(text: str) -> tuple[str, ...]:
    if text.lower() in ("", "none"):
        return ()
    if text.isdigit():
        return tuple(str(index) for index in range(int(text)))
    names = tuple(name.strip() for name in text.split(","))
    if not all(names) or len(set(names)) != len(names):
        raise ConfigError(
            where="FORGE_GPUS", message=f"{text!r} is neither a count nor different names with commas between them"
        )
    return names


def _visible(text: str) -> tuple[str, ...]:
    """CUDA takes the names up to the first that is none: `-1` and Slurm's `NoDevFiles` end the list."""
    names: list[str] = []
    for name in (part.strip() for part in text.split(",")):
        if not (name.isdigit() or name.startswith(("GPU-", "MIG-"))):
            break
        names.append(name)
    return tuple(names)


def _nvml_count() -> int | None:
    """How many GPUs NVML counts; None when it is not installed or there is no driver."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        return int(pynvml.nvmlDeviceGetCount())
    finally:
        pynvml.nvmlShutdown()
