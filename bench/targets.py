"""What a call is to cost at most, and what it costs: every figure that is promised, measured, with a mark.

    make bench                                             # all rows: five minutes, more on a busy machine; writes bench/out/targets.json
    python bench/targets.py --only uvloop_512 start        # some of them
    python bench/targets.py --list                         # their names

A row runs in a process of its own, which ends before the next begins. Where it is compared with `zmq.proxy` (libzmq's, one message for each
call) that runs in turn with it, run by run. Marks are given to medians: a figure *holds*, or it *does not*. Exit code 1 when one does not
hold or could not be measured. How the rows are measured is in `through_the_broker` (real processes), `core_alone` (the broker's core
with no socket around it), `counting_cost` and `simulated_hour`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final, NamedTuple

if not __package__:  # run as a plain script
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import core_alone, counting_cost, simulated_hour, through_the_broker
from bench.chaos_processes import MARK, end_all
from bench.closed_loop import spread
from bench.effort import Effort, Figures, Measure, NotHere
from bench.peers import report

ROOT: Final = Path(__file__).resolve().parent.parent
ROW_S: Final = 600.0  # longer than the longest takes on a busy machine
END_S: Final = 10.0  # what has told its figures has so long to end
LOOK_S: Final = 0.25  # at what others are doing, before each row

HOLDS, DOES_NOT, NOT_MEASURED = "holds", "does not", "not measured"


class Target(NamedTuple):
    """A figure of a row, and what it is to reach; with neither bound it is told, and gets no mark."""

    figure: str
    what: str
    least: float | None = None
    most: float | None = None
    below: float | None = None
    digits: int = 0

    def to_reach(self) -> str:
        for bound, sign in ((self.least, "≥"), (self.most, "≤"), (self.below, "<")):
            if bound is not None:
                return f"{sign} {shown(bound, self.digits)}"
        return ""

    def judge(self, value: float) -> str:
        if self.least is self.most is self.below is None:
            return ""
        holds = (
            (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )
        return HOLDS if holds else DOES_NOT


class Row(NamedTuple):
    name: str
    what: str
    how: str  # loop, credit, payload, replicas
    measure: Measure
    targets: tuple[Target, ...]
    apart: bool = False  # each run in a process of its own
    once: bool = False  # one run: it takes long, and counts rather than times


class Result(NamedTuple):
    row: Row
    figures: Figures
    why_not: str = ""  # it was not measured


CREDIT: Final = "64 B, 2 replicas, room 1024"
PER_S = partial(Target, "calls_per_s", "calls/s")
OF_PROXY = partial(Target, "of_proxy", "× zmq.proxy", digits=2)
PROXY = (
    Target("proxy_per_s", "zmq.proxy, calls/s"),
    Target("of_bare_proxy", "× zmq.proxy, nobody awaiting", digits=2),
    Target("bare_per_s", "zmq.proxy, nobody awaiting, calls/s"),
)

ROWS: Final = (
    Row(
        "uvloop_512",
        "512 outstanding",
        f"uvloop, {CREDIT}",
        partial(through_the_broker.closed_loop, outstanding=512),
        (PER_S(least=150_000), OF_PROXY(least=2.2), *PROXY),
    ),
    Row(
        "asyncio_512",
        "512 outstanding",
        f"asyncio, {CREDIT}",
        partial(through_the_broker.closed_loop, outstanding=512, uvloop=False),
        (PER_S(least=110_000), OF_PROXY(least=1.6), *PROXY),
    ),
    Row(
        "uvloop_4096",
        "4,096 outstanding",
        f"uvloop, {CREDIT}",
        partial(through_the_broker.closed_loop, outstanding=4096),
        (PER_S(least=110_000), *PROXY),
    ),
    Row(
        "room_10",
        "512 outstanding, default room",
        "uvloop, 64 B, 2 replicas, room 10",
        partial(through_the_broker.closed_loop, outstanding=512, room=10),
        (PER_S(least=60_000), *PROXY),
    ),
    Row(
        "uvloop_64",
        "64 outstanding",
        f"uvloop, {CREDIT}",
        partial(through_the_broker.with_p99, outstanding=64),
        (PER_S(least=90_000), Target("p99_ms", "p99, ms", below=2.0, digits=2)),
    ),
    Row(
        "many_clients",
        "32 connections from 4 processes, 1 each",
        f"uvloop, {CREDIT}",
        through_the_broker.many_clients,
        (
            OF_PROXY(least=0.5),
            PER_S(),
            *PROXY,
            Target("broker_us", "CPU of the broker, µs a call", digits=1),
        ),
    ),
    Row(
        "one",
        "1 outstanding",
        f"uvloop, {CREDIT}",
        through_the_broker.one_outstanding,
        (
            Target("median_ms", "median, ms", below=0.40, digits=3),
            Target("p99_ms", "p99, ms", below=1.0, digits=3),
            Target("proxy_median_ms", "zmq.proxy, median, ms", digits=3),
        ),
    ),
    Row(
        "sessions",
        "512 outstanding over 10,000 open sessions",
        f"uvloop, {CREDIT}",
        partial(through_the_broker.over_sessions, outstanding=512),
        (
            Target("of_stateless", "× the stateless rate", least=0.8, digits=2),
            PER_S(),
            Target("stateless_per_s", "stateless, calls/s"),
        ),
    ),
    Row(
        "batches",
        "call-mode batches of 32, 2,048 outstanding",
        f"uvloop, {CREDIT}",
        partial(through_the_broker.batches, outstanding=2048),
        (
            Target("items_per_s", "items/s", least=200_000),
            Target("items_per_batch", "items in a batch", digits=1),
        ),
    ),
    Row(
        "broker_cpu",
        "CPU per call, 512 outstanding",
        f"uvloop, {CREDIT}",
        partial(through_the_broker.broker_cpu, outstanding=512),
        (
            Target("broker_us", "the broker's process, µs", most=3.0, digits=2),
            Target("broker_core_us", "of it the broker's own thread, µs", digits=2),
            Target("workers_us", "both workers, µs", digits=2),
            Target("client_us", "the client, µs", digits=2),
        ),
    ),
    Row(
        "core_cpu",
        "CPU per call, the core alone",
        f"no sockets, envelopes of {core_alone.ENVELOPE}, {CREDIT}",
        core_alone.cpu_per_call,
        (Target("us", "handle, tick and pack, µs", most=1.5, digits=2),),
    ),
    Row(
        "counting",
        "what counting costs a call, the core alone",
        f"no sockets, envelopes of {core_alone.ENVELOPE} and of 1, {CREDIT}, counted and uncounted in turn",
        counting_cost.counting_cost,
        (
            # 3 % of what the broker's process takes for a call: 4.8 µs in a fast hour with 512 outstanding, 200 for one that comes alone.
            Target("packed_counting_us", f"in envelopes of {core_alone.ENVELOPE}, µs", most=0.14, digits=2),
            Target("lone_counting_us", "alone in one, µs", most=6.0, digits=1),
            Target("packed_us", f"the core, in envelopes of {core_alone.ENVELOPE}, µs", digits=2),
            Target("lone_us", "the core, alone in one, µs", digits=1),
        ),
    ),
    Row(
        "replicas",
        "cost of a call, 1,000 replicas to 2, the core alone",
        "no sockets, envelopes of 1, 64 B, 2 and 1,000 replicas, room 1024",
        core_alone.cost_of_replicas,
        tuple(Target(router, router, most=1.3, digits=2) for router in core_alone.BUILT_IN),
    ),
    Row(
        "queued_call",
        "memory of a waiting call, the core alone",
        "no sockets, 100,000 calls, 64 B, 1 replica, room 1",
        core_alone.queued_call,
        (Target("bytes", "bytes", most=1024),),
        apart=True,
    ),
    Row(
        "million_queued",
        "1,000,000 waiting calls, the core alone",
        "no sockets, 64 B, 1 replica, room 1",
        core_alone.million_queued,
        (
            # Peers on other hosts are taken for dead after `liveness` heartbeats of silence; one turn must not be one of them.
            Target("worst_turn_ms", "the longest turn, ms", most=500.0, digits=1),
            Target("status_ms", "`status`, ms", most=50.0, digits=1),
            Target("probe_ms", "an answered probe, ms", most=50.0, digits=1),
            Target("bytes", "bytes a call"),
        ),
        apart=True,
        once=True,
    ),
    Row(
        "idle_sessions",
        "1,000,000 sessions, used once and idle, the core alone",
        "no sockets, 64 B, 2 replicas, room 1024",
        core_alone.idle_sessions,
        (
            Target("mb", "MB", most=500.0),
            Target("status_ms", "`status`, ms", most=50.0, digits=1),
        ),
        apart=True,
        once=True,
    ),
    Row(
        "simulated_hour",
        "an hour of 100 calls/s, simulated",
        "no sockets, virtual time, 0 B, 2 to 8 replicas, room 10",
        simulated_hour.simulated_hour,
        (
            # On a core of its own the two are the same; on a shared machine the wall tells of the neighbours.
            Target("cpu_s", "CPU, s", most=15.0, digits=1),
            Target("wall_s", "wall time, s", digits=1),
            Target("us", "µs a call", digits=1),
        ),
        once=True,
    ),
    Row(
        "tensors",
        "16 MiB float32 echoed, 1 outstanding",
        "asyncio, 16 MiB, 1 replica, room 10",
        through_the_broker.tensors,
        (
            Target("frames_gb_s", "through the broker, GB/s", least=1.0, digits=2),
            Target("frames_peak", "peak memory, × the array", below=4.0, digits=1),
            Target("shared_gb_s", "shared memory, GB/s", least=4.0, digits=2),
        ),
    ),
    Row(
        "start",
        "`as_service()` without torch and the first call",
        "asyncio, 64 B, 1 and 4 replicas, room 10",
        through_the_broker.start,
        (
            Target("1_s", "1 replica, s", below=0.5, digits=2),
            Target("4_s", "4 replicas, s", below=1.0, digits=2),
            Target("1_with_broker_s", "1 replica, the embedded broker's start included, s", digits=2),
            Target("4_with_broker_s", "4 replicas, the embedded broker's start included, s", digits=2),
        ),
        apart=True,
    ),
)


def shown(value: float, digits: int) -> str:
    return f"{value:,.{digits}f}"


def measured(row: Row, effort: Effort) -> Result:
    """In a process of its own, or in several. A row that fails says why in its place."""
    figures: Figures = {}
    runs = 1 if row.once else effort.runs
    for _ in range(runs if row.apart else 1):
        found = in_a_process(row.name, effort._replace(runs=1 if row.apart else runs))
        if isinstance(found, str):
            return Result(row, {}, found)
        for name, values in found.items():
            figures.setdefault(name, []).extend(values)
    return Result(row, figures)


def in_a_process(name: str, effort: Effort) -> Figures | str:
    """A row's figures, or why there are none. All that was started is gone afterwards."""
    spawn = multiprocessing.get_context("spawn")
    mark = uuid.uuid4().hex
    ours, theirs = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_measure, args=(theirs, mark, name, effort))
    process.start()
    theirs.close()
    try:
        if not ours.poll(ROW_S):
            return f"failed: no figures within {ROW_S} s"
        found: Figures | str = ours.recv()
        process.join(END_S)
        return found
    except EOFError:
        process.join()
        return f"failed: its process ended with {process.exitcode}"
    finally:
        ours.close()
        process.kill()
        process.join()
        end_all(mark, 0.0)


def _measure(pipe: Connection, mark: str, name: str, effort: Effort) -> None:
    os.environ[MARK] = mark  # of all that is started from here
    try:
        (row,) = (row for row in ROWS if row.name == name)
        pipe.send(row.measure(effort))
    except NotHere as problem:
        pipe.send(f"not measured here: {problem}")
    except Exception as problem:
        pipe.send(f"failed: {type(problem).__name__}: {' '.join(str(problem).split())[:300]}")
        raise


def lines_of(result: Result) -> list[tuple[str, ...]]:
    """A line for each figure: what, how, figure, to reach, measured, mark."""
    row = result.row
    lines: list[tuple[str, ...]] = []
    for at, target in enumerate(row.targets):
        head = (row.what, row.how) if at == 0 else ("", "")
        values = result.figures.get(target.figure)
        if result.why_not or not values:
            said = (result.why_not or "no such figure") if at == 0 else ""
            mark = NOT_MEASURED if target.judge(0.0) else ""
        else:
            least, median, most = (shown(one, target.digits) for one in (min(values), middle(values), max(values)))
            said = median if len(values) == 1 else f"{median} ({least}–{most})"
            mark = target.judge(middle(values))
        lines.append((*head, target.what, target.to_reach(), said, mark))
    return lines


def middle(values: Sequence[float]) -> float:
    return statistics.median(values)


def table(results: Iterable[Result]) -> str:
    """Markdown, its columns aligned."""
    head = ("what", "how", "figure", "to reach", "measured", "")
    rows = [head, *(line for result in results for line in lines_of(result))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    rows.insert(1, tuple("-" * max(3, width) for width in widths))
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    )


def marks(results: Iterable[Result]) -> dict[str, int]:
    """How many figures hold, do not, and were not measured."""
    found = {HOLDS: 0, DOES_NOT: 0, NOT_MEASURED: 0}
    for result in results:
        for line in lines_of(result):
            if line[-1]:
                found[line[-1]] += 1
    return found


def told(result: Result) -> dict[str, Any]:
    """A row as JSON has it."""
    row = result.row
    found: dict[str, Any] = {"what": row.what, "how": row.how}
    if result.why_not:
        return found | {"error": result.why_not}
    figures = {}
    for target in row.targets:
        values = result.figures[target.figure]
        bounds = {"at_least": target.least, "at_most": target.most, "below": target.below}
        figures[target.figure] = {
            "what": target.what,
            **{name: bound for name, bound in bounds.items() if bound is not None},
            **spread(values),
            "runs": len(values),
            "mark": target.judge(middle(values)),
        }
    return found | {"figures": figures}


def show(results: Sequence[Result], about: Mapping[str, Any]) -> None:
    print(
        f"{about['cores']} cores ({about['cpu']}, {about['memory_gib']} GiB), Linux {about['kernel']}, Python {about['python']}; between "
        f"the rows, when nothing of ours ran, others used {about['others']['median']:.0%} of it "
        f"({about['others']['min']:.0%}–{about['others']['max']:.0%})"
    )
    print(f"medians of {about['runs']} runs (least–most), closed loops of {about['seconds']} s; {about['command']}")
    if about["scale"] != 1.0:
        print(f"counts (calls that wait, sessions, replicas) are {about['scale']} of what is written")
    print(f"\n{table(results)}\n")
    found = marks(results)
    print(f"{found[HOLDS]} hold, {found[DOES_NOT]} do not, {found[NOT_MEASURED]} were not measured")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [row.name for row in ROWS]
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help="these rows")
    parser.add_argument("--list", action="store_true", help="the rows' names")
    parser.add_argument("--runs", type=int, default=Effort().runs)
    parser.add_argument("--seconds", type=float, default=Effort().seconds, help="of each closed loop")
    parser.add_argument("--scale", type=float, default=1.0, help="of counts: 0.01 is a quick look")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args(arguments)
    if options.list:
        print("\n".join(f"{row.name:<16}{row.what}; {row.how}" for row in ROWS))
        return 0
    effort = Effort(options.runs, options.seconds, options.scale)
    about, others, results = report.machine(), [], []
    for row in ROWS:
        if options.only and row.name not in options.only:
            continue
        others.append(report.busy(LOOK_S))
        began = time.perf_counter()
        results.append(measured(row, effort))
        said = results[-1].why_not or "measured"
        print(f"{row.name}: {said}, {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    about |= {"others": spread(others), **effort._asdict()}
    about["command"] = " ".join(["python", os.path.relpath(sys.argv[0], ROOT), *(arguments or sys.argv[1:])])
    show(results, about)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        rows = {result.row.name: told(result) for result in results}
        options.json.write_text(json.dumps({"about": about, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    found = marks(results)
    return 1 if found[DOES_NOT] or found[NOT_MEASURED] else 0


if __name__ == "__main__":
    sys.exit(main())
