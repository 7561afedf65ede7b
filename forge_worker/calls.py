"""What `actor_host` runs: an endpoint of the instance, and one attempt of one request."""

from __future__ import annotations

import asyncio
import inspect
from collections import deque
from collections.abc import Coroutine
from typing import Any

from forge_contract.framing import Payload
from forge_worker.threads import Threads

Key = str | int | None  # calls of one key start in order: their session, or the client they come from


class Endpoint:
    """A method and what it takes to run it."""

    __slots__ = ("is_async", "method", "name", "parked", "takes_lists", "threads")

    def __init__(self, name: str, method: Any, takes_lists: bool, threads: Threads) -> None:
        self.name = name
        self.method = method
        self.takes_lists = takes_lists
        self.threads = threads
        self.is_async = inspect.iscoroutinefunction(method)
        self.parked: deque[Call] = deque()


class Call:
    """One attempt of one request, from dispatch to reply."""

    __slots__ = (
        "attempt",
        "begun",
        "coroutine",
        "dropped",
        "endpoint",
        "id",
        "key",
        "payload",
        "session",
        "started",
        "task",
        "trusted",
    )

    def __init__(
        self,
        request: int,
        attempt: int,
        endpoint: Endpoint,
        payload: Payload,
        trusted: bool,
        session: str | None,
        key: Key,
    ) -> None:
        self.id = request
        self.attempt = attempt
        self.endpoint = endpoint
        self.payload = payload
        self.trusted = trusted
        self.session = session
        self.key = key
        self.started = 0.0  # monotonic seconds, 0.0: not started
        self.begun = False  # its first line runs, or has run
        self.dropped = False
        self.task: asyncio.Task[None] | None = None  # its own, once it has had to wait
        self.coroutine: Coroutine[Any, Any, Any] | None = None  # what a plain `def` unexpectedly returned
