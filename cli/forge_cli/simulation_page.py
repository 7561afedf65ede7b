"""What people read of a simulation: plain dicts in (`forge simulate --json`), rich renderables out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from forge_cli.load import number_ms
from forge_cli.tables import plain_table

LINES: Final = 12  # of the course of things
EVENTS_SHOWN: Final = 20


def page(told: Mapping[str, Any]) -> RenderableType:
    parts: list[RenderableType] = [_head(told)]
    for part in (_latencies(told), _errors(told), _course(told["samples"]), _events(told), _decisions(told)):
        if part is not None:
            parts += [Text(), part]
    if told["notes"]:
        parts += [Text(), *(Text(f"not as in reality: {note}", "dim") for note in told["notes"])]
    return Group(*parts)


def moment(seconds: float) -> str:
    """`0:04:30`."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"


def _head(told: Mapping[str, Any]) -> Text:
    replicas, queue = told["replicas"], told["queue"]
    hours = told["replica_seconds"] / 3600
    lines = [
        f"{told['succeeded']:,} of {told['calls']:,} calls succeeded, {told['failed']:,} failed, "
        f"{told['outstanding_at_end']:,} not answered at the end",
        f"{_how_many(replicas)}, never fewer than {replicas['fewest_healthy']} healthy; "
        f"{_s(len(told['scale_events']), 'scale event')}",
        f"longest queue {queue['longest']:,}" + (f" at {moment(queue['at_s'])}" if queue["longest"] else ""),
        f"{told['replica_seconds']:,.0f} replica-seconds ({hours:,.2f} h)"
        + (f", which cost {told['cost']:,.2f}" if told["cost"] is not None else ""),
    ]
    if told["batches"].get("batches"):
        batches = told["batches"]
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in batches["reasons"].items())
        lines.append(f"{batches['batches']:,} batches of {batches['avg_size']:.1f} calls, left for {reasons}")
    head = f"{told['class']}, {told['endpoint']}: {told['trace']} of {moment(told['seconds'])}, seed {told['seed']}"
    return Text.assemble((head, "bold"), "\n", "\n".join(lines))


def _how_many(replicas: Mapping[str, Any]) -> str:
    if replicas["fewest"] == replicas["most"]:
        return f"{_s(replicas['most'], 'replica')} throughout"
    return f"{replicas['fewest']} to {_s(replicas['most'], 'replica')}, {replicas['at_end']} at the end"


def _s(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _latencies(told: Mapping[str, Any]) -> Table | None:
    if told["latency_s"] is None:
        return None
    table = plain_table("ms", *(f"#{name}" for name in told["latency_s"]))
    for title, name in (("latency", "latency_s"), ("of it waiting", "waiting_s"), ("of it running", "running_s")):
        table.add_row(title, *(number_ms(seconds) for seconds in told[name].values()))
    return table


def _errors(told: Mapping[str, Any]) -> Table | None:
    if not told["errors"]:
        return None
    table = plain_table("ERROR", "#CALLS")
    for name, count in told["errors"].items():
        table.add_row(name, f"{count:,}")
    return table


def _course(samples: Sequence[Mapping[str, Any]]) -> Table:
    """The run in a few lines: of each stretch the mean load, the longest queue, the worst p99; replicas at its end."""
    table = plain_table("UNTIL", "#CALLS/S", "#REPLICAS", "#HEALTHY", "#QUEUED AT MOST", "#p99 AT WORST, ms")
    a_second = (
        math.ceil(1 / samples[0]["at"]) if samples else 1
    )  # what is shorter has the same name as what is before it
    length = max(-(-len(samples) // LINES), a_second)
    for start in range(0, len(samples), length):
        some = samples[start : start + length]
        worst = max((sample["p99_s"] for sample in some if sample["p99_s"] is not None), default=None)
        table.add_row(
            moment(some[-1]["at"]),
            f"{sum(sample['rate'] for sample in some) / len(some):,.1f}",
            f"{some[-1]['wanted']:,}",
            f"{some[-1]['healthy']:,}",
            f"{max(sample['queued_most'] for sample in some):,}",
            "–" if worst is None else number_ms(worst),
        )
    return table


def _events(told: Mapping[str, Any]) -> Table | None:
    events = told["scale_events"]
    if not events:
        return None
    table = plain_table("SCALED AT", "#BY", "#TO", "RULE", "~WHY")
    for event in events[:EVENTS_SHOWN]:
        table.add_row(
            moment(event["at"]), f"{event['delta']:+d}", f"{event['wanted']:,}", event["rule"], event["reason"]
        )
    if len(events) > EVENTS_SHOWN:
        table.add_row(Text(f"… {len(events) - EVENTS_SHOWN:,} more", "dim"), "", "", "", Text("--json has all", "dim"))
    return table


def _decisions(told: Mapping[str, Any]) -> Text | None:
    if not told["decisions"]:
        return None
    rules = ", ".join(f"{rule} {count:,}" for rule, count in told["decisions"].items())
    return Text(f"the policy was asked {sum(told['decisions'].values()):,} times and said: {rules}", "dim")
