"""`bench/against_peers.py`: its table, JSON and picture say what was measured, and what it starts is gone afterwards.

With a peer that needs nothing installed (`fake_peer.py`), started as every peer is. The figures themselves are no test's business.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import against_peers
from bench.against_peers import Failed, measure, one_round
from bench.peers import report, venvs
from bench.peers.load import closed_loop, quantile
from bench.peers.roster import PEERS, ROOT, Peer

FAKE = Peer("a fake", "tests.bench.fake_peer", (), "nothing")
LOOP_S = 0.02


def fake_round(bound_s: float = 50.0) -> dict[str, Any]:
    return one_round(Path(sys.executable), ("-m", FAKE.module), LOOP_S, bound_s)


def installed(peer: Peer, directory: Path) -> Path:
    """Makes what `venvs.make` takes for an environment in which all is there: this interpreter's."""
    folder = directory / peer.short
    python = venvs.python_of(folder)
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    (folder / venvs.INSTALLED).write_text(venvs.wanted(peer), encoding="utf-8")
    return folder


def told(**median_of: float) -> dict[str, Any]:
    """Figures of one round, with this value for every key of the figures named."""
    keys = ("calls_per_s", "median_ms", "p99_ms", "items_per_s", "items_per_batch", "gb_per_s")
    figures: dict[str, Any] = {column.figure: None for column in report.COLUMNS}
    return figures | {figure: dict.fromkeys(keys, value) for figure, value in median_of.items()}


def test_a_round_gives_every_figure_with_versions_and_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEER_BEHAVIOUR", "well")
    given = fake_round()
    assert set(given["versions"]) == {"numpy"}
    assert given["loop"] in ("asyncio", "uvloop")
    figures = given["figures"]
    assert set(figures) == {column.figure for column in report.COLUMNS}
    assert all(figures[column.figure][column.key] > 0 for column in report.COLUMNS)
    assert figures["noop_512"]["calls"] >= 512
    assert figures["batch"]["items_per_batch"] == pytest.approx(16)


def test_a_kind_that_fails_costs_the_others_nothing_and_one_that_there_is_not_is_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PEER_BEHAVIOUR", "bad tensor")
    figures = fake_round()["figures"]
    assert "is not the one that was sent" in figures["tensor"]["error"]
    assert figures["noop_1"]["calls_per_s"] > 0
    assert figures["batch"]["items_per_s"] > 0
    monkeypatch.setenv("PEER_BEHAVIOUR", "no batches")
    figures = fake_round()["figures"]
    assert figures["batch"] is None
    assert figures["tensor"]["gb_per_s"] > 0


def ends(pid: int, bound_s: float = 10.0) -> bool:
    """Whether this process, which was killed a moment ago, ends: the kernel says so when it has."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], bound_s)[0])
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("behaviour", ["well", "hangs"])
def test_what_a_peer_leaves_behind_is_ended_with_its_round(
    behaviour: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(against_peers, "END_S", 0.1)  # nobody here ends by being told
    monkeypatch.setenv("PEER_BEHAVIOUR", behaviour)
    monkeypatch.setenv("PEER_LEAVES", str(tmp_path / "pid"))
    if behaviour == "hangs":
        with pytest.raises(Failed, match=r"not done within 4 s"):
            fake_round(bound_s=4.0)
    else:
        fake_round()
    assert ends(int((tmp_path / "pid").read_text()))


def test_a_peer_that_dies_says_what_it_said_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEER_BEHAVIOUR", "dies")
    with pytest.raises(Failed, match="ERROR: no such device"):
        fake_round()


def test_a_comparison_keeps_a_row_for_everybody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that works, one that dies, and one that pip cannot install, in the order of the roster."""
    monkeypatch.setenv("PEER_BEHAVIOUR", "well")
    monkeypatch.setattr(venvs, "_run", refuse)
    dying = Peer("dying", "tests.bench.no_such_module", (), "nothing")
    missing = Peer("missing", "tests.bench.missing", ("no-such-package",), "nothing")
    for peer in (FAKE, dying):
        installed(peer, tmp_path)
    others: list[float] = []
    results = measure([dying, FAKE, missing], tmp_path, runs=2, seconds=LOOP_S, others=others)
    assert len(others) == 4  # what is not installed has no turns
    assert all(0.0 <= share <= 1.0 for share in others)
    assert list(results) == ["dying", "a fake", "missing"]
    assert len(results["a fake"]["rounds"]) == 2
    assert "No module named tests.bench.no_such_module" in results["dying"]["error"]
    assert len(results["dying"]["failures"]) == 2
    assert results["missing"]["error"] == "not installed: ERROR: No matching distribution found for no-such-package"
    rows = report.table(results).splitlines()
    assert [row.split(" | ")[0] for row in rows[2:]] == ["| dying", "| a fake", "| missing"]
    assert json.loads(json.dumps(results)) == results


def refuse(command: list[str], bound_s: float) -> None:
    raise venvs.NotInstalled("ERROR: No matching distribution found for no-such-package")


def test_an_environment_is_made_anew_when_the_roster_asks_for_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = installed(FAKE, tmp_path)
    assert not venvs.make(FAKE, folder)
    monkeypatch.setattr(venvs, "_run", refuse)
    with pytest.raises(venvs.NotInstalled):
        venvs.make(Peer(FAKE.name, FAKE.module, ("something-new",), ""), folder)
    assert not folder.exists()


@pytest.mark.parametrize(
    "peer", [peer for peer in PEERS if peer.module != "bench.peers.forge"], ids=lambda peer: peer.short
)
def test_a_peers_file_needs_nothing_of_ours(peer: Peer) -> None:
    """In its environment there is what the roster names, and neither our packages nor what they need."""
    program = f"""
import importlib, sys
from unittest.mock import MagicMock
for name in ("ray", "ray.serve", "mosec", "litserve", "ipyparallel", "httptools", "fastapi"):
    sys.modules[name] = MagicMock()
for name in ("forge_contract", "forge_client", "forge_broker", "forge_worker", "msgpack", "click", "structlog"):
    sys.modules[name] = None
importlib.import_module({peer.module!r})
"""
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_pips_last_error_is_what_is_told() -> None:
    said = "WARNING: slow\nERROR: Could not find a version\nERROR: No matching distribution found for x\n[notice] new pip\n"
    assert venvs.last_line(said) == "ERROR: No matching distribution found for x"
    assert venvs.last_line("Killed\n") == "Killed"
    assert venvs.last_line("") == "it said nothing"


def test_cells_are_medians_with_least_and_most_or_say_why_not() -> None:
    rounds = [told(noop_1=value, noop_64=value) for value in (3.0, 1000.0, 2.0)]
    rounds[1]["tensor"] = {"error": "MemoryError: none | left"}
    cells = dict(zip([column.title for column in report.COLUMNS], report.cells({"rounds": rounds}), strict=True))
    assert cells["1 outstanding: median, ms"] == "3.00 (2.00–1,000.00)"
    assert cells["64: calls/s"] == "3 (2–1,000)"
    assert cells["512: calls/s"] == "none"
    assert cells["16 MiB tensor: GB/s"] == "failed: MemoryError: none | left"
    assert r"none \| left" in report.table({"it": {"rounds": rounds}})
    assert report.cells({"error": "not installed: x"})[0] == "not installed: x"
    assert report.batch_sizes({"it": {"rounds": [told(batch=31.0)]}, "other": {"error": "x"}}) == {"it": 31.0}


def test_the_picture_has_a_bar_for_each_figure_and_words_where_there_is_none(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `bench` is not installed")
    every = dict.fromkeys((column.figure for column in report.COLUMNS), 5.0)
    some = {"fast": [told(**every)], "half": [told(noop_1=9.0)]}
    results: dict[str, dict[str, Any]] = {name: {"rounds": rounds} for name, rounds in some.items()}
    results["not"] = {"error": "x"}
    report.picture(results, tmp_path / "it.png")
    written = (tmp_path / "it.png").read_bytes()
    assert written.startswith(b"\x89PNG")
    assert int.from_bytes(written[16:20], "big") > 1000  # its width
    report.picture({"not": {"error": "x"}}, tmp_path / "empty.png")


async def test_a_closed_loop_counts_the_calls_that_were_answered() -> None:
    asked = []

    async def call(payload: int) -> int:
        asked.append(payload)
        return payload * 2

    rate, took, answers = await closed_loop(call, 7, outstanding=3, seconds=LOOP_S)
    assert len(asked) == len(took) == len(answers) >= 3
    assert set(answers) == {14}
    assert 0 < rate <= len(took) / LOOP_S


def test_a_quantile_is_a_value_that_was_measured() -> None:
    assert quantile([3.0, 1.0, 2.0], 0.99) == 3.0
    assert quantile([float(value) for value in range(1, 101)], 0.99) == 99.0
    assert quantile([5.0], 0.5) == 5.0


def test_the_machine_is_told() -> None:
    about = report.machine()
    assert about["cores"] >= 1
    assert about["memory_gib"] > 0
    assert about["kernel"]


def test_the_roster_names_programs_that_there_are_each_in_a_folder_of_its_own() -> None:
    assert len({peer.short for peer in PEERS}) == len({peer.name for peer in PEERS}) == len(PEERS)
    for peer in PEERS:
        program = ROOT / Path(*peer.module.split(".")).with_suffix(".py")
        assert 'if __name__ == "__main__":' in program.read_text(encoding="utf-8")
