"""A client as the broker sees it: its unanswered calls, its sessions, what it started, and the results on their way to it."""

from __future__ import annotations

from typing import Any

from forge_broker.core.links import Link
from forge_broker.core.queues import Queue
from forge_broker.core.requests import Gather, Request, Slice
from forge_contract.framing import Payload
from forge_contract.messages import RESULTS, Message


class Client(Link):
    role = "client"
    constant_field = 3  # statuses

    __slots__ = (
        "accepted",
        "answered",
        "calls",
        "detached",
        "gone",
        "held_bytes",
        "id",
        "last_sequence",
        "services",
        "sessions",
    )

    def __init__(self, *link: Any, id: int, detached: bool) -> None:
        super().__init__(*link)
        self.id = id
        self.detached = detached
        self.gone = False
        self.calls: dict[int, Request | Gather | Slice] = {}  # accepted and not answered, by request id; see `call`
        self.last_sequence = 0  # the highest it has used
        self.accepted = 0
        self.answered = 0
        self.held_bytes = 0  # arguments of `calls`
        self.services: set[int] = set()  # that end with it
        self.sessions: set[Any] = set()  # services.Session; that end with it

    def call(self, key: int) -> Request | Gather | None:
        """One of `calls`, by itself; of one that waits in a Slice, what is shown for it."""
        call = self.calls.get(key)
        if type(call) is Slice:
            if isinstance(call.holder, Queue):
                return call.show(key)
            call.split()
            call = self.calls[key]
        return call  # type: ignore[return-value]  # split, it is no Slice any more

    def open_calls(self) -> list[Request | Gather]:
        """All of `calls`, each by itself."""
        found: list[Request | Gather] = []
        for call in dict.fromkeys(self.calls.values()):
            if type(call) is not Slice:
                found.append(call)  # type: ignore[arg-type]  # no Slice
            elif isinstance(call.holder, Queue):
                found += call.shown()
            else:
                left = list(call.left)
                call.split()
                found += [self.calls[key] for key in left]  # type: ignore[misc]  # Requests now
        return found

    def add_results(self, sequences: list[int], statuses: list[int], payloads: list[Payload], trusted: bool) -> None:
        group = self._results(trusted)
        group[2] += sequences
        group[3] += statuses
        group[4] += self.outbox.attach_all(payloads)

    def add_run(self, sequences: list[int], status: int, sizes: list[int], packed: bytes, trusted: bool) -> None:
        """Small results of one status, side by side in `packed` as they came."""
        group = self._results(trusted)
        group[2] += sequences
        group[3] += [status] * len(sequences)
        group[4] += sizes
        self.outbox.attach_packed(packed)

    def _results(self, trusted: bool) -> Message:
        group = self.group
        if group is None or group[1] is not trusted:
            group = self.open_group([RESULTS, trusted, [], [], []])
        return group
