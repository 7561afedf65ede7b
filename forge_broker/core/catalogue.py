"""Services as they are made: of a client's spec, or of a predecessor's deed (F10). Their replicas come afterwards."""

from __future__ import annotations

from typing import Any, cast

from forge_broker.core.deadlines import Kind
from forge_broker.core.queues import Queue
from forge_broker.core.services import Endpoint, Service, read_policy, read_router
from forge_broker.core.sizing import Sizing
from forge_broker.core.state import State
from forge_contract.config import ServiceConfig
from forge_contract.errors import ConfigError, ProtocolError
from forge_contract.framing import Payload
from forge_contract.routing import RoundRobinRouter


class Catalogue:
    def __init__(self, state: State) -> None:
        self._state = state

    def make(
        self, ids: list[int], name: str, spec: Any, config: ServiceConfig, init: Payload, trusted: bool, now: float
    ) -> Service:
        """A service without replicas. `ids`: its own and its endpoints'."""
        state = self._state
        service = Service(ids[0], name, spec, config, init, trusted, now)
        shared = Queue(f"{name} calls")
        for method, (one, endpoint_id) in enumerate(zip(spec["endpoints"], ids[1:], strict=True)):
            where = f"{name}.{one['name']}"
            router = read_router(
                one.get("router"), trusted, state.unpickle, lambda: state.random.getrandbits(32), where
            )
            # An actor's calls keep their order across its endpoints (A6), so they share a queue.
            queue = shared if service.kind == "actor" else Queue(where)
            service.endpoints.append(Endpoint(service, endpoint_id, method, one, router, queue))
        policy = read_policy(config, spec, trusted, state.unpickle, state.load)
        service.sizing = Sizing(policy, now)
        service.batches = any(endpoint.batcher is not None for endpoint in service.endpoints)
        for endpoint in service.endpoints:
            same = [one.router for one in service.endpoints if one.queue is endpoint.queue]
            if all(type(router) is RoundRobinRouter for router in same):
                endpoint.queue.deal = cast(RoundRobinRouter, same[0]).deal
        # Of a call that may run once at most, nobody could say whether it had begun; on a mesh calls run one at a time.
        if service.kind == "service" and config.world == 1 and not any(one.at_most_once for one in service.endpoints):
            service.ahead_s = config.dispatch_ahead_s
        state.services[service.id] = service
        state.names[name] = service
        state.endpoints.update({endpoint.id: endpoint for endpoint in service.endpoints})
        if config.autoscaling is not None:
            state.deadlines.add(now + config.autoscaling.evaluate_every_s, Kind.SCALE, service.id)
        return service

    def name_of(self, config: ServiceConfig, class_name: str) -> str:
        names = self._state.names
        if config.name is not None:
            if config.name in names:
                raise ConfigError(
                    where="deploy",
                    message=f"a service named {config.name!r} is running; stop it or choose another name",
                )
            return config.name
        base = config.mesh_name or class_name
        return (
            base
            if base not in names
            else next(f"{base}-{n}" for n in range(2, len(names) + 3) if f"{base}-{n}" not in names)
        )

    def revive(self, deed: dict[str, Any], config: ServiceConfig, init: Payload, trusted: bool, now: float) -> Service:
        """A service of our predecessor, under its old ids. Raises ProtocolError when others have them, or its name."""
        state = self._state
        ids = [deed["service"], *deed["endpoints"]]
        if len(ids) != 1 + len(deed["spec"]["endpoints"]) or deed["name"] in state.names:
            raise ProtocolError(f"a deed of {deed['name']!r:.60} that does not fit")
        if any(one in state.services or one in state.endpoints for one in ids):
            raise ProtocolError(f"a deed of {deed['name']!r:.60} with ids of another service")
        service = self.make(ids, deed["name"], deed["spec"], config, init, trusted, now)
        state.last_id = max(state.last_id, *ids)
        state.note("info", "service came back", service=service.name)
        return service
