"""The handle of a service: several replicas of a class behind the broker. Endpoints are its attributes.

`await Class.options(…).as_service(…)` is the short form; `Service(config, Class, …)` the long one: started by `await
service`, `async with service`, or its first call. How it starts, binds and travels is in `handle`.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, ClassVar

from forge_client.connection import current_client
from forge_client.endpoints import CallOptions, ServiceEndpoint
from forge_client.handle import Handle, Plan
from forge_client.metrics import LatestMetrics, LatestSummary, Metrics, ReplicaMetrics
from forge_client.session import Session, close_session
from forge_contract.payload import register_value


def _endpoint(handle: Handle, name: str) -> ServiceEndpoint:
    return ServiceEndpoint(handle, name, CallOptions())


class Service(Handle):
    """Not thread-safe: to be used on one event loop."""

    kind: ClassVar[str] = "service"
    _endpoint_type = _endpoint

    async def __aenter__(self) -> Service:
        await self.bound()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.shutdown()

    # Sessions.

    def session(self, **hints: Any) -> Session:
        """`async with service.session() as session:` keeps the calls inside on one replica; `hints` are for routers."""
        return Session(self, hints)

    async def start_session(self, **hints: Any) -> str:
        """Start a session by hand; returns its id, for `route(…, sess_id=)` and `terminate_session`."""
        session = Session(self, hints)
        await session.open()
        return session.session_id

    async def terminate_session(self, session_id: str) -> None:
        """End a session. One that has ended already, or never was, is no error."""
        await close_session(await self.bound(), str(session_id))

    # How many it is.

    async def scale(self, replicas: int, *, wait: bool = False) -> None:
        """Have so many replicas from now on, within `min_replicas` and `max_replicas`; where the service scales by itself, it goes on from
        there. Those that go finish their calls, and their sessions move.

        `wait`: until all are HEALTHY and the others gone. Raises ConfigError for a number that cannot be; with `wait`, StartFailed
        when a replica does not get healthy (it is tried again all the same).
        """
        binding = await self.bound()
        fields = {"service": binding.service, "replicas": replicas, "wait": wait}
        await binding.client.control("scale", fields)

    # What it is doing.

    async def state(self) -> dict[str, Any]:
        """What `forge status --json` shows of it (X5): replicas, session_replica_map, active_sessions, queues."""
        binding = await self.bound()
        return await binding.client.control("state", {"service": binding.service})

    def get_metrics(self) -> LatestMetrics:
        """The latest figures the broker pushed; `await service.get_metrics()` asks for fresh ones."""
        return LatestMetrics(self._latest(), self._fresh_metrics)

    def get_metrics_summary(self) -> LatestSummary:
        """The same as `{"service": {…}, "replicas": {idx: {…}}}`; can be awaited, too."""
        return LatestSummary(self._latest(), self._fresh_metrics)

    def _latest(self) -> Metrics:
        return self._binding.metrics if self._binding is not None else Metrics()

    async def _fresh_metrics(self) -> Metrics:
        binding = await self.bound()
        return binding.learn(await binding.client.control("metrics", {"service": binding.service}))

    @property
    def _replicas(self) -> list[ReplicaMetrics]:
        """One entry for each replica, as far as is known here."""
        if self._binding is None:
            return []
        known = self._binding.metrics.replica_metrics
        indices = known or self._binding.description.get("replicas") or ()
        return [known.get(idx) or ReplicaMetrics(idx, {}) for idx in indices]

    @property
    def num_replicas(self) -> int:
        """Replicas the service has, as far as is known here; before it is started, with how many it will start."""
        if self._binding is None and isinstance(self._origin, Plan):
            return self._origin.config.initial_replicas
        return len(self._replicas)


register_value(Service, "forge_client.Service", Service.to_fields, Service.from_fields)


async def get_service(name: str) -> Any:
    """The handle of a service or actor that runs under this name: a `Service` or an `ActorHandle`.

    Raises UnknownService, naming the known ones.
    """
    from forge_client.actor_handle import ActorHandle

    client = await current_client()
    description = await client.control("find", {"name": name})
    kind: type[Handle] = ActorHandle if description.get("kind") == "actor" else Service
    handle = kind.of_description(description, client.incarnation)
    await handle.bound()
    return handle
