"""The broker a program starts for itself: it is started anew when it dies, and not when it was asked to end (A1, F10)."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from forge_client import StartFailed
from forge_client.embedded import (
    REVIVALS_AT_MOST,
    REVIVALS_WITHIN_S,
    EmbeddedBroker,
    embedded_broker,
    end_embedded,
    may_revive,
    revive,
)


@pytest.fixture
def broker() -> Iterator[EmbeddedBroker]:
    end_embedded()  # another test's
    yield embedded_broker(os.environ)
    end_embedded()


def kill(broker: EmbeddedBroker) -> int:
    pid = broker.process.pid
    broker.process.kill()
    broker.process.wait(5)
    return pid


def command(pid: int) -> Any:
    with open(f"/proc/{pid}/cmdline", "rb") as line:
        return json.loads(line.read().split(b"\0")[-2])


def test_one_that_was_killed_is_started_anew_at_its_address_as_it_was(
    broker: EmbeddedBroker, caplog: pytest.LogCaptureFixture
) -> None:
    """F10"""
    address, config = broker.address, command(broker.process.pid)
    killed = kill(broker)
    assert not broker.running
    revive(broker)
    revive(broker)  # of another loop, a moment later: it runs
    assert broker.process.poll() is None
    assert broker.process.pid != killed
    assert (broker.address, command(broker.process.pid)) == (address, config)
    assert [record.getMessage() for record in caplog.records] == [
        "the embedded broker ended (signal SIGKILL) and was started anew"
    ]


def test_two_loops_that_see_it_die_start_one(broker: EmbeddedBroker, caplog: pytest.LogCaptureFixture) -> None:
    """F10, A1"""
    kill(broker)
    threads = [threading.Thread(target=revive, args=(broker,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert broker.running
    assert len(caplog.records) == 1


def test_one_that_was_asked_to_end_stays_ended_and_the_next_use_starts_another(broker: EmbeddedBroker) -> None:
    """A1"""
    broker.process.send_signal(signal.SIGTERM)
    assert broker.process.wait(5) == 0
    with pytest.raises(StartFailed, match="asked to end"):
        revive(broker)
    other = embedded_broker(os.environ)
    assert other is not broker
    assert other.running
    with pytest.raises(StartFailed, match="asked to end"):
        revive(broker)


def test_one_that_keeps_dying_is_given_up(broker: EmbeddedBroker) -> None:
    """F10"""
    kill(broker)
    broker.revived += [time.monotonic()] * REVIVALS_AT_MOST
    with pytest.raises(StartFailed, match="died 4 times within 60 s, now of signal SIGKILL"):
        revive(broker)


def test_three_starts_a_minute_are_allowed() -> None:
    """F10"""
    starts: list[float] = []
    for now in (0.0, 10.0, 20.0):
        assert may_revive(starts, now)
        starts.append(now)
    assert not may_revive(starts, 30.0)
    assert not may_revive(starts, REVIVALS_WITHIN_S - 0.1)
    assert may_revive(starts, REVIVALS_WITHIN_S)
    assert starts == [10.0, 20.0]


def test_it_gets_huge_pages_for_large_frames(broker: EmbeddedBroker) -> None:
    environ = Path(f"/proc/{broker.process.pid}/environ").read_bytes().split(b"\0")
    assert b"GLIBC_TUNABLES=" + os.environ.get("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1").encode() in environ
