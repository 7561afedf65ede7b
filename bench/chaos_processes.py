"""The processes that `chaos` and `failover` start and break: a broker that comes back at the same addresses, and its workers.
`against_peers` marks and ends its own in the same way.

Workers are found by a mark in their environment, which they inherit from the broker that launched them, and from nobody else. So they
are found while no broker lives that could be asked, and those of a broker that was killed are found too. Linux only: /proc.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Final

from bench.ports import free_port
from forge_contract.segments import DIRECTORY

ROOT: Final = Path(__file__).resolve().parent.parent
MARK: Final = "FORGE_CHAOS"
END_S: Final = 20.0  # what is stopped in order has so long to end


class Broker:
    """`python -m forge_cli broker start`, at an ipc address and a TCP port that stay the same. `settings`: FORGE_* variables."""

    def __init__(self, directory: Path, **settings: object) -> None:
        self.ipc = f"ipc://{directory}/broker.sock"
        self.port = free_port()
        self.mark = uuid.uuid4().hex
        self.starts = 0
        self._log = directory / "broker.log"
        self._command = [sys.executable, "-m", "forge_cli", "broker", "start", "--gpus", "none"]
        self._command += ["--bind", self.ipc, "--bind", f"tcp://127.0.0.1:{self.port}"]
        self._command += ["--log-dir", str(directory / "logs")]
        self._environ = environment(self.mark)
        self._environ |= {f"FORGE_{name.upper()}": str(value) for name, value in settings.items()}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        self.starts += 1
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                env=self._environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def check(self) -> None:
        """Raises RuntimeError when it has ended without being told to."""
        assert self._process is not None
        if self._process.poll() is not None:
            raise RuntimeError(f"the broker ended by itself, with {self._process.returncode}")

    def kill(self) -> None:
        """SIGKILL; returns when it is gone. Raises as `check` does."""
        self.check()
        self._kill()

    def _kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def end(self) -> int | None:
        """SIGTERM; its exit code, None when it did not end and was killed."""
        if self._process is None:
            return None
        self._process.terminate()
        try:
            return self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._kill()
            return None

    def last_words(self, lines: int = 15) -> str:
        return "\n".join(self._log.read_text("utf-8", errors="replace").splitlines()[-lines:])


def environment(mark: str) -> dict[str, str]:
    """Of everything started here. The path is for workers started by hand over TCP, who obey no client's path (W6)."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("FORGE_")}
    kept = {name: value for name, value in os.environ.items() if name == "FORGE_TEST_RUN"}
    path = os.pathsep.join(map(str, (ROOT, ROOT / "client", ROOT / "cli")))
    return {**inherited, **kept, MARK: mark, "PYTHONPATH": path}


def hand_started(address: str, mark: str, directory: Path) -> subprocess.Popen[bytes]:
    """A supervisor with one worker, as somebody would start it. Its output goes into the directory."""
    command = [sys.executable, "-m", "forge_worker", "--broker", address]
    with (directory / "hand-started.log").open("ab") as log:
        return subprocess.Popen(command, env=environment(mark), stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def marked(mark: str) -> dict[int, str]:
    """Pid to command line of every living process that carries the mark."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (entry / "environ").read_bytes() and _state(entry) != "Z":
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue  # gone while we looked, or another user's
    return found


def workers(mark: str) -> list[int]:
    """Pids of the workers, not of supervisors; those that are stopped too."""
    return sorted(pid for pid, command in marked(mark).items() if "forge_worker" in command and "--child" in command)


def stopped(pid: int) -> bool:
    try:
        return _state(Path(f"/proc/{pid}")) == "T"
    except OSError:
        return False


def _state(entry: Path) -> str:
    return (entry / "stat").read_text().rpartition(")")[2].split()[0]


def resident_mib(pid: int) -> float:
    """Raises FileNotFoundError when it is gone."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def files_of(segments: str) -> list[str]:
    """What a broker and its peers have in /dev/shm. `segments`: how the names of all of it begin, nothing where there is none."""
    return sorted(map(str, Path(DIRECTORY).glob(f"{segments}*"))) if segments else []


def send(pid: int, number: signal.Signals) -> bool:
    """False when it was gone already."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
        return True
    return False


def end_all(mark: str, grace_s: float) -> list[str]:
    """Wait for all marked processes to end, then kill those that did not; their command lines."""
    until = time.monotonic() + grace_s
    while marked(mark) and time.monotonic() < until:
        time.sleep(0.05)  # most are no children of ours, and their pidfds would be opened anew in every round as well
    told = []
    for pid, command in marked(mark).items():
        told.append(f"{pid}{' (stopped)' if stopped(pid) else ''}: {command}")
        send(pid, signal.SIGKILL)
    return told
