"""What callers and workers wrote down while things broke, and the judgement over it.

Every process appends one line for each thing it did to a file of its own (`History`), in one write, so that a line is there or
not when the process is killed on the next instruction. Times are CLOCK_MONOTONIC, which all processes of a machine share. `check` is a
pure function of the records: `chaos` gives it what it read, the tests give it histories that were made up.

Clients write `invoke`, then exactly one of `ok`, `fail` (it certainly has no value for the caller) and `info` (nobody can say whether
it ran: unknown, which is counted as unknown and never as failed). Workers write `run` when a call starts. The driver writes `fault`.
"""

from __future__ import annotations

import os
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

SUFFIX: Final = ".history"
OUTCOMES: Final = ("ok", "fail", "info")


class Record(NamedTuple):
    """One line of a history."""

    time: float  # monotonic seconds
    event: str  # invoke, ok, fail, info; run; refused; fault
    kind: str  # of the call: plain, session, once (at most once), control; of a fault: kill, stop, drain …
    call: str  # drawn by the caller, never twice
    session: str  # empty outside of one
    n: int  # which call of its session this is, from 1
    value: int  # ok, run: the session's count after this call; refused: how many replies
    who: str  # the pid that wrote it
    detail: str  # fail, info: the error's type, and its text; fault: to whom


class History:
    """A file of this process alone. Whoever opens it twice has two."""

    def __init__(self, directory: Path, label: str) -> None:
        self._who = str(os.getpid())
        path = directory / f"{label}-{self._who}{SUFFIX}"
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def write(
        self,
        event: str,
        kind: str,
        call: str = "",
        session: str = "",
        n: int = 0,
        value: int = 0,
        detail: str = "",
    ) -> None:
        flat = " ".join(detail.split())  # a traceback would be several lines
        line = f"{time.monotonic():.6f}\t{event}\t{kind}\t{call}\t{session}\t{n}\t{value}\t{self._who}\t{flat}\n"
        os.write(self._descriptor, line.encode())

    def close(self) -> None:
        os.close(self._descriptor)


def read(directory: Path) -> list[Record]:
    """All records of all processes, oldest first."""
    records = []
    for path in sorted(directory.glob(f"*{SUFFIX}")):
        for line in path.read_text("utf-8").splitlines():
            when, event, kind, call, session, n, value, who, detail = line.split("\t")
            records.append(Record(float(when), event, kind, call, session, int(n), int(value), who, detail))
    records.sort(key=lambda record: record.time)
    return records


@dataclass
class Verdict:
    """What `check` found. The lists hold a sentence of evidence for each finding."""

    calls: int = 0
    ok: int = 0
    unknown: dict[str, int] = field(default_factory=dict)  # by the error's type
    failed: dict[str, int] = field(default_factory=dict)  # by the error's type
    unexpected: list[str] = field(default_factory=list)  # failures that no fault explains
    lost: list[str] = field(default_factory=list)  # asked and never answered, or answered and never run
    duplicated: list[str] = field(default_factory=list)  # answered twice
    run_twice: list[str] = field(default_factory=list)  # an at-most-once call; or any call, by one and the same process
    stale: list[str] = field(default_factory=list)  # a session forgot a call that it had answered
    out_of_order: list[str] = field(default_factory=list)  # a session's calls
    counted_twice: list[str] = field(default_factory=list)  # a session remembers a call twice: allowed at least once
    run_again: int = 0  # calls that ran in more than one process, as at least once allows
    sessions: int = 0
    moved: int = 0  # sessions that ran in more than one process
    faults: dict[str, int] = field(default_factory=dict)  # by kind
    seconds: float = 0.0  # from the first call to the last outcome
    longest_silence_s: float = 0.0  # between two calls that came back with a value
    median_ms: float = 0.0
    p99_ms: float = 0.0
    longest_ms: float = 0.0

    @property
    def bad(self) -> int:
        """How many findings no promise allows."""
        broken = (self.unexpected, self.lost, self.duplicated, self.run_twice, self.stale, self.out_of_order)
        return sum(map(len, broken))

    def to_dict(self) -> dict[str, Any]:
        counted = {name: len(value) if isinstance(value, list) else value for name, value in vars(self).items()}
        evidence = {name: value[:20] for name, value in vars(self).items() if isinstance(value, list) and value}
        return {**counted, "bad": self.bad, "evidence": evidence}


def check(records: Iterable[Record], allowed: frozenset[str] = frozenset()) -> Verdict:
    """Compare what callers saw with what workers did. `records`: oldest first. `allowed`: types of errors that the faults of this run
    explain and the design announces (F10: the states of a worker that died together with its broker)."""
    verdict = Verdict()
    asked: dict[str, Record] = {}
    outcomes: dict[str, Record] = {}
    runs: defaultdict[str, list[Record]] = defaultdict(list)
    faults: defaultdict[str, list[float]] = defaultdict(list)  # when, by kind
    for record in records:
        if record.event == "invoke":
            asked[record.call] = record
        elif record.event == "run":
            runs[record.call].append(record)
        elif record.event == "fault":
            faults[record.kind].append(record.time)
        elif record.event == "refused":
            if record.value:
                verdict.duplicated.append(f"{record.value} replies reached process {record.who} a second time")
        elif record.event not in OUTCOMES:
            continue  # a note of the driver's, for people
        elif record.call in outcomes:
            verdict.duplicated.append(
                f"{_name(record)} was answered {outcomes[record.call].event}, then {record.event}"
            )
        else:
            outcomes[record.call] = record
    _count(verdict, asked, outcomes, allowed)
    _judge_calls(verdict, asked, outcomes, runs)
    verdict.faults = {kind: len(times) for kind, times in faults.items()}
    _judge_sessions(verdict, asked, outcomes, runs, faults)
    return verdict


def _name(record: Record) -> str:
    inside = f", number {record.n} of session {record.session}," if record.session else ""
    return f"{record.kind} call {record.call}{inside}"


def _count(verdict: Verdict, asked: dict[str, Record], outcomes: dict[str, Record], allowed: frozenset[str]) -> None:
    took, came = [], []
    unknown: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    for call, outcome in outcomes.items():
        error = outcome.detail.partition(":")[0]
        if outcome.event == "info":
            unknown[error] += 1
        elif outcome.event == "fail":
            failed[error] += 1
            if error not in allowed:
                verdict.unexpected.append(f"{_name(outcome)} failed at {outcome.time:.3f}: {outcome.detail}")
        else:
            verdict.ok += 1
            if outcome.kind != "control" and call in asked:
                took.append(outcome.time - asked[call].time)
                came.append(outcome.time)
    verdict.calls = len(asked)
    verdict.unknown, verdict.failed = dict(unknown), dict(failed)
    if took:
        began = min(record.time for record in asked.values())
        took.sort()
        verdict.median_ms = statistics.median(took) * 1e3
        verdict.p99_ms = took[int(len(took) * 0.99)] * 1e3
        verdict.longest_ms = took[-1] * 1e3
        verdict.seconds = came[-1] - began
        verdict.longest_silence_s = max(later - earlier for earlier, later in zip([began, *came], came, strict=False))


def _judge_calls(
    verdict: Verdict, asked: dict[str, Record], outcomes: dict[str, Record], runs: dict[str, list[Record]]
) -> None:
    for call, record in asked.items():
        outcome = outcomes.get(call)
        if outcome is None:
            verdict.lost.append(f"{_name(record)} was asked at {record.time:.3f} and never answered")
        elif outcome.event == "ok" and record.kind != "control" and call not in runs:
            verdict.lost.append(f"{_name(record)} was answered at {outcome.time:.3f} and run by nobody")
    for starts in runs.values():
        by = Counter(start.who for start in starts)
        verdict.run_again += len(by) > 1
        if len(starts) == 1:
            continue
        again = [who for who, times in by.items() if times > 1]
        if again or starts[0].kind == "once":
            told = ", ".join(f"{start.time:.3f} in {start.who}" for start in starts)
            verdict.run_twice.append(f"{_name(starts[0])} ran at {told}")


def _judge_sessions(
    verdict: Verdict,
    asked: dict[str, Record],
    outcomes: dict[str, Record],
    runs: dict[str, list[Record]],
    faults: dict[str, list[float]],
) -> None:
    calls: defaultdict[str, list[Record]] = defaultdict(list)
    for record in asked.values():
        if record.kind == "session":
            calls[record.session].append(record)
    verdict.sessions = len(calls)
    for session, sent in calls.items():
        sent.sort(key=lambda record: record.n)
        _judge_values(verdict, [outcomes.get(record.call) for record in sent])
        starts = sorted((start for record in sent for start in runs.get(record.call, ())), key=lambda start: start.time)
        verdict.moved += len({start.who for start in starts}) > 1
        _judge_order(verdict, session, starts, faults)


def _judge_values(verdict: Verdict, outcomes: list[Record | None]) -> None:
    """Each call counts one up. Behind a call that has no value nobody can say what the count should be."""
    for outcome in outcomes:
        if outcome is None or outcome.event != "ok":
            return
        if outcome.value < outcome.n:
            verdict.stale.append(f"{_name(outcome)} was answered {outcome.value} at {outcome.time:.3f}")
            return  # what follows is wrong by the same mistake
        if outcome.value > outcome.n:
            verdict.counted_twice.append(f"{_name(outcome)} was answered {outcome.value} at {outcome.time:.3f}")
            return


def _judge_order(verdict: Verdict, session: str, starts: list[Record], faults: dict[str, list[float]]) -> None:
    """First runs come in the order sent. After a death another process may repeat calls from an earlier one on; the same process
    never goes back, but for a call whose reply may have died twice: with the worker that ran it, and with the broker that had it (F10)."""
    twice = (faults.get("broker", []), [*faults.get("kill", []), *faults.get("stop", [])])
    highest = 0
    seen: dict[int, Record] = {}
    last: dict[str, int] = {}
    for start in starts:
        before = last.get(start.who, 0)
        first = seen.get(start.n)
        forgotten = (
            first is not None
            and first.who != start.who
            and all(any(first.time < when < start.time for when in deaths) for deaths in twice)
        )
        if start.n < before and not forgotten:
            verdict.out_of_order.append(
                f"session {session}: process {start.who} ran number {start.n} at {start.time:.3f}, after number {before}"
            )
        elif start.n not in seen and start.n < highest:
            verdict.out_of_order.append(
                f"session {session}: number {start.n} first ran at {start.time:.3f}, after number {highest}"
            )
        seen.setdefault(start.n, start)
        last[start.who] = start.n
        highest = max(highest, start.n)
