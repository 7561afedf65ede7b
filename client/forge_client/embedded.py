"""The broker that a program starts for itself when it names none (A1): a process of its own, one for this process.

Its owner's pipe is its stdin: when this process ends, however it ends, the pipe is closed by the kernel, and the
broker stops its workers and exits. So nobody else may hold the pipe: it is closed on exec, and in children of a fork.
The client knows the broker as a command line and as lines on a pipe, never as a module (L1).
"""

from __future__ import annotations

import atexit
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, Final

from forge_client.gpus import find_gpus
from forge_contract.addresses import check_address
from forge_contract.errors import ConfigError, StartFailed, from_wire

START_TIMEOUT_S: Final = 30.0  # an interpreter and its imports, on a machine that is busy with something else
END_TIMEOUT_S: Final = 5.0

_lock = threading.Lock()
_current: EmbeddedBroker | None = None
# What a fork took along from its parent. Destroying it here would touch the parent's processes and sockets.
_left_behind: list[Any] = []


class EmbeddedBroker:
    """A running broker process. `ended_fd` is readable when it has ended."""

    def __init__(self, process: subprocess.Popen[bytes], directory: str, address: str) -> None:
        assert process.stdout is not None
        self.address = address
        self.ended_fd = process.stdout.fileno()
        self.process = process
        self._directory = directory

    def __repr__(self) -> str:
        code = self.process.poll()
        return f"<EmbeddedBroker pid {self.process.pid} {'running' if code is None else f'ended with {code}'}>"

    @property
    def running(self) -> bool:
        # The pipe ends a moment before the process can be waited for; whoever saw that must not be given it again.
        return self.process.poll() is None and not select.select([self.ended_fd], [], [], 0)[0]

    def disown(self) -> None:
        """Close the owner's pipe: the broker stops everything and exits."""
        if self.process.stdin is not None:
            self.process.stdin.close()

    def end(self) -> None:
        """Close the owner's pipe and wait until nothing is left running; blocks for up to `END_TIMEOUT_S` and a bit."""
        self.disown()
        try:
            self.process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.terminate()
            try:
                self.process.wait(1.0)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        _remove(self._directory)


def embedded_broker(environ: Mapping[str, str]) -> EmbeddedBroker:
    """The broker of this process; started when there is none. Blocks meanwhile; any thread may ask.

    Raises the broker's own error, or StartFailed when it ended without a word.
    """
    global _current  # noqa: PLW0603 - one per process, that is what it is
    with _lock:
        if _current is None or not _current.running:
            if _current is not None:
                _current.end()
            _current = _start(environ)
        return _current


def end_embedded(broker: EmbeddedBroker | None = None) -> None:
    """End this process's broker (only if it is `broker`, when that is given). Blocks for up to `END_TIMEOUT_S` and a bit."""
    global _current  # noqa: PLW0603 - see above
    with _lock:
        if _current is None or broker not in (None, _current):
            return
        _current.end()
        _current = None


def _start(environ: Mapping[str, str]) -> EmbeddedBroker:
    import json  # these take long to import; many who import it start no broker
    import tempfile

    directory = tempfile.mkdtemp(prefix="forge-")  # mode 0700: that is what makes the address trusted
    try:
        address = f"ipc://{directory}/broker.sock"
        try:
            check_address(address)
        except ConfigError:
            # A TMPDIR too long for a socket's path.
            _remove(directory)
            directory = tempfile.mkdtemp(prefix="forge-", dir="/tmp")
            address = f"ipc://{directory}/broker.sock"
        config = {
            "bind": [address],
            "embedded": True,
            "gpus": list(find_gpus(environ)),
            "log_dir": os.path.join(directory, "logs"),
        }
        process = subprocess.Popen(
            [sys.executable, "-m", "forge_broker", "--serve", json.dumps(config)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the program, which then ends its broker
        )
    except BaseException:
        _remove(directory)
        raise
    broker = EmbeddedBroker(process, directory, address)
    try:
        first = json.loads(_first_line(broker) or "{}")
        if not isinstance(first, dict) or "addresses" not in first:
            error = first.get("error") if isinstance(first, dict) else None
            if error:
                raise from_wire(error)
            raise StartFailed(service="the embedded broker", why="it ended before it was bound; see its output above")
    except BaseException:
        broker.end()
        raise
    return broker


def _remove(directory: str) -> None:
    import shutil

    shutil.rmtree(directory, ignore_errors=True)


def _first_line(broker: EmbeddedBroker) -> bytes:
    """What the broker says when it is bound. Read without a buffer: `ended_fd` is watched for the end afterwards."""
    line = b""
    deadline = time.monotonic() + START_TIMEOUT_S
    while not line.endswith(b"\n"):
        ready, _, _ = select.select([broker.ended_fd], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise StartFailed(service="the embedded broker", why=f"it was not bound within {START_TIMEOUT_S:g} s")
        chunk = os.read(broker.ended_fd, 4096)
        if not chunk:
            break
        line += chunk
    return line


def _after_fork() -> None:
    """In the child of a fork: the broker is the parent's, and so is its pipe."""
    global _current, _lock  # noqa: PLW0603 - the child's are its own
    _lock = threading.Lock()
    if _current is not None:
        _current.disown()
        _left_behind.append(_current)
        _current.process.returncode = 0  # or its destructor would wait for a process that is not ours
        _current = None


os.register_at_fork(after_in_child=_after_fork)
atexit.register(end_embedded)
