"""The actor that `chaos` breaks and `failover` measures: it counts for each session, and writes down every call it starts.

A module of its own, because workers import it and nothing else of the bench.
"""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Final

from bench.chaos_history import History
from forge_client import ForgeActor, current_session, endpoint, service_endpoint

BALLAST: Final = bytes(range(256)) * 1200
"""Large enough to go through shared memory where that is possible."""


class Counter(ForgeActor):
    """`directory`: where its history goes. `work_s`: seconds each call takes."""

    def __init__(self, directory: str, work_s: float) -> None:
        self._history = History(Path(directory), "worker")
        self._work_s = work_s
        self._counts: dict[str, int] = {}

    @endpoint
    async def work(self, call: str) -> int:
        return await self._once("plain", call)

    @service_endpoint(batch_size=8, batch_timeout=0.002, batch_mode="call")
    async def work_together(self, calls: list[str]) -> list[int]:
        await self._all_once(calls)
        return [0] * len(calls)

    @endpoint
    async def carry(self, call: str, ballast: bytes) -> bytes:
        """Gives back what it was given; so does `carry_together`."""
        await self._once("plain", call)
        return _judged(ballast)

    @service_endpoint(batch_size=4, batch_timeout=0.01, batch_mode="call")
    async def carry_together(self, calls: list[str], ballasts: list[bytes]) -> list[bytes]:
        await self._all_once(calls)
        return list(map(_judged, ballasts))

    @endpoint(delivery="at_most_once")
    async def once(self, call: str) -> int:
        return await self._once("once", call)

    @endpoint
    async def add(self, call: str, n: int) -> int:
        """The session's count with this call. It is stored when the call is over: two at once would both store the same."""
        session = current_session() or ""
        value = self._counts.get(session, 0) + 1
        self._history.write("run", "session", call, session, n, value)
        await asyncio.sleep(self._work_s)
        self._counts[session] = value
        return value

    async def _once(self, kind: str, call: str) -> int:
        self._history.write("run", kind, call)
        await asyncio.sleep(self._work_s)
        return 0

    async def _all_once(self, calls: list[str]) -> None:
        for call in calls:
            self._history.write("run", "plain", call)
        await asyncio.sleep(self._work_s)

    def export_session(self, sess_id: str) -> int:
        return self._counts.get(sess_id, 0)

    def import_session(self, sess_id: str, state: int) -> None:
        self._counts[sess_id] = state


def _judged(ballast: bytes) -> bytes:
    if ballast != BALLAST:
        raise ValueError("the ballast came otherwise than it was sent")
    return ballast


class Holder(ForgeActor):
    """`ballast_mib`: how much larger than needed its process is."""

    def __init__(self, ballast_mib: int) -> None:
        self._ballast = b"\1" * (ballast_mib << 20)

    @endpoint
    async def hold(self, path: str) -> tuple[int, float]:
        """The first to run this path leaves its pid there and never returns; the second gives its pid, and when it began."""
        began = time.monotonic()
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            return os.getpid(), began
        os.write(descriptor, f"{os.getpid()}\n".encode())
        os.close(descriptor)
        await asyncio.Event().wait()
        raise AssertionError("nobody sets it")
