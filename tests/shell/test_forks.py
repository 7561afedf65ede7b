"""Real fork servers behind the local scaler (X2): what is to be forked is started, killed and told of like anything else it launches.

No broker answers at the address: a worker waits ten seconds for one, and the tests are over before.
"""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from forge_broker.core.actions import Launch, Preload
from forge_broker.core.events import LaunchEnded, Preloaded
from forge_broker.scalers.local import LocalScaler

BOUND_S = 15.0
NOWHERE = "ipc:///nowhere/broker.sock"


class Told:
    """A scaler, and what it has told so far."""

    def __init__(self, log_dir: Path) -> None:
        self.scaler = LocalScaler(NOWHERE, os.environ, log_dir)
        self.events: list[LaunchEnded | Preloaded] = []

    def until(self, holds: Callable[[], Any]) -> None:
        while not holds():
            assert select.select([self.scaler.fileno()], [], [], BOUND_S)[0], f"nothing after {self.events}"
            self.events += self.scaler.attend()

    def launch(self, number: int, ref: str = "tests.public.actors:Echo") -> None:
        source: dict[str, Any] = {"name": "gen", "class_name": "Gen", "target": {"ref": ref}, "path": [], "cwd": None}
        preload = Preload(3, "Gen/preload", {**source, "trusted": True, "gpus": []}, on_gpus=False)
        self.events += self.scaler.launch(Launch(number, (), f"Gen/{number}.0", preload))


@pytest.fixture
def told(tmp_path: Path) -> Iterator[Told]:
    told = Told(tmp_path)
    yield told
    told.scaler.kill_all()
    told.scaler.close()
    assert not psutil.Process().children(recursive=True), "they end with the broker"


def server() -> psutil.Process:
    (process,) = psutil.Process().children()
    return process


def test_launches_wait_for_the_import_and_one_that_is_killed_meanwhile_never_starts(told: Told) -> None:
    for number in (7, 8, 9):
        told.launch(number)
    assert told.scaler.kill(8) == [LaunchEnded(8, "not started yet, and not wanted any more", [])]
    told.until(lambda: told.events == [Preloaded(3, "")])
    told.until(lambda: len(server().children()) == 2)
    assert told.scaler.kill(7) == []
    told.until(lambda: len(told.events) == 2)
    assert told.events[1] == LaunchEnded(7, "signal SIGKILL", [])
    (left,) = server().children()
    told.launch(10)
    told.until(lambda: len(server().children()) == 2)
    assert left in server().children()


def test_the_children_of_a_server_that_died_are_killed_and_their_end_is_told(told: Told) -> None:
    told.launch(7)
    told.launch(8)
    told.until(lambda: told.events and len(server().children()) == 2)
    told.launch(9)
    told.until(lambda: len(server().children()) == 3)
    children = server().children()
    told.scaler.attend()
    server().send_signal(signal.SIGKILL)
    told.until(lambda: len(told.events) == 2)
    assert isinstance(told.events[1], Preloaded)
    assert told.events[1].why.startswith("its fork server ended")
    assert all(child.is_running() for child in children)
    assert told.scaler.kill(8) == []
    told.until(lambda: len(told.events) == 3)
    assert isinstance(told.events[2], LaunchEnded)
    assert (told.events[2].launch, "not known" in told.events[2].why) == (8, True)


def test_what_cannot_be_forked_is_started_the_ordinary_way(told: Told, tmp_path: Path) -> None:
    told.launch(7, "no_such_module:Gen")
    told.until(lambda: bool(told.events))
    (declined,) = told.events
    assert isinstance(declined, Preloaded)
    assert "no_such_module" in declined.why
    assert len(told.scaler) == 1
    assert "ModuleNotFoundError" in (tmp_path / "Gen-preload-3.log").read_text()
    assert (tmp_path / "Gen-7.0-7.log").exists()
