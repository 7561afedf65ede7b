"""Threads for the endpoints that are plain `def`: a fixed number for each endpoint, started when first needed.

Not concurrent.futures: its threads are joined at exit, so one call that never returns would keep a stopped worker
alive, and its futures cost more than many a call.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any


class Threads:
    """Runs `work` off the loop and calls `done` with what it returned, on the loop, when the thread has ended it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, count: int, name: str) -> None:
        self.free = count  # one is taken by `run`, and is back when `done` is called
        self._loop = loop
        self._name = name
        self._idle = 0  # of the free ones, started
        self._jobs: SimpleQueue[tuple[Callable[[], Any], Callable[[Any], None]]] = SimpleQueue()
        self._ended: deque[tuple[Callable[[Any], None], Any]] = deque()

    def run(self, work: Callable[[], Any], done: Callable[[Any], None]) -> None:
        """Needs a free thread. `work` must not raise."""
        assert self.free > 0, f"{self._name} has no thread to spare"
        self.free -= 1
        if self._idle:
            self._idle -= 1
        else:
            threading.Thread(target=self._serve, name=f"forge-{self._name}", daemon=True).start()
        self._jobs.put((work, done))

    def _serve(self) -> None:
        while True:
            work, done = self._jobs.get()
            self._ended.append((done, work()))
            del work, done  # or the last call's arguments would live until the next call
            try:
                self._loop.call_soon_threadsafe(self._tell)
            except RuntimeError:
                return  # the loop is closed: the worker has left while this ran

    def _tell(self) -> None:
        while self._ended:
            done, value = self._ended.popleft()
            self.free += 1
            self._idle += 1
            done(value)


async def in_thread(loop: asyncio.AbstractEventLoop, name: str, work: Callable[[], Any]) -> Any:
    """What `work` returns, from a thread of its own; raises what it raises, awaits what it returns."""
    ended: asyncio.Future[tuple[Any, BaseException | None]] = loop.create_future()

    def settle(value: Any, error: BaseException | None) -> None:
        if not ended.done():  # cancelled meanwhile
            ended.set_result((value, error))

    def run() -> None:
        try:
            value, error = work(), None
        except BaseException as raised:
            value, error = None, raised
        try:
            loop.call_soon_threadsafe(settle, value, error)
        except RuntimeError:
            return  # the loop is closed, as above

    threading.Thread(target=run, name=f"forge-{name}", daemon=True).start()
    value, error = await ended
    if error is not None:
        raise error
    return await value if inspect.isawaitable(value) else value
