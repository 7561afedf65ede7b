"""Actors whose sessions survive them, and actors that know or notice that they are broken."""

from __future__ import annotations

import asyncio
import os
import resource
import threading
from pathlib import Path
from typing import Any

from forge_client.context import current_session


class Ledger:
    """A list for each session; a value of its own makes each hook fail."""

    def __init__(self) -> None:
        self.entries: dict[str, list[Any]] = {}
        self.log: list[str] = []
        self.gate = asyncio.Event()
        self.running = 0
        self.most = 0

    def add(self, value: Any) -> list[Any]:
        """Off the loop."""
        session = current_session()
        assert session is not None
        self.log.append(f"add {session} {value}")
        self.entries.setdefault(session, []).append(value)
        return list(self.entries[session])

    async def add_slowly(self, value: Any) -> list[Any]:
        self.running += 1
        self.most = max(self.most, self.running)
        for _ in range(3):
            await asyncio.sleep(0)
        self.running -= 1
        return self.add(value)

    async def add_at_the_gate(self, value: Any) -> list[Any]:
        self.log.append(f"at the gate {value}")
        await self.gate.wait()
        return self.add(value)

    async def open_gate(self) -> None:
        self.gate.set()

    async def fail(self, value: Any) -> None:
        self.add(value)
        raise ValueError(value)

    async def read_log(self) -> list[str]:
        return list(self.log)

    async def at_most(self) -> int:
        return self.most

    async def export_session(self, sess_id: str) -> list[Any]:
        await asyncio.sleep(0)
        self.log.append(f"export {sess_id}")
        if "secret" in self.entries[sess_id]:
            raise PermissionError("not to be told")
        return self.entries[sess_id]

    async def import_session(self, sess_id: str, state: list[Any]) -> None:
        await asyncio.sleep(0)
        self.log.append(f"import {sess_id}")
        if state == ["torn"]:
            raise ValueError("a torn state")
        self.entries[sess_id] = list(state)


class PlainLedger(Ledger):
    def export_session(self, sess_id: str) -> tuple[list[Any], bool]:  # type: ignore[override]  # plain on purpose
        return self.entries[sess_id], threading.current_thread() is threading.main_thread()

    def import_session(self, sess_id: str, state: Any) -> None:  # type: ignore[override]
        self.entries[sess_id] = list(state[0])


class Feverish:
    """Its health is what it was told: a list of answers, the last one for good."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.asked = 0

    async def health(self) -> Any:
        self.asked += 1
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return answer

    async def asked_at_least(self, times: int) -> int:
        while self.asked < times:  # noqa: ASYNC110 -- what counts is the hook's being called, by nobody we could wait for
            await asyncio.sleep(0.001)
        return self.asked


class Breakable:
    async def fail(self, kind: str, text: str) -> None:
        raise {"RuntimeError": RuntimeError, "ZeroDivisionError": ZeroDivisionError, "ValueError": ValueError}[kind](
            text
        )

    def fail_in_thread(self, text: str) -> None:
        raise RuntimeError(text)

    async def echo(self, value: Any) -> Any:
        return value

    async def forever(self) -> None:
        await asyncio.Event().wait()

    async def close_descriptors(self, kind: str) -> str:
        for name in os.listdir("/proc/self/fd"):
            try:
                target = os.readlink(f"/proc/self/fd/{name}")
                if int(name) > 2 and kind in target:
                    os.close(int(name))
            except OSError:
                continue  # the one that lists them
        return "closed"


class Greedy:
    """Has little more memory than it needs to live."""

    def __init__(self) -> None:
        used = int(Path("/proc/self/statm").read_bytes().split()[0]) * resource.getpagesize()
        limit = used + (64 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        self.hoard: list[bytes] = []

    async def ask_for_too_much(self) -> int:
        return len(bytearray(1 << 40))

    async def take_all(self) -> None:
        size = 1 << 20
        while True:
            try:
                self.hoard.append(bytes(size))
            except MemoryError:
                if size == 1:
                    raise
                size //= 4

    async def echo(self, value: Any) -> Any:
        return value


class Weights:
    def __init__(self) -> None:
        self.weights: list[Any] = ["initial"]
        self.set_up = False

    async def setup(self) -> None:
        self.set_up = True

    async def load(self, weights: Any) -> None:
        assert self.set_up
        if weights == "torn":
            raise ValueError("torn weights")
        self.weights.append(weights)

    def load_in_thread(self, weights: Any) -> None:
        assert threading.current_thread() is not threading.main_thread()
        self.weights.append(weights)

    async def read(self) -> list[Any]:
        return self.weights
