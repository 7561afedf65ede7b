"""What clients hear of services without asking again: the answer to a deploy, notices, and what a handle needs to know."""

from __future__ import annotations

from typing import Any, Final

from forge_broker.core.clients import Client
from forge_broker.core.metrics import metrics
from forge_broker.core.services import Service
from forge_broker.core.state import State
from forge_contract.framing import Payload
from forge_contract.messages import ANSWER, NOTICE, RESIZED

# Unacknowledged: who does not read gets no more news, or a stopped client would fill us.
NEWS_AT_MOST_BYTES: Final = 1 << 20


class Telling:
    def __init__(self, state: State) -> None:
        self._state = state

    def answer_start(self, service: Service, ok: bool, fields: dict[str, Any], payload: Payload | None) -> None:
        for client, number in service.waiting_start:
            self.answer(client, number, ok, fields, payload)
        service.waiting_start = []

    def answer(self, client: Client, number: int, ok: bool, fields: dict[str, Any], payload: Payload | None) -> None:
        client.post([ANSWER, number, ok, fields, 0 if payload is None else client.outbox.attach(payload)])
        self._state.deliver(client)

    def notice(self, service: Service, topic: str, **fields: Any) -> None:
        for name in service.watchers:
            link = self._state.links.get(name)
            if link is not None:
                link.post([NOTICE, topic, {"service": service.id, **fields}])
                self._state.deliver(link)

    def resized(self, service: Service) -> None:
        """How many replicas it should have, to all that hold its deed (F10)."""
        self.notice(service, "resized", wanted=service.wanted, resizes=service.resizes)
        for replica in service.current:
            for worker in replica.ranks:
                if worker is not None:
                    worker.post([RESIZED, service.wanted, service.resizes])
                    self._state.deliver(worker)

    def news(self, service_id: int, now: float) -> None:
        """A snapshot of its metrics is due (X4)."""
        service = self._state.services.get(service_id)
        if service is None:
            return
        service.metrics_at = 0.0
        snapshot = metrics(service, now)
        for name in list(service.watchers):
            link = self._state.links.get(name)
            if link is None:
                service.watchers.discard(name)
            elif link.channel.kept_bytes < NEWS_AT_MOST_BYTES:
                link.post([NOTICE, "metrics", {"service": service_id, "snapshot": snapshot}])
                self._state.deliver(link)

    def describe(self, service: Service, now: float) -> dict[str, Any]:
        """What a handle needs to know (PROTOCOL.md §7)."""
        config = service.config
        return {
            "service": service.id,
            "name": service.name,
            "kind": service.kind,
            "class_name": service.class_name,
            "detached": service.owner is None,
            "endpoints": {endpoint.name: endpoint.id for endpoint in service.endpoints},
            "signatures": {endpoint.name: endpoint.signature for endpoint in service.endpoints},
            "options": {endpoint.name: endpoint.options for endpoint in service.endpoints},
            "replicas": sorted(service.replicas),
            "sizes": config.mesh_sizes,
            "return_first": config.return_first_rank_result,
            "errors": config.errors,
            "state_epoch": service.state_epoch,
            "metrics": metrics(service, now),
        }
