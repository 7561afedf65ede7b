"""The handle of an actor (`as_actor`): one replica, of one or more ranks, addressed directly, without a router.

Its endpoints are `ActorEndpoint`s: `await actor.step.call(x)` gives a ValueMesh over the ranks. How it starts, binds
and travels is in `handle`.
"""

from __future__ import annotations

from typing import Any, ClassVar

from forge_client.endpoints import ActorEndpoint, CallOptions
from forge_client.handle import Handle
from forge_contract.config import ServiceConfig
from forge_contract.errors import ConfigError
from forge_contract.payload import register_value


def _endpoint(handle: Handle, name: str) -> ActorEndpoint:
    return ActorEndpoint(handle, name, CallOptions())


class ActorHandle(Handle):
    """Not thread-safe: to be used on one event loop."""

    kind: ClassVar[str] = "actor"
    _endpoint_type = _endpoint

    def __init__(self, config: ServiceConfig, cls: Any, /, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, cls, *args, **kwargs)
        if config.initial_replicas != 1:
            raise ConfigError(
                where="as_actor",
                message=f"an actor is one replica, not num_replicas={config.initial_replicas}; use as_service, or procs= for ranks",
            )

    @property
    def state_epoch(self) -> int:
        """Counts the actor's incarnations from 1, 0 when it was not started: another number than before means that
        it died and began anew, and that its state is new (A12)."""
        return self._binding.state_epoch if self._binding is not None else 0


register_value(ActorHandle, "forge_client.ActorHandle", ActorHandle.to_fields, ActorHandle.from_fields)
