"""The local scaler: a worker is a command line to it (X2). The command is replaced by a small one through the interpreter it runs."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from forge_broker.core.actions import Launch
from forge_broker.core.events import LaunchEnded
from forge_broker.scalers.local import LocalScaler


@pytest.fixture
def children() -> Iterator[threading.Event]:
    """Set whenever a child has ended; waiting for it is waiting for SIGCHLD."""
    ended = threading.Event()
    before = signal.signal(signal.SIGCHLD, lambda number, frame: ended.set())
    yield ended
    signal.signal(signal.SIGCHLD, before)


def interpreter(tmp_path: Path, script: str) -> str:
    """An executable that does what the script says, whatever its arguments."""
    path = tmp_path / "worker"
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


def wait_for_end(scaler: LocalScaler, children: threading.Event) -> LaunchEnded:
    for _ in range(100):
        ended = scaler.reap()
        if ended:
            assert isinstance(ended[0], LaunchEnded)
            return ended[0]
        children.wait(0.1)
        children.clear()
    raise AssertionError("the process has not ended")


def test_output_goes_to_a_file_and_its_last_lines_tell_why_a_process_died(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, children: threading.Event
) -> None:
    monkeypatch.setattr(sys, "executable", interpreter(tmp_path, "echo one; echo two >&2; exit 3"))
    scaler = LocalScaler("ipc:///nowhere", os.environ, tmp_path)
    assert scaler.launch(Launch(7, ("0", "1"), "Gen/0.0")) == []
    ended = wait_for_end(scaler, children)
    assert ended == LaunchEnded(7, "exit code 3", ["one", "two"])
    assert (tmp_path / "Gen-0.0-7.log").read_text() == "one\ntwo\n"
    assert len(scaler) == 0


@pytest.mark.parametrize(
    ("set_before", "has"), [({}, "glibc.malloc.hugetlb=1"), ({"GLIBC_TUNABLES": "of=mine"}, "of=mine")]
)
def test_a_worker_gets_huge_pages_for_large_frames_unless_its_starter_tunes_glibc(
    set_before: dict[str, str], has: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, children: threading.Event
) -> None:
    monkeypatch.setattr(sys, "executable", interpreter(tmp_path, 'echo "$GLIBC_TUNABLES"'))
    environ = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    scaler = LocalScaler("ipc:///nowhere", environ | set_before, tmp_path)
    scaler.launch(Launch(7, (), "Gen/0.0"))
    assert wait_for_end(scaler, children).last_lines == [has]


def test_embedded_output_is_shown_with_the_label_of_its_worker(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    children: threading.Event,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "executable", interpreter(tmp_path, 'echo "launched with $*"; printf "no newline"'))
    scaler = LocalScaler("ipc:///nowhere", os.environ, None)
    scaler.launch(Launch(8, (), "Gen/1.0"))
    ended = wait_for_end(scaler, children)
    scaler.close()
    assert ended.why == "exit code 0"
    shown = capsys.readouterr().err.splitlines()
    command = "-m forge_worker --child --broker ipc:///nowhere --gpu none --launch 8"
    assert shown == [f"[Gen/1.0] launched with {command}", "[Gen/1.0] no newline"]
    assert ended.last_lines == [f"launched with {command}", "no newline"]


def test_a_kill_is_told_as_the_signal_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, children: threading.Event
) -> None:
    monkeypatch.setattr(sys, "executable", interpreter(tmp_path, "exec cat < /dev/zero > /dev/null"))
    scaler = LocalScaler("ipc:///nowhere", os.environ, tmp_path)
    scaler.launch(Launch(9, (), "Gen/0.0"))
    scaler.kill(9)
    assert wait_for_end(scaler, children).why == "signal SIGKILL"


def test_a_process_that_cannot_be_started_is_an_event_and_no_exception(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "missing"))
    scaler = LocalScaler("ipc:///nowhere", os.environ, tmp_path)
    (failed,) = scaler.launch(Launch(10, (), "Gen/0.0"))
    assert isinstance(failed, LaunchEnded)
    assert "could not be started" in failed.why
    assert len(scaler) == 0
