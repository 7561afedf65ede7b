"""What the kernel tells of processes (F1)."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from collections.abc import Iterator

import pytest

from forge_broker.core.actions import Watch
from forge_broker.shell.processes import Watches, host_id, pid_namespace, start_time

pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="pidfds are Linux's")


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


def watch_of(process: subprocess.Popen[bytes]) -> Watch:
    return Watch("w-1", host_id(), process.pid, pid_namespace(), start_time(process.pid))


def test_a_watched_process_that_is_killed_is_told_at_once(child: subprocess.Popen[bytes]) -> None:
    """F1: dead is what the kernel says."""
    watches = Watches()
    descriptor = watches.open(watch_of(child))
    assert descriptor is not None
    assert select.select([descriptor], [], [], 0)[0] == []
    child.kill()
    assert select.select([descriptor], [], [], 10)[0] == [descriptor]
    assert watches.ended(descriptor) == "w-1"
    assert descriptor not in watches


def test_a_pid_that_was_given_to_another_process_is_not_watched(child: subprocess.Popen[bytes]) -> None:
    """F1: the start time tells the two apart."""
    watch = watch_of(child)
    assert Watches().open(watch._replace(started=watch.started - 1)) is None


@pytest.mark.parametrize("change", [{"host": "another machine"}, {"pid_namespace": 1}])
def test_a_process_of_another_host_or_namespace_is_not_watched(
    child: subprocess.Popen[bytes], change: dict[str, object]
) -> None:
    """F1."""
    assert Watches().open(watch_of(child)._replace(**change)) is None  # type: ignore[arg-type]


def test_a_process_that_is_gone_is_not_watched(child: subprocess.Popen[bytes]) -> None:
    watch = watch_of(child)
    child.kill()
    child.wait()
    assert Watches().open(watch) is None
