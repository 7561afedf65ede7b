"""The broker that a program starts for itself when it names none (A1): a process of its own, one for this process.

One that dies by itself is started anew at its address (F10): its workers wait there, and so do our calls.

Its owner's pipe is its stdin: when this process ends, however it ends, the pipe is closed by the kernel, and the
broker stops its workers and exits. So nobody else may hold the pipe: it is closed on exec, and in children of a fork.
The client knows the broker as a command line and as lines on a pipe, never as a module (L1).
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from forge_client.gpus import find_gpus
from forge_contract.addresses import check_address
from forge_contract.errors import ConfigError, ForgeError, StartFailed, from_wire
from forge_contract.exit_status import how_it_ended
from forge_contract.huge_pages import with_huge_pages

_log = logging.getLogger("forge_client")

START_TIMEOUT_S: Final = 30.0  # an interpreter and its imports, on a machine that is busy with something else
END_TIMEOUT_S: Final = 5.0
# What dies so often dies of something that a fresh start does not mend.
REVIVALS_AT_MOST: Final = 3
REVIVALS_WITHIN_S: Final = 60.0

_lock = threading.Lock()
_current: EmbeddedBroker | None = None
# What a fork took along from its parent. Destroying it here would touch the parent's processes and sockets.
_left_behind: list[Any] = []


class EmbeddedBroker:
    """A broker process, and after it the one that took its place. `ended_fd` is readable when the present one has ended."""

    def __init__(self, directory: str, config: dict[str, Any]) -> None:
        """Starts it. Raises the broker's own error, or StartFailed when it ended without a word."""
        self.address: str = config["bind"][0]
        self.users: set[Watch] = set()  # of all loops of this process
        self._directory = directory
        self._config = config
        self._environ = with_huge_pages(os.environ)  # the broker reads its settings there: the same at every start
        self.revived: list[float] = []  # when, of late
        self._launch()

    def __repr__(self) -> str:
        code = self.process.poll()
        return f"<EmbeddedBroker pid {self.process.pid} {'running' if code is None else f'ended with {code}'}>"

    def _launch(self) -> None:
        import json  # it takes long to import; many who import us start no broker

        process = subprocess.Popen(
            [sys.executable, "-m", "forge_broker", "--serve", json.dumps(self._config)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=self._environ,
            start_new_session=True,  # Ctrl-C is for the program, which then ends its broker
        )
        assert process.stdout is not None
        self.process = process
        self.ended_fd = process.stdout.fileno()
        try:
            first = json.loads(_first_line(self.ended_fd) or "{}")
            if not isinstance(first, dict) or "addresses" not in first:
                error = first.get("error") if isinstance(first, dict) else None
                if error:
                    raise from_wire(error)
                why = "it ended before it was bound; see its output above"
                raise StartFailed(service="the embedded broker", why=why)
        except BaseException:
            self._end_process()
            raise

    @property
    def running(self) -> bool:
        # The pipe ends a moment before the process can be waited for; whoever saw that must not be given it again.
        return self.process.poll() is None and not select.select([self.ended_fd], [], [], 0)[0]

    @property
    def died(self) -> bool:
        """It has ended, and nobody asked it to: whoever does, has it end with 0."""
        try:
            return not self.running and self.process.wait(END_TIMEOUT_S) != 0
        except subprocess.TimeoutExpired:
            return False  # it has closed its output, and takes its time to leave

    def revivable(self, now: float) -> bool:
        return self.died and may_revive(self.revived, now)

    def launch_again(self, now: float) -> None:
        """Start a process in the place of one that died, with the same address and configuration.

        Raises StartFailed when it ended in order, or died too often of late; and what the start raises.
        """
        if not self.died:
            raise StartFailed(service="the embedded broker", why="it was asked to end")
        how = how_it_ended(self.process.returncode)
        if not may_revive(self.revived, now):
            why = f"it died {len(self.revived) + 1} times within {REVIVALS_WITHIN_S:g} s, now of {how}"
            raise StartFailed(service="the embedded broker", why=why)
        self.revived.append(now)
        self._close_pipes()
        self._launch()
        _log.warning("the embedded broker ended (%s) and was started anew", how)

    def _close_pipes(self) -> None:
        self.disown()
        if self.process.stdout is not None:
            self.process.stdout.close()

    def disown(self) -> None:
        """Close the owner's pipe: the broker stops everything and exits."""
        if self.process.stdin is not None:
            self.process.stdin.close()

    def end(self) -> None:
        """Close the owner's pipe and wait until nothing is left running; blocks for up to `END_TIMEOUT_S` and a bit."""
        self._end_process()
        _remove(self._directory)

    def _end_process(self) -> None:
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
        self._close_pipes()


class Watch:
    """Sees to it, for the client of one loop, that the embedded broker runs. The client's link finds the one that was
    started anew by itself; `lost(why)` is called when there will be none."""

    def __init__(self, broker: EmbeddedBroker, loop: asyncio.AbstractEventLoop, lost: Callable[[str], None]) -> None:
        self._broker = broker
        self._loop = loop
        self._lost = lost
        self._fd: int | None = None
        self._reviving: asyncio.Task[None] | None = None
        broker.users.add(self)
        self._look()

    def close(self) -> None:
        self._broker.users.discard(self)
        self._look_away()
        if self._reviving is not None and not self._loop.is_closed():
            self._reviving.cancel()

    def _look(self) -> None:
        # A descriptor of our own: the broker's may be closed, and its number given to another, before our loop looks.
        self._fd = os.dup(self._broker.ended_fd)
        self._loop.add_reader(self._fd, self._ended)

    def _look_away(self) -> None:
        if self._fd is not None:
            if not self._loop.is_closed():
                self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = None

    def _ended(self) -> None:
        self._look_away()
        self._reviving = self._loop.create_task(self._revive())

    async def _revive(self) -> None:
        try:
            await asyncio.to_thread(revive, self._broker)
            self._reviving = None
            self._look()
        except (ForgeError, OSError) as error:
            self._reviving = None
            self._lost(f"the embedded broker's process has ended: {error}")


def embedded_broker(environ: Mapping[str, str]) -> EmbeddedBroker:
    """The broker of this process; started when there is none. Blocks meanwhile; any thread may ask.

    Raises the broker's own error, or StartFailed when it ended without a word.
    """
    global _current  # noqa: PLW0603 - one per process, that is what it is
    with _lock:
        if _current is not None and not _current.running:
            now = time.monotonic()
            if _current.users and _current.revivable(now):
                _current.launch_again(now)  # other loops wait for it; their clients are about to ask, too
            else:
                _current.end()
                _current = None
        if _current is None:
            _current = _start(environ)
        return _current


def revive(broker: EmbeddedBroker) -> None:
    """Start a broker that died anew; does nothing when that was done already. Blocks meanwhile; any thread may ask.

    Raises StartFailed when it is not to be: it was asked to end, or dies too often; and what a start raises.
    """
    with _lock:
        if broker is not _current:
            raise StartFailed(service="the embedded broker", why="it was asked to end")
        if not broker.running:
            broker.launch_again(time.monotonic())


def may_revive(revived: list[float], now: float) -> bool:
    """Whether one more start is allowed after those; forgets the ones too long ago to count."""
    revived[:] = [when for when in revived if now - when < REVIVALS_WITHIN_S]
    return len(revived) < REVIVALS_AT_MOST


def end_embedded(broker: EmbeddedBroker | None = None) -> None:
    """End this process's broker (only if it is `broker`, when that is given). Blocks for up to `END_TIMEOUT_S` and a bit."""
    global _current  # noqa: PLW0603 - see above
    with _lock:
        if _current is None or broker not in (None, _current):
            return
        _current.end()
        _current = None


def _start(environ: Mapping[str, str]) -> EmbeddedBroker:
    import tempfile  # as slow to import as json

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
        return EmbeddedBroker(directory, config)
    except BaseException:
        _remove(directory)
        raise


def _remove(directory: str) -> None:
    import shutil

    shutil.rmtree(directory, ignore_errors=True)


def _first_line(fd: int) -> bytes:
    """What the broker says when it is bound. Read without a buffer: `ended_fd` is watched for the end afterwards."""
    line = b""
    deadline = time.monotonic() + START_TIMEOUT_S
    while not line.endswith(b"\n"):
        ready, _, _ = select.select([fd], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise StartFailed(service="the embedded broker", why=f"it was not bound within {START_TIMEOUT_S:g} s")
        chunk = os.read(fd, 4096)
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
