"""A client as the broker sees it: its unanswered calls, its sessions, what it started, and the results on their way to it."""

from __future__ import annotations

from typing import Any

from forge_broker.core.links import Link
from forge_broker.core.requests import Gather, Request
from forge_contract.framing import Payload
from forge_contract.messages import RESULTS


class Client(Link):
    role = "client"
    constant_field = 3  # statuses

    __slots__ = ("accepted", "answered", "calls", "detached", "gone", "held_bytes", "id", "services", "sessions")

    def __init__(self, *link: Any, id: int, detached: bool) -> None:
        super().__init__(*link)
        self.id = id
        self.detached = detached
        self.gone = False
        self.calls: dict[int, Request | Gather] = {}  # accepted and not answered, by request id
        self.accepted = 0
        self.answered = 0
        self.held_bytes = 0  # arguments of `calls`
        self.services: set[int] = set()  # that end with it
        self.sessions: set[tuple[int, str]] = set()  # (service id, session id)

    def add_results(self, sequences: list[int], statuses: list[int], payloads: list[Payload], trusted: bool) -> None:
        group = self.group
        if group is None or group[1] is not trusted:
            group = self.open_group([RESULTS, trusted, [], [], []])
        group[2] += sequences
        group[3] += statuses
        group[4] += self.outbox.attach_all(payloads)
