"""What a comparison prints: the table (Markdown, as `docs/performance.md` has it), the machine, and the picture.

A figure is a `spread` over the rounds in which it was measured; a peer that could not be installed, or a kind of call that
failed, keeps its row and says so in it.
"""

from __future__ import annotations

import os
import platform
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

NONE: Final = "none"  # the peer has no such thing


class Column(NamedTuple):
    title: str
    figure: str  # as `load.measure` names it
    key: str
    digits: int


COLUMNS: Final = (
    Column("1 outstanding: median, ms", "noop_1", "median_ms", 2),
    Column("p99, ms", "noop_1", "p99_ms", 2),
    Column("calls/s", "noop_1", "calls_per_s", 0),
    Column("64: calls/s", "noop_64", "calls_per_s", 0),
    Column("512: calls/s", "noop_512", "calls_per_s", 0),
    Column("batches of 32: items/s", "batch", "items_per_s", 0),
    Column("16 MiB tensor: GB/s", "tensor", "gb_per_s", 2),
)
PANELS: Final = tuple(column for column in COLUMNS if column.title not in ("p99, ms", "calls/s"))


def spread(rounds: Sequence[Mapping[str, Any]], figure: str, key: str) -> dict[str, Any] | str:
    """{median, min, max, runs}, or the words that stand in its place. `rounds`: a peer's figures, one mapping each."""
    found = [one.get(figure) for one in rounds]
    values = [one[key] for one in found if one and "error" not in one]
    if values:
        return {
            "median": statistics.median(values),
            "min": min(values),
            "max": max(values),
            "runs": len(values),
        }
    errors = [one["error"] for one in found if one]
    return f"failed: {errors[-1]}" if errors else NONE


def cells(result: Mapping[str, Any]) -> list[str]:
    """A row of the table but for the name. `result`: {"rounds": [...]} or {"error": ...}."""
    if "error" in result:
        return [result["error"]] + [""] * (len(COLUMNS) - 1)
    told = []
    for column in COLUMNS:
        one = spread(result["rounds"], column.figure, column.key)
        if isinstance(one, str):
            told.append(one)
        else:
            digits = column.digits
            told.append(f"{one['median']:,.{digits}f} ({one['min']:,.{digits}f}–{one['max']:,.{digits}f})")
    return told


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown. `results`: by the peers' names."""
    rows = [["system", *(column.title for column in COLUMNS)], ["---"] * (len(COLUMNS) + 1)]
    rows += [[name, *(cell.replace("|", "\\|") for cell in cells(result))] for name, result in results.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def batch_sizes(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """How many items a batch really held, on average, for each peer that has batches."""
    sizes = {}
    for name, result in results.items():
        one = spread(result.get("rounds", []), "batch", "items_per_batch")
        if not isinstance(one, str):
            sizes[name] = one["median"]
    return sizes


def versions(results: Mapping[str, Mapping[str, Any]]) -> str:
    return "; ".join(
        f"{name}: {', '.join(f'{package} {version}' for package, version in result['versions'].items())}"
        for name, result in results.items()
        if "versions" in result
    )


def busy(look_s: float) -> float:
    """The share of all cores that is in use by anybody, 0.0 … 1.0, over so many seconds. Linux."""
    before = _cpu_times()
    time.sleep(look_s)
    idle, total = (after - then for after, then in zip(_cpu_times(), before, strict=True))
    return 1 - idle / total if total else 0.0


def machine() -> dict[str, Any]:
    """What it is measured on. Linux."""
    model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cores": os.cpu_count(),
        "cpu": model[1] if model else platform.machine(),
        "memory_gib": round(memory / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def _cpu_times() -> tuple[int, int]:
    """Idle and all ticks of all cores since boot."""
    ticks = [int(field) for field in Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()[1:9]]
    return ticks[3] + ticks[4], sum(ticks)


def picture(results: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """A PNG: a panel for each figure, a bar for each peer, whiskers from least to most; logarithmic, they are decades apart.

    Raises ModuleNotFoundError without matplotlib (the extra `bench`).
    """
    from matplotlib.figure import Figure

    names = list(results)
    drawing = Figure(figsize=(11, 1.2 + 0.42 * len(names) * 2), layout="constrained")
    axes = drawing.subplots(2, 3, sharey=True).flat
    for column, axis in zip(PANELS, axes, strict=False):
        longest = 0.0
        for at, name in enumerate(names):
            one = spread(results[name].get("rounds", []), column.figure, column.key)
            if isinstance(one, str):
                words = NONE if one == NONE else "failed"
                axis.text(0.02, at, words, transform=axis.get_yaxis_transform(), va="center", fontsize=8, color="0.4")
                continue
            whiskers = [[one["median"] - one["min"]], [one["max"] - one["median"]]]
            axis.barh(
                at, one["median"], xerr=whiskers, color="#c8553d" if at == 0 else "#588b8b", ecolor="0.3", capsize=2
            )
            label = f" {one['median']:,.{column.digits}f}"
            axis.text(one["max"], at, label, va="center", fontsize=8)
            longest = max(longest, one["max"])
        axis.set_title(column.title + ("  (less is better)" if column.key.endswith("_ms") else ""), fontsize=9)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.tick_params(axis="x", labelsize=7)
        if longest:
            axis.set_xscale("log")
            axis.set_xlim(right=longest * 6)  # room for the number beside the longest bar
    for axis in axes:
        axis.set_visible(False)
    drawing.axes[0].invert_yaxis()
    drawing.savefig(path, dpi=120)
