"""Worker processes on this machine. Launches what the core asks for, ends what it wants ended, and tells when the kernel says that
a process is gone (X2: a scaler never decides).

A worker is a command line to us. In embedded mode its output appears on our stderr with a prefix; otherwise it goes straight to a
file under the log directory, so that a broker that dies takes no worker's output along.
"""

from __future__ import annotations

import os
import selectors
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Final

from forge_broker.core.actions import Label, Launch
from forge_broker.core.events import LaunchEnded
from forge_broker.scalers.forks import Forks, Told
from forge_contract.exit_status import how_it_ended
from forge_contract.huge_pages import with_huge_pages

LAST_LINES: Final = 20


class LocalScaler:
    """`address`: where the workers find the broker. `log_dir` None: embedded, output is shown here."""

    def __init__(self, address: str, environ: Mapping[str, str], log_dir: Path | None) -> None:
        self._address = address
        self._environ = with_huge_pages(environ)
        self._log_dir = log_dir
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._outputs: dict[int, Path] = {}
        self._shown = None if log_dir is not None else _Shown()
        self._forks = Forks(address, self._environ, self._output, self._start)

    def __len__(self) -> int:
        return len(self._processes)

    def fileno(self) -> int:
        """Readable when there is something to `attend` to."""
        return self._forks.fileno()

    def launch(self, launch: Launch) -> Told:
        """Start a process, or have it forked. Tells when it could not even be started."""
        if launch.preload is not None:
            return self._forks.launch(launch, launch.preload)
        return self._start(launch)

    def _start(self, launch: Launch) -> Told:
        command = [sys.executable, "-m", "forge_worker", "--child", "--broker", self._address]
        command += ["--gpu", ",".join(launch.gpus) or "none", "--launch", str(launch.launch)]
        output = -1
        try:
            output = self._output(launch.launch, launch.label)
            # A session of its own: a Ctrl-C in our terminal is ours to handle, and workers are told to stop by us.
            self._processes[launch.launch] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._environ,
                start_new_session=True,
            )
        except OSError as error:
            return [LaunchEnded(launch.launch, f"could not be started: {error}", [])]
        finally:
            if output >= 0:
                os.close(output)  # the child has its own
        return []

    def _output(self, launch: int, label: str) -> int:
        """A descriptor to print to: the worker's file, or a pipe to us. A fork server's number is the negative of its service's."""
        if self._shown is None:
            assert self._log_dir is not None
            path = self._log_dir / f"{label.replace('/', '-')}-{abs(launch)}.log"
            self._outputs[launch] = path
            return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        ours, theirs = os.pipe()
        self._shown.add(launch, label, os.fdopen(ours, "rb", buffering=0))
        return theirs

    def label(self, label: Label) -> None:
        """What a process is for has changed. Its file, if it has one, keeps its name."""
        if self._shown is not None:
            self._shown.label(label.launch, label.label)

    def kill(self, launch: int) -> Told:
        """Tells of one that had not been started yet."""
        told = self._forks.kill(launch)
        if told is not None:
            return told
        process = self._processes.get(launch)
        if process is not None and process.poll() is None:
            process.kill()
        return []

    def unload(self, service: int) -> None:
        self._forks.unload(service)
        self._last_lines(-service)

    def attend(self) -> Told:
        """What fork servers had to say."""
        return [
            one._replace(last_lines=self._last_lines(one.launch)) if isinstance(one, LaunchEnded) else one
            for one in self._forks.attend()
        ]

    def reap(self) -> Told:
        """Those that have ended since the last look. Called when SIGCHLD came."""
        ended = self.attend()
        for launch, process in list(self._processes.items()):
            code = process.poll()
            if code is not None:
                del self._processes[launch]
                ended.append(LaunchEnded(launch, how_it_ended(code), self._last_lines(launch)))
        return ended

    def kill_all(self) -> None:
        for launch in list(self._processes):
            self.kill(launch)
        for process in self._processes.values():
            process.wait()
        self._forks.kill_all()

    def close(self) -> None:
        self._forks.close()
        if self._shown is not None:
            self._shown.close()

    def _last_lines(self, launch: int) -> list[str]:
        if self._shown is not None:
            return self._shown.last_lines(launch)
        path = self._outputs.pop(launch, None)
        if path is None:
            return []
        with path.open("rb") as stream:
            stream.seek(max(0, path.stat().st_size - 8192))
            return stream.read().decode(errors="replace").splitlines()[-LAST_LINES:]


class _Shown:
    """Forwards workers' output to our stderr, each line with its worker's label, from a thread of its own: a terminal that
    does not read must not stop the broker."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._wake_in, self._wake_out = os.pipe()
        os.set_blocking(self._wake_in, False)
        self._selector.register(self._wake_in, selectors.EVENT_READ)
        self._lock = threading.Lock()
        self._new: list[tuple[int, IO[bytes]]] = []
        self._labels: dict[int, str] = {}  # until its pipe ends
        self._last: dict[int, deque[str]] = {}
        self._drained: dict[int, threading.Event] = {}
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="worker output", daemon=True)
        self._thread.start()

    def add(self, launch: int, label: str, stream: IO[bytes]) -> None:
        with self._lock:
            self._last[launch] = deque(maxlen=LAST_LINES)
            self._drained[launch] = threading.Event()
            self._labels[launch] = label
            self._new.append((launch, stream))
        os.write(self._wake_out, b"+")

    def label(self, launch: int, label: str) -> None:
        with self._lock:
            if launch in self._labels:
                self._labels[launch] = label

    def last_lines(self, launch: int) -> list[str]:
        """Of a process that has ended. Its pipe ends with it unless it left children behind, for whom we do not wait long."""
        drained = self._drained.pop(launch, None)
        if drained is not None:
            drained.wait(0.2)
        with self._lock:
            return list(self._last.pop(launch, ()))

    def close(self) -> None:
        self._closing = True
        os.write(self._wake_out, b"-")
        self._thread.join(1.0)

    def _run(self) -> None:
        while not self._closing:
            for key, _ in self._selector.select():
                if key.fd == self._wake_in:
                    os.read(self._wake_in, 4096)
                else:
                    self._forward(*key.data)
            with self._lock:
                new, self._new = self._new, []
            for launch, stream in new:
                self._selector.register(stream, selectors.EVENT_READ, (launch, stream, bytearray()))

    def _forward(self, launch: int, stream: IO[bytes], rest: bytearray) -> None:
        chunk = os.read(stream.fileno(), 65536)
        rest += chunk
        *lines, tail = bytes(rest).split(b"\n")
        rest[:] = tail
        if not chunk and tail:
            lines.append(tail)
        shown = [line.decode(errors="replace") for line in lines]
        with self._lock:
            label = self._labels[launch]
            if launch in self._last:
                self._last[launch].extend(shown)
            if not chunk:
                del self._labels[launch]
        if shown:
            sys.stderr.write("".join(f"[{label}] {line}\n" for line in shown))
            sys.stderr.flush()
        if not chunk:
            self._selector.unregister(stream)
            stream.close()
            drained = self._drained.get(launch)
            if drained is not None:
                drained.set()
