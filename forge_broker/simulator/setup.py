"""What is simulated: a service as a client deploys it, the calls to it, and the model of what it takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from forge_broker.simulator.model import ServiceModel
from forge_broker.simulator.traces import Trace
from forge_contract.config import ServiceConfig
from forge_contract.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What is simulated. `spec`: the service as a client deploys it (PROTOCOL.md §7.1), `endpoint`: which of it is called."""

    spec: Mapping[str, Any]
    endpoint: str
    trace: Trace
    model: ServiceModel
    interruptible: bool = True  # a call whose caller has gone ends at once, as that of an `async def`
    sessions: int = 0  # that the calls are spread over at random; 0: none
    timeout_s: float | None = None  # of each call
    seed: int = 0
    sample_s: float | None = None  # an interval of the figures; None: 240 of them
    unpickle: Callable[[bytes], Any] | None = None  # routers and policies that come by value
    load: Callable[[str, list[str]], Any] | None = None  # policies that come by name


def as_simulated(setup: Setup) -> tuple[dict[str, Any], ServiceConfig, list[str]]:
    """The spec as it is deployed here, its configuration, and what is different from the real one: a replica is one process without
    GPUs, whatever it really is, because all its ranks act as one. Raises ConfigError."""
    spec, notes = dict(setup.spec), list[str]()
    given = ServiceConfig.from_wire(spec["config"])
    config = given.replace(
        procs=1, hosts=None, with_gpus=False, gpus_per_replica=None, replica_max_concurrent_requests=given.concurrency
    )
    if given.world > 1:
        notes.append(f"a replica of {given.world} ranks is simulated, and paid for, as one")
    if given.warm_spares or given.preload:
        config = config.replace(warm_spares=0, preload=False)
        notes.append("a start takes start_s, whether out of a spare, forked, or neither; spares are not paid for")
    if spec.get("exports"):
        spec["exports"] = False
        config = config.replace(on_session_loss="restart")
        notes.append("sessions move without the time that their state takes")
    names = [one["name"] for one in spec["endpoints"]]
    if setup.endpoint not in names:
        raise ConfigError(where="simulation", message=f"no endpoint {setup.endpoint!r}; there is {', '.join(names)}")
    endpoints = []
    for one in spec["endpoints"]:
        options = dict(one["options"])
        if options.get("batch_key") or options.get("batch_weight"):
            options |= {"batch_key": None, "batch_weight": None, "batch_max_weight": None}
            notes.append(f"{one['name']}: all calls have the same batch_key and batch_weight")
        endpoints.append({**one, "options": options})
    return {**spec, "config": config.to_wire(), "endpoints": endpoints}, config, notes
