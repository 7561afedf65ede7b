"""`forge worker`: a child after another, for as long as it is wanted (F7)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from forge_client.identity import started_ticks
from forge_contract.errors import ConfigError
from forge_worker.supervisor import supervise
from tests.worker.fake_broker import BOUND_S, FakeBroker, goodbye, start


@contextmanager
def supervisor(address: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "forge_worker", "--broker", address, *arguments], stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    try:
        yield process
    finally:
        process.kill()
        process.wait(timeout=10)
        process.stderr.close()


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[FakeBroker]:
    with FakeBroker(f"ipc://{tmp_path}/b.sock") as broker:
        yield broker


def hellos(broker: FakeBroker, count: int) -> None:
    broker.until(lambda: len(broker.hellos) >= count, f"hello number {count}")


def test_a_child_that_dies_is_replaced_by_a_clean_one(broker: FakeBroker) -> None:
    """F7: and why it died is said."""
    with supervisor(broker.address, "--label", "zone=a") as process:
        start(broker, "TearsDown", "die", args=("unused",))
        broker.call(0, (1, ()))
        hellos(broker, 2)
        first, second = broker.hellos
        assert first["pid"] != second["pid"]
        assert second["holds"] is None
        assert second["labels"] == {"zone": "a"}
        assert process.stderr is not None
        assert b"ended (exit code 7)" in process.stderr.readline()
        process.terminate()
        assert process.wait(timeout=BOUND_S) == 0


def test_a_child_that_is_given_back_is_replaced(broker: FakeBroker) -> None:
    """F7: hand-started capacity does not melt away."""
    with supervisor(broker.address) as process:
        start(broker, "Echo", "echo")
        broker.stop()
        hellos(broker, 2)
        start(broker, "Echo", "echo")
        process.terminate()
        assert process.wait(timeout=BOUND_S) == 0


def test_a_signal_reaches_the_child_which_says_goodbye(broker: FakeBroker) -> None:
    """F9"""
    with supervisor(broker.address) as process:
        start(broker, "Echo", "echo")
        process.send_signal(signal.SIGINT)
        assert goodbye(broker, process) == "terminated"


def test_a_second_signal_ends_the_child_now(broker: FakeBroker) -> None:
    """F9"""
    with supervisor(broker.address) as process:
        start(broker, "Echo", "block_the_loop")
        broker.call(0, (1, (30.0,)))
        broker.until(lambda: any(beat["oldest_s"] > 0.0 for beat in broker.beats), "running call")
        process.terminate()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.3)
        process.terminate()
        assert process.wait(timeout=BOUND_S) == 0


def test_the_child_leaves_when_its_supervisor_is_killed(broker: FakeBroker) -> None:
    """F7"""
    with supervisor(broker.address) as process:
        start(broker, "Echo", "echo")
        process.kill()
        reason = broker.expect(7)[0][1]
        assert reason == "its supervisor is gone"
        # Not our child, so we cannot wait for it; a process that is gone has no start time any more.
        child = broker.hellos[0]
        broker.until(lambda: started_ticks(child["pid"]) != child["started"], "end of the child")


def test_a_gpu_that_is_not_there_is_refused_with_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGE_GPUS", "2")
    with pytest.raises(ConfigError, match=r"no GPU 7 on this machine; it has 0, 1"):
        supervise("ipc:///nowhere", ("7",), {})


def test_wrong_arguments_are_a_line_and_exit_2() -> None:
    for arguments in (["--gpu", "7"], ["--label", "no-equals-sign"]):
        done = subprocess.run(
            [sys.executable, "-m", "forge_worker", "--broker", "ipc:///nowhere", *arguments],
            env=os.environ | {"FORGE_GPUS": "none"},
            capture_output=True,
            check=False,
            timeout=BOUND_S,
        )
        assert done.returncode == 2
        assert b"Traceback" not in done.stderr
        assert arguments[1].encode() in done.stderr


def test_a_broker_that_refuses_ends_the_supervisor(tmp_path: Path) -> None:
    """Exit 69: there is nothing to keep a worker ready for."""
    broker = FakeBroker(f"ipc://{tmp_path}/b.sock", refuse=["VersionMismatch", {"ours": 2, "theirs": 1}])
    with broker, supervisor(broker.address) as process:
        hellos(broker, 1)
        assert process.wait(timeout=BOUND_S) == 69
        assert process.stderr is not None
        lines = process.stderr.read().decode().splitlines()
        assert len(lines) == 1
        assert "protocol 2" in lines[0]


def test_a_broker_that_wants_no_worker_any_more_ends_the_supervisor(broker: FakeBroker) -> None:
    """F9: with 0, and without another child that would wait for a broker that is gone."""
    with supervisor(broker.address) as process:
        hellos(broker, 1)
        broker.stop(replace=False)
        broker.until(lambda: process.poll() is not None, "end of the supervisor")
        assert process.returncode == 0
        assert len(broker.hellos) == 1
        assert process.stderr is not None
        assert process.stderr.read() == b""
