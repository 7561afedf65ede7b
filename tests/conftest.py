"""What every test stands on: no settings from outside, and nothing left running afterwards.

A test ends the processes it started. `nothing_left_running` asks the operating system whether that is so when the
last test is over, because a worker that outlives its broker is exactly what this project promises not to leave.
"""

from __future__ import annotations

import os
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import psutil
import pytest

MARK = "FORGE_TEST_RUN"
"""Set in this process's environment, so that every process started from here carries it, orphans included."""

PROGRAMS = ("forge_broker", "forge_worker", "forge_cli")

EXIT_GRACE_S = 10.0
"""A broker told to end needs a moment: its workers are given theirs to finish."""

for name in [name for name in os.environ if name.startswith("FORGE_")]:
    del os.environ[name]
os.environ[MARK] = uuid.uuid4().hex  # of tests that are run side by side, each process has its own

# A shell without job control starts what it sends to the background with Ctrl-C ignored, and what is ignored is inherited: a command
# under test would not hear the signal that its test sends. A handler is not inherited.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A deadline measures the machine, and this suite runs where two cores are shared with worker processes.
# Derandomised: a run of the suite proves the same every time; who wants to search on says `--hypothesis-profile=search`.
hypothesis.settings.register_profile("forge", deadline=None, derandomize=True)
hypothesis.settings.register_profile("search", deadline=None)
hypothesis.settings.load_profile("forge")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if Path("/dev/nvidia0").exists():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU on this machine"))


@pytest.fixture(scope="session", autouse=True)
def nothing_left_running() -> Iterator[None]:
    """Fails the run, naming them, if processes of ours are alive when all tests are over."""
    yield
    _, there = psutil.wait_procs(forge_processes(), timeout=EXIT_GRACE_S)
    alive = [process for process in there if not has_ended(process)]
    if not alive:
        return
    told = "\n".join(f"  pid {process.pid}, parent {parent_of(process)}: {line_of(process)}" for process in alive)
    for process in alive:
        process.kill()
    pytest.fail(f"{len(alive)} processes outlived the tests that started them (killed now):\n{told}", pytrace=False)


def forge_processes() -> list[psutil.Process]:
    """Brokers, workers and commands started by this test run: its descendants, and orphans that carry its mark."""
    run = os.environ[MARK]
    descendants = psutil.Process().children(recursive=True)
    ours = {process.pid: process for process in descendants}
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(MARK) == run:
                ours[process.pid] = process
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue  # gone while we looked, or another user's and so not started from here
    return [process for process in ours.values() if runs_forge(process)]


def runs_forge(process: psutil.Process) -> bool:
    try:
        arguments = process.cmdline()
    except psutil.NoSuchProcess:
        return False
    # Not the interpreter's own path: the checkout itself may be called forge_broker.
    return any(
        Path(argument).name == "forge" or any(program in argument for program in PROGRAMS) for argument in arguments[1:]
    )


def has_ended(process: psutil.Process) -> bool:
    """Also one whose parent has not taken note: an orphan's is init, which is in no hurry on a busy machine."""
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def line_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return "(gone)"


def parent_of(process: psutil.Process) -> str:
    try:
        return str(process.ppid())
    except psutil.NoSuchProcess:
        return "(gone)"
