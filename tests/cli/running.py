"""Commands as processes: started with nothing of this machine's settings, read line by line, ended by signal.

Every wait is for an event, with a bound. `Started` is a context manager, so that no process outlives its test.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self

import psutil

BOUND_S: Final = 30.0

APP: Final = """
import asyncio
import os
import sys
from forge_client import ForgeActor, current_request, endpoint


class Gen(ForgeActor):
    def __init__(self, k=1):
        self.k = k

    @endpoint
    async def predict(self, x, scale: int = 1):
        return {"y": x * scale + self.k}

    @endpoint
    async def rest(self):
        await asyncio.Event().wait()

    @endpoint
    async def until(self, path):
        open(path + ".started", "w").close()
        while not os.path.exists(path):
            await asyncio.sleep(0.01)
        return "finished"

    @endpoint
    def die_if(self, path):
        if os.path.exists(path):
            print("last words", file=sys.stderr, flush=True)
            os._exit(3)
        return "alive"

    @endpoint
    def pid(self):
        return os.getpid()

    @endpoint
    def fail(self):
        raise KeyError("[red]")

    @endpoint
    def odd(self):
        return (1, {2}, b"x", float("nan"), {3: "ü"})

    @endpoint
    def who(self):
        return current_request()


class Broken(ForgeActor):
    def __init__(self):
        raise RuntimeError("no weights")

    @endpoint
    def f(self):
        return None


class Plain:
    pass
"""


class Place:
    """A directory to run commands in: home, private directory and `app.py`, all its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (directory / "app.py").write_text(APP, "utf-8")
        (directory / "run").mkdir(mode=0o700)
        self.address = f"ipc://{directory}/run/forge/broker.sock"  # the default one of this place

    def environ(self, **variables: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "FORCE_COLOR")}
        own = {"HOME": str(self.directory), "XDG_RUNTIME_DIR": str(self.directory / "run"), "NO_COLOR": "1"}
        return {**kept, **own, **variables}

    def forge(self, *arguments: str, bound_s: float = BOUND_S, given: str = "", **variables: str) -> Done:
        """Run a command to its end."""
        done = subprocess.run(
            command(*arguments),
            cwd=self.directory,
            env=self.environ(**variables),
            input=given,
            capture_output=True,
            text=True,
            check=False,
            timeout=bound_s,
        )
        return Done(done.returncode, done.stdout, done.stderr)

    def start(self, *arguments: str, **variables: str) -> Started:
        return Started(
            subprocess.Popen(
                command(*arguments),
                cwd=self.directory,
                env=self.environ(**variables),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )

    def start_broker(self, *arguments: str, listening: int = 1, **variables: str) -> Started:
        """A broker that listens at so many addresses."""
        broker = self.start("broker", "start", *arguments, **variables)
        try:
            for _ in range(listening):
                broker.wait_for(lambda line: '"listening"' in line)
        except BaseException:
            broker.kill()
            raise
        return broker

    def status(self) -> dict[str, Any]:
        done = self.forge("status", "--json")
        assert done.code == 0, done.err
        answer = json.loads(done.out)
        assert isinstance(answer, dict)
        return answer


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "forge_cli", *arguments]


class Done:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code = code
        self.out = out
        self.err = err

    def __repr__(self) -> str:
        return f"<exit code {self.code}\nstdout: {self.out}\nstderr: {self.err}>"


class Started:
    """A running command. Its lines of stderr are read by a thread, so that it never waits for us."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []  # of stderr, those that were waited past
        self._new: queue.Queue[str | None] = queue.Queue()
        assert process.stderr is not None
        self._reader = threading.Thread(target=self._read, args=(process.stderr,), daemon=True)
        self._reader.start()

    def _read(self, stream: IO[str]) -> None:
        for line in stream:
            self._new.put(line)
        self._new.put(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(BOUND_S)
            except subprocess.TimeoutExpired:
                self.kill()
        self._close()

    def wait_for(self, wanted: Callable[[str], bool], bound_s: float = BOUND_S) -> str:
        """The next line of stderr that is wanted."""
        deadline = time.monotonic() + bound_s
        while True:
            line = self._new.get(timeout=max(0.0, deadline - time.monotonic()))
            assert line is not None, f"it ended: {''.join(self.lines)}"
            self.lines.append(line)
            if wanted(line):
                return line

    def rest(self) -> list[str]:
        """The lines of stderr that were not waited for, once it has ended."""
        return list(iter(lambda: self._new.get(timeout=BOUND_S) or "", ""))

    def interrupt(self) -> int:
        """Ctrl-C; the exit code."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(BOUND_S)

    def descendants(self) -> list[psutil.Process]:
        return [*psutil.Process(self.process.pid).children(recursive=True)]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._close()

    def _close(self) -> None:
        self._reader.join(BOUND_S)
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()
