"""Actors for worker processes under test. Imported by name in the child, so the environment at import time is visible."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from typing import Any

from forge_client.context import current_request, current_session

SEEN_AT_IMPORT = dict(os.environ)


def hide(method: Any) -> Any:
    """A decorator as many libraries have them: nobody sees that the method is async."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    return call


class Echo:
    def __init__(self, prefix: str = "") -> None:
        self.prefix = prefix
        self.ready = False
        self.log: list[str] = []
        self.gate = threading.Event()

    async def setup(self) -> None:
        await asyncio.sleep(0)
        self.ready = True

    async def echo(self, value: Any) -> Any:
        return (self.prefix + value) if self.prefix else value

    def plain(self, value: Any) -> tuple[Any, bool]:
        return value, threading.current_thread() is threading.main_thread()

    async def where(self) -> tuple[str | None, str | None]:
        await asyncio.sleep(0)
        return current_session(), current_request()

    async def fail(self, text: str) -> None:
        raise ValueError(text)

    async def leave(self) -> None:
        sys.exit(3)

    def leave_in_thread(self) -> None:
        raise KeyboardInterrupt

    async def slow(self, seconds: float) -> str:
        self.log.append("slow began")
        try:
            await asyncio.sleep(seconds)
        finally:
            self.log.append("slow ended")
        return "slow"

    def block(self, name: str) -> str:
        self.log.append(name)
        self.gate.wait(20.0)
        return name

    def note_in_thread(self, name: str) -> None:
        self.log.append(name)

    async def note(self, name: str) -> None:
        self.log.append(name)

    async def open_gate(self) -> None:
        self.gate.set()

    async def read_log(self, lines: int = 0) -> list[str]:
        """Once it has so many: a thread begins when it begins."""
        while len(self.log) < lines:  # noqa: ASYNC110 -- threads write it, and know of no event of the loop
            await asyncio.sleep(0.001)
        return list(self.log)

    async def unserialisable(self) -> Any:
        return lambda: sys  # a lambda of this module: cloudpickle takes it by value, so only without trust it fails

    async def locked(self) -> Any:
        return threading.Lock()

    async def large(self, size: int) -> bytes:
        return bytes(size)

    async def doubled(self, values: list[int]) -> list[int]:
        assert isinstance(values, list)
        return [2 * value for value in values]

    async def not_a_list(self, values: list[int]) -> int:
        return len(values)

    async def with_timeout(self) -> str:
        async with asyncio.timeout(5):
            await asyncio.sleep(0)
            return "in time"

    @hide
    async def hidden(self, value: str) -> tuple[str, bool, str | None]:
        self.log.append(value)
        await asyncio.sleep(0)
        return value, threading.current_thread() is threading.main_thread(), current_session()

    async def shout(self) -> None:
        print("to nobody" * 100)
        print("to nobody" * 100, file=sys.stderr)
        os.write(1, b"")

    async def environment(self) -> dict[str, str]:
        return SEEN_AT_IMPORT

    async def block_the_loop(self, seconds: float) -> None:
        time.sleep(seconds)  # noqa: ASYNC251 -- what a careless actor does

    async def mesh_step(self, name: str) -> None:
        self.log.append(f"{name} began")
        await asyncio.sleep(0)
        self.log.append(f"{name} ended")


class TearsDown:
    def __init__(self, path: str) -> None:
        self.path = path

    def teardown(self) -> None:
        with open(self.path, "w", encoding="utf-8") as file:
            file.write("torn down")
        raise RuntimeError("teardown is broken")

    async def die(self) -> None:
        os._exit(7)


class BrokenInit:
    def __init__(self) -> None:
        raise ValueError("no weights here")


class BrokenSetup:
    async def setup(self) -> None:
        raise OSError(28, "no space")
