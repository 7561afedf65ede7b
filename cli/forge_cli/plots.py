"""A simulation as a picture: load, replicas, queue and latency over time, one below the other. Needs matplotlib (the extra `plot`)."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from forge_cli.exits import Misused

FORMATS: Final = (".png", ".svg", ".pdf")


def check_plot(path: Path) -> None:
    """Raises Misused when nothing could be drawn there, before anything is computed for it."""
    if path.suffix.lower() not in FORMATS:
        raise Misused(f"{path} is no picture: its name ends with {', '.join(FORMATS)}")
    if not os.access(path.parent, os.W_OK):
        raise Misused(f"{path} cannot be written: {path.parent} is no folder that this user may write to")
    if importlib.util.find_spec("matplotlib") is None:
        raise Misused("--plot needs matplotlib, which is not installed: pip install 'forge-broker[plot]'")


def draw(told: Mapping[str, Any], path: Path) -> None:
    """`told`: what `forge simulate --json` prints."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    samples = told["samples"]
    unit, unit_s = ("h", 3600.0) if told["seconds"] >= 7200 else ("min", 60.0)
    times = [sample["at"] / unit_s for sample in samples]
    figure, (load, replicas, queue, latency) = pyplot.subplots(4, 1, sharex=True, figsize=(9, 9), layout="constrained")

    def line(axes: Any, field: str, label: str, scale: float = 1.0, **style: Any) -> None:
        values = [float("nan") if sample[field] is None else sample[field] * scale for sample in samples]
        axes.plot(times, values, label=label, **style)

    figure.suptitle(f"{told['class']} {told['endpoint']}: {told['trace']}, seed {told['seed']}")
    line(load, "rate", "calls/s", color="tab:gray")
    load.set_ylabel("calls/s")
    line(
        replicas,
        "processes",
        "processes, those that start or drain among them",
        color="tab:orange",
        drawstyle="steps-post",
    )
    line(replicas, "healthy", "healthy", color="tab:green", drawstyle="steps-post")
    line(replicas, "wanted", "wanted", color="black", linestyle=":", drawstyle="steps-post")
    for event in told["scale_events"]:
        replicas.axvline(
            event["at"] / unit_s, color="tab:red" if event["rule"] == "emergency" else "lightgray", linewidth=0.7
        )
    replicas.set_ylabel("replicas")
    line(queue, "queued_most", "waiting", color="tab:blue")
    queue.set_ylabel("calls waiting")
    line(latency, "p99_s", "p99", 1000.0, color="tab:red")
    line(latency, "p50_s", "p50", 1000.0, color="tab:blue")
    latency.set_ylabel("latency, ms")
    latency.set_yscale("log")
    # Numbers, not powers of ten; three of each decade, because a whole run may lie within one, and nine of each cover one another.
    latency.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    latency.yaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
    latency.yaxis.set_minor_formatter(NullFormatter())
    replicas.yaxis.set_major_locator(MaxNLocator(integer=True))
    latency.set_xlabel(unit)
    for axes in (load, replicas, queue):
        axes.set_ylim(bottom=0)
    for axes in (replicas, latency):
        axes.legend(loc="best", fontsize="small")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
