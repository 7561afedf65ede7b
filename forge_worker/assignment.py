"""What a worker is told to become (ASSIGN, PROTOCOL.md §7), read once into a frozen value, and its environment.

The environment is pure here, two dicts; `runtime` puts them in place before it lets any code of the user in, because
torch looks at CUDA_VISIBLE_DEVICES once, when it is first used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from forge_contract.errors import ProtocolError


@dataclass(frozen=True)
class EndpointSpec:
    """One endpoint. A DISPATCH names it by its place in the assignment."""

    name: str
    threads: int  # for a plain `def`: calls at once off the loop
    takes_lists: bool  # batch_mode "call": the method gets a list per argument and returns a list
    stacks: bool = False  # collate "stack": arrays come and go as one, with a first dimension more

    @classmethod
    def read(cls, fields: Any) -> Self:
        if not isinstance(fields, dict) or not isinstance(fields.get("name"), str):
            raise ProtocolError(f"an endpoint of an assignment has no name: {fields!r:.80}")
        options = fields.get("options") or {}
        threads = options.get("threads", 1)
        if not isinstance(threads, int) or threads < 1:
            raise ProtocolError(f"threads of endpoint {fields['name']!r} is {threads!r:.40}")
        takes_lists = options.get("batch_mode") == "call"
        return cls(fields["name"], threads, takes_lists, takes_lists and options.get("collate") == "stack")


@dataclass(frozen=True)
class Source:
    """Where the class comes from."""

    name: str  # the service's
    class_name: str
    target: Mapping[str, Any]  # {"ref": "module:qualname"} or {"code": bytes}
    path: tuple[str, ...]  # the client's sys.path
    cwd: str | None  # and its working directory
    trusted: bool  # how the client that deployed it came in (W6)
    gpus: tuple[str, ...]  # the replica's GPUs on this host, in local rank order

    @property
    def label(self) -> str:
        """How people see who imports it."""
        return f"a spare of {self.name}"

    def environment(self) -> dict[str, str]:
        """What has to be there before the import. No GPU is an empty list, not none."""
        return {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus)}

    @classmethod
    def fields(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Those of ours, checked. Raises ProtocolError, naming the field."""
        cwd = fields.get("cwd")
        return {
            "name": _field(fields, "name", str),
            "class_name": _field(fields, "class_name", str),
            "target": _field(fields, "target", dict),
            "path": tuple(entry for entry in fields.get("path") or () if isinstance(entry, str)),
            "cwd": cwd if isinstance(cwd, str) else None,
            "trusted": _field(fields, "trusted", bool),
            "gpus": tuple(str(gpu) for gpu in _field(fields, "gpus", list)),
        }

    @classmethod
    def read(cls, fields: Any) -> Self:
        """Of a WARM message. Raises ProtocolError for what is none."""
        if not isinstance(fields, dict):
            raise ProtocolError(f"what to import is a map, not {type(fields).__name__}")
        return cls(**cls.fields(fields))


@dataclass(frozen=True)
class Assignment(Source):
    """One rank of one replica of one service."""

    service: int
    replica: int
    epoch: int  # of the replica: what is dispatched under another is not for this incarnation
    rank: int
    world: int
    local_rank: int
    local_world: int
    endpoints: tuple[EndpointSpec, ...]
    concurrency: int  # calls at once
    serial: bool  # one call at a time, in dispatch order: collectives must not cross
    max_payload_bytes: int
    checkpoint_every: int  # calls of a session between two exports of it; 0: the class has no hooks for them
    health_poll_rate: float  # seconds between two calls of `health()`
    fatal_errors: tuple[str, ...]  # names of exceptions after which the process counts as broken (F6)
    kept_reply_bytes: int  # of replies kept for a broker's successor (F10)
    deed: Mapping[str, Any]  # by which a broker without memory has the service again; ours to keep, not to read

    @classmethod
    def read(cls, fields: Any) -> Self:
        """Raises ProtocolError, naming the field, for what is no assignment."""
        if not isinstance(fields, dict):
            raise ProtocolError(f"an assignment is a map, not {type(fields).__name__}")
        numbers = {name: _field(fields, name, int) for name in _NUMBERS}
        poll_s = fields.get("health_poll_rate")
        if isinstance(poll_s, bool) or not isinstance(poll_s, (int, float)) or not 0 < poll_s < math.inf:
            raise ProtocolError(f"health_poll_rate of an assignment is {poll_s!r:.80}, no number of seconds")
        if numbers["world"] < 1 or numbers["concurrency"] < 1 or not 0 <= numbers["rank"] < numbers["world"]:
            raise ProtocolError(
                f"rank {numbers['rank']} of {numbers['world']} with concurrency {numbers['concurrency']} cannot be"
            )
        return cls(
            **numbers,
            **cls.fields(fields),
            serial=_field(fields, "serial", bool),
            health_poll_rate=float(poll_s),
            fatal_errors=tuple(str(name) for name in _field(fields, "fatal_errors", list)),
            deed=_field(fields, "deed", dict),
            endpoints=tuple(EndpointSpec.read(one) for one in _field(fields, "endpoints", list)),
        )

    @property
    def label(self) -> str:
        """How people see this rank: `Generator/1.0`."""
        return f"{self.class_name}/{self.replica}.{self.rank}"

    def environment(self) -> dict[str, str]:
        """What torch and torch.distributed read, but the rendezvous (A7)."""
        return {
            **super().environment(),
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world),
        }


def master_environment(addr: str, port: int) -> dict[str, str]:
    """Where the ranks meet, chosen by rank 0 anew for each epoch (A7)."""
    return {"MASTER_ADDR": addr, "MASTER_PORT": str(port)}


_NUMBERS = (
    "service",
    "replica",
    "epoch",
    "rank",
    "world",
    "local_rank",
    "local_world",
    "concurrency",
    "max_payload_bytes",
    "checkpoint_every",
    "kept_reply_bytes",
)


def _field(fields: Mapping[str, Any], name: str, kind: type) -> Any:
    value = fields.get(name)
    if type(value) is not kind:
        raise ProtocolError(f"{name} of an assignment is {value!r:.80}, not {kind.__name__}")
    return value
