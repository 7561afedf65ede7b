"""`bench/targets.py`: marks are given to medians, what was not measured says so, and the rows run, on small counts, through the same doors.

The figures themselves are no test's business: a loaded machine reaches few of them.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from pathlib import Path
from typing import Any

import pytest

from bench import core_alone, counting_cost, targets, through_the_broker
from bench.chaos_processes import marked
from bench.effort import Effort, Figures, NotHere
from bench.peers.roster import ROOT
from bench.targets import DOES_NOT, HOLDS, NOT_MEASURED, ROWS, Result, Row, Target, lines_of, marks, table, told

LITTLE = Effort(runs=2, seconds=0.05, scale=0.002)


def row(*wanted: Target, **options: Any) -> Row:
    return Row("it", "what it is", "how", lambda effort: {}, wanted, **options)


@pytest.mark.parametrize(
    ("target", "holding", "not_holding", "to_reach"),
    [
        (Target("f", "f", least=150_000), 150_000.0, 149_999.9, "≥ 150,000"),
        (Target("f", "f", most=1.5, digits=1), 1.5, 1.51, "≤ 1.5"),
        (Target("f", "f", below=0.4, digits=2), 0.39, 0.4, "< 0.40"),
    ],
)
def test_a_bound_is_reached_or_not(target: Target, holding: float, not_holding: float, to_reach: str) -> None:
    assert (target.judge(holding), target.judge(not_holding)) == (HOLDS, DOES_NOT)
    assert target.to_reach() == to_reach


def test_a_mark_is_given_to_the_median_and_a_line_shows_least_and_most() -> None:
    wanted = row(Target("rate", "calls/s", least=1000), Target("other", "beside it", digits=1))
    lines = lines_of(Result(wanted, {"rate": [2000.0, 900.0, 1100.0], "other": [5.0]}))
    assert lines == [
        ("what it is", "how", "calls/s", "≥ 1,000", "1,100 (900–2,000)", HOLDS),
        ("", "", "beside it", "", "5.0", ""),
    ]


def test_what_was_not_measured_keeps_its_row_and_counts_for_nothing_else() -> None:
    wanted = row(Target("rate", "calls/s", least=1000), Target("other", "beside it"), Target("third", "3", most=1))
    result = Result(wanted, {}, "not measured here: no such thing")
    assert marks([result]) == {HOLDS: 0, DOES_NOT: 0, NOT_MEASURED: 2}
    assert lines_of(result)[0][-2:] == ("not measured here: no such thing", NOT_MEASURED)
    assert told(result)["error"] == "not measured here: no such thing"
    assert table([result]).count(NOT_MEASURED) == 3


def test_every_row_has_a_name_of_its_own_a_bound_and_how_it_is_measured() -> None:
    assert len({one.name for one in ROWS}) == len(ROWS)
    for one in ROWS:
        assert any(target.to_reach() for target in one.targets), one.name
        assert len({target.figure for target in one.targets}) == len(one.targets)
        for said in (
            "uvloop|asyncio|no sockets",
            r"\d (B|MiB)",
            "replica",
            r"room \d",
        ):  # loop, payload, replicas, credit
            assert re.search(said, one.how), one.name


def test_a_row_that_fails_says_so_in_its_place() -> None:
    unknown = targets.measured(row(Target("f", "f", most=1)), Effort(runs=1))
    assert unknown.why_not.startswith("failed: ValueError: not enough values to unpack")


def test_a_row_that_hangs_is_ended_with_all_that_it_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its broker and workers are found by their mark, while they start."""
    monkeypatch.setattr(targets, "ROW_S", 2.0)
    monkeypatch.setenv("FORGE_GPUS", "none")
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # killed together, they leave their directory
    drawn: list[uuid.UUID] = []
    draw = uuid.uuid4

    def remembered() -> uuid.UUID:
        drawn.append(draw())
        return drawn[-1]

    monkeypatch.setattr(uuid, "uuid4", remembered)
    found = targets.in_a_process("asyncio_512", Effort(seconds=60.0))
    assert found == "failed: no figures within 2.0 s"
    until = time.monotonic() + 10.0
    while marked(drawn[0].hex) and time.monotonic() < until:
        time.sleep(0.05)  # the kernel takes a moment to bury them, and they are no children of ours
    assert marked(drawn[0].hex) == {}


def test_what_is_not_here_is_told_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(through_the_broker, "__file__", str(tmp_path / "through_the_broker.py"))
    with pytest.raises(NotHere, match=r"bench/tensors.py is not in this checkout"):
        through_the_broker.tensors(LITTLE)
    monkeypatch.setattr(through_the_broker, "loop_factory", lambda: None)
    with pytest.raises(NotHere, match="uvloop is not installed"):
        through_the_broker.closed_loop(LITTLE, 1)


def test_a_tiny_run_prints_the_table_writes_the_figures_and_says_by_its_exit_code_whether_all_hold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "deeper" / "figures.json"
    code = targets.main(["--only", "core_cpu", "queued_call", "--runs", "1", "--scale", "0.02", "--json", str(path)])
    out = capsys.readouterr().out
    found = json.loads(path.read_text(encoding="utf-8"))
    assert list(found["rows"]) == ["core_cpu", "queued_call"]
    figures = [one for each in found["rows"].values() for one in each["figures"].values()]
    assert all(
        0 <= one["min"] <= one["median"] <= one["max"] for one in figures
    )  # so few calls may need no new page of memory
    assert found["rows"]["core_cpu"]["figures"]["us"]["median"] > 0
    assert code == int(any(one["mark"] == DOES_NOT for one in figures))
    assert out.count(f"| {HOLDS}") + out.count(f"| {DOES_NOT}") == 2
    assert "are 0.02 of what is written" in out
    assert found["about"]["runs"] == 1


def test_calls_through_the_broker_beside_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a broker, workers and a proxy of its own; all are gone afterwards."""
    monkeypatch.setenv("FORGE_GPUS", "none")
    monkeypatch.setenv("FORGE_BENCH", "")  # set anew by the measurement, and put back after this test
    found = through_the_broker.closed_loop(LITTLE, 8, uvloop=False)
    assert {name: len(values) for name, values in found.items()} == {
        "calls_per_s": 2,
        "of_proxy": 2,
        "proxy_per_s": 2,
        "of_bare_proxy": 2,
        "bare_per_s": 2,
    }
    assert found["of_proxy"][0] == found["calls_per_s"][0] / found["proxy_per_s"][0] > 0
    assert found["of_bare_proxy"][0] == found["calls_per_s"][0] / found["bare_per_s"][0] > 0


@pytest.mark.parametrize(
    "measure",
    [
        core_alone.cost_of_replicas,
        core_alone.million_queued,
        core_alone.idle_sessions,
        core_alone.cpu_per_call,
    ],
    ids=["replicas", "queued", "sessions", "core"],
)
def test_the_core_alone_is_measured_in_every_way(measure: Any) -> None:
    found: Figures = measure(LITTLE)
    assert found
    assert all(value > 0 for name, values in found.items() for value in values if name not in ("bytes", "mb"))


def test_what_counting_costs_is_measured_against_calls_that_are_not_counted() -> None:
    """X3"""
    with counting_cost.uncounted():
        core, client, endpoint, workers = core_alone.serving(1)
        core_alone.rounds(core, client, workers, [client.calls(endpoint, 3)])
    (replica,) = core.broker.state.names["Echo"].replicas.values()
    assert (client.results, replica.stats.total) == (3, 0)
    core_alone.rounds(core, client, workers, [client.calls(endpoint, 2)])
    assert replica.stats.total == replica.stats.latency.total()[0].calls == 2
    found = counting_cost.counting_cost(Effort(runs=1, scale=0.002))
    assert found.keys() == {"packed_us", "packed_counting_us", "lone_us", "lone_counting_us"}


def test_the_table_is_what_make_bench_runs() -> None:
    assert "bench/targets.py --json bench/out/targets.json $(BENCH)" in (ROOT / "Makefile").read_text(encoding="utf-8")
