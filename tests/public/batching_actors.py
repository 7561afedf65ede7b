"""Actors whose endpoints batch, in a module that workers import by reference. Each method tells what it got, or does what its
first item says. Endpoints that only fill are given 20 s to: a test that waits for that has failed."""

from __future__ import annotations

import asyncio
import os
import threading
from typing import Any

import numpy as np

from forge_client import ForgeActor, current_session, endpoint, service_endpoint

FOUR: dict[str, Any] = {"batch_size": 4, "batch_timeout": 0.02}
FOUR_AT_ONCE: dict[str, Any] = {**FOUR, "batch_mode": "call"}
FILLS: dict[str, Any] = {"batch_size": 4, "batch_timeout": 20.0}
FILLS_AT_ONCE: dict[str, Any] = {**FILLS, "batch_mode": "call"}


class Batching(ForgeActor):
    """What a batch is, in both modes, async and plain."""

    def __init__(self) -> None:
        self._raised = 0

    @service_endpoint(**FOUR)
    async def one_by_one(self, value: int) -> tuple[int, int]:
        return 2 * value, os.getpid()

    @service_endpoint(**FOUR)
    def one_by_one_in_threads(self, value: int) -> tuple[int, int]:
        return 2 * value, os.getpid()

    @service_endpoint(**FOUR_AT_ONCE)
    async def together(self, left: Any, right: Any = None, *, bias: Any = None) -> list[Any]:
        return self._told(left, right, bias)

    @service_endpoint(**FOUR_AT_ONCE)
    def together_in_a_thread(self, left: Any, right: Any = None, *, bias: Any = None) -> list[Any]:
        assert threading.current_thread() is not threading.main_thread()
        return self._told(left, right, bias)

    @staticmethod
    def _told(left: Any, right: Any, bias: Any) -> list[Any]:
        """For each item what it was called with, and how many ran with it."""
        return [
            (one, None if right is None else right[at], None if bias is None else bias[at], len(left))
            for at, one in enumerate(left)
        ]

    @service_endpoint(**FILLS)
    async def patient(self, value: Any) -> tuple[Any, str | None]:
        return value, current_session()

    @service_endpoint(**FILLS_AT_ONCE)
    async def patient_together(self, values: list[Any]) -> list[Any]:
        return [(value, len(values)) for value in values]

    @service_endpoint(batch_size=3, batch_timeout=20.0, batch_mode="call")
    async def odd(self, hows: list[str]) -> Any:
        match hows[0]:
            case "dict":
                return dict.fromkeys(range(len(hows)), "x")
            case "too few":
                return hows[1:]
            case "too many":
                return [*hows, "x"]
            case "generator":
                return (how for how in hows)
            case "raises":
                self._raised += 1
                raise LookupError(f"raised in run {self._raised}")
        return None

    @service_endpoint(**FILLS_AT_ONCE)
    async def each_its_own(self, hows: list[str]) -> list[Any]:
        """ "same" is the same exception for all that say so."""
        same = LookupError("the same")
        answers = {"same": same, "own": LookupError("its own"), "lock": threading.Lock()}
        return [answers.get(how, how) for how in hows]

    @service_endpoint(batch_size=4, batch_eager=True, batch_timeout=20.0, batch_mode="call")
    async def eager(self, values: list[int]) -> list[int]:
        return [len(values)] * len(values)

    @service_endpoint(batch_sessions=True, **FILLS_AT_ONCE)
    async def in_sessions(self, values: list[Any]) -> list[Any]:
        return [(at, len(values), current_session()) for at in range(len(values))]

    @endpoint
    async def rest(self) -> None:
        """Until it is cancelled."""
        await asyncio.Event().wait()

    @endpoint
    async def pid(self) -> int:
        return os.getpid()


def language_of(text: str, language: str = "en") -> str:
    return language


def length_of(text: str, language: str = "en") -> int:
    return len(text)


def itself(value: Any) -> Any:
    """As key or weight; raises if it is told to."""
    if value == "raises":
        raise LookupError("no such adapter")
    return value


class Sorted(ForgeActor):
    """By key, by weight: as functions and as names of parameters."""

    @service_endpoint(batch_key=language_of, **FOUR_AT_ONCE)
    async def by_function(self, text: list[str], language: list[str] | None = None) -> list[Any]:
        return [sorted(text)] * len(text)

    @service_endpoint(batch_key="language", **FOUR_AT_ONCE)
    async def by_name(self, text: list[str], *, language: list[str]) -> list[Any]:
        assert len(set(language)) == 1
        return [sorted(text)] * len(text)

    @service_endpoint(batch_weight=length_of, batch_max_weight=10.0, **FOUR_AT_ONCE)
    async def weighed(self, text: list[str]) -> list[Any]:
        return [text] * len(text)

    @service_endpoint(batch_weight="tokens", batch_max_weight=10, **FOUR)
    async def weighed_by_name(self, tokens: int) -> int:
        return tokens

    @service_endpoint(batch_key=itself, **FOUR)
    async def keyed(self, value: Any) -> Any:
        return value

    @service_endpoint(batch_weight=itself, **FOUR)
    async def heavy(self, value: Any) -> Any:
        return value


class Stacked(ForgeActor):
    """Arrays on a stack."""

    @service_endpoint(collate="stack", **FOUR_AT_ONCE)
    async def numpy(self, array: Any, *, scale: Any) -> Any:
        """The sum of each, times its scale; the shape that came tells that there was one run."""
        assert isinstance(array, np.ndarray)
        return [(array.shape, one.sum() * by) for one, by in zip(array, scale, strict=True)]

    @service_endpoint(collate="stack", **FOUR_AT_ONCE)
    async def halved(self, array: Any) -> Any:
        """numpy or torch: one array for all, which is split again."""
        return array / 2


class Held(ForgeActor):
    """Batches that last until they are let go, and how often each began."""

    def __init__(self) -> None:
        self._let_go = asyncio.Event()
        self._runs: list[list[Any]] = []

    @service_endpoint(**FILLS_AT_ONCE)
    async def hold(self, values: list[Any]) -> list[Any]:
        self._runs.append(values)
        await self._let_go.wait()
        return [(value, os.getpid()) for value in values]

    @service_endpoint(**FILLS_AT_ONCE)
    async def rest_unless(self, pids: list[int]) -> list[int]:
        if os.getpid() not in pids:
            await asyncio.Event().wait()
        return [os.getpid()] * len(pids)

    @endpoint
    async def let_go(self) -> None:
        self._let_go.set()

    @endpoint
    async def runs(self) -> list[list[Any]]:
        return self._runs

    @endpoint
    async def pid(self) -> int:
        return os.getpid()


class Remembers(ForgeActor):
    """A session's state is exported after each of its calls, so they run one at a time (S3)."""

    def __init__(self) -> None:
        self._turns: dict[str, list[int]] = {}

    @service_endpoint(batch_sessions=True, **FILLS_AT_ONCE)
    async def say(self, values: list[int]) -> list[Any]:
        turns = self._turns.setdefault(current_session() or "", [])
        turns += values
        return [list(turns)]

    async def export_session(self, sess_id: str) -> list[int]:
        return self._turns[sess_id]

    async def import_session(self, sess_id: str, state: list[int]) -> None:
        self._turns[sess_id] = state
