"""Forge broker for those who call: actor classes as services, behind one import.

    class Generator(ForgeActor):
        @endpoint
        async def predict(self, x): ...

    service = await Generator.options(num_replicas=2).as_service()
    y = await service.predict.route(x)

`actor` is what one writes, `service` and `actor_handle` what one holds, `client` and `link` the way to the broker.
"""

from forge_client.actor import ForgeActor, endpoint, service_endpoint
from forge_client.actor_handle import ActorHandle
from forge_client.connection import connect, shutdown
from forge_client.context import current_request, current_session
from forge_client.endpoints import ActorEndpoint, ServiceEndpoint
from forge_client.service import Service, get_service
from forge_client.session import Session
from forge_contract.config import AutoscalingConfig, ServiceConfig
from forge_contract.errors import (
    AddressInUse,
    BadCall,
    BatchError,
    BrokerLost,
    BrokerUnreachable,
    CallCancelled,
    CallTimeout,
    ConfigError,
    FanoutError,
    ForgeError,
    NoHealthyReplicas,
    OutcomeUnknown,
    Overloaded,
    PayloadTooLarge,
    PoisonedRequest,
    ProtocolError,
    RemoteError,
    ReplicaLost,
    RouterError,
    SerializationError,
    ServiceStopped,
    SessionClosed,
    SessionError,
    SessionLost,
    StartFailed,
    TrustRequired,
    UnknownEndpoint,
    UnknownService,
    UnknownSession,
    VersionMismatch,
)
from forge_contract.routing import (
    ConsistentHashRouter,
    LeastLoadedRouter,
    PowerOfTwoRouter,
    RoundRobinRouter,
    Router,
    SessionRouter,
)
from forge_contract.scaling import Decision, Limits, Observation, PolicyState, ScalingPolicy, ThresholdPolicy
from forge_contract.value_mesh import ValueMesh

__all__ = [
    "ActorEndpoint",
    "ActorHandle",
    "AddressInUse",
    "AutoscalingConfig",
    "BadCall",
    "BatchError",
    "BrokerLost",
    "BrokerUnreachable",
    "CallCancelled",
    "CallTimeout",
    "ConfigError",
    "ConsistentHashRouter",
    "Decision",
    "FanoutError",
    "ForgeActor",
    "ForgeError",
    "LeastLoadedRouter",
    "Limits",
    "NoHealthyReplicas",
    "Observation",
    "OutcomeUnknown",
    "Overloaded",
    "PayloadTooLarge",
    "PoisonedRequest",
    "PolicyState",
    "PowerOfTwoRouter",
    "ProtocolError",
    "RemoteError",
    "ReplicaLost",
    "RoundRobinRouter",
    "Router",
    "RouterError",
    "ScalingPolicy",
    "SerializationError",
    "Service",
    "ServiceConfig",
    "ServiceEndpoint",
    "ServiceStopped",
    "Session",
    "SessionClosed",
    "SessionError",
    "SessionLost",
    "SessionRouter",
    "StartFailed",
    "ThresholdPolicy",
    "TrustRequired",
    "UnknownEndpoint",
    "UnknownService",
    "UnknownSession",
    "ValueMesh",
    "VersionMismatch",
    "connect",
    "current_request",
    "current_session",
    "endpoint",
    "get_service",
    "service_endpoint",
    "shutdown",
]
