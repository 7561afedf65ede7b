"""What one client knows of one service: its endpoints by number, its latest metrics, whether it is over.

Made by `Client.bind` from the broker's description (PROTOCOL.md §7, answer to deploy and find), kept up to date by its
notices, shared by all handles of the service in this loop. Handles come and go; this is the fact behind them.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from forge_client.metrics import Metrics
from forge_client.signature import Matcher
from forge_contract.errors import BrokerLost, ProtocolError, ServiceStopped, UnknownService, from_wire
from forge_contract.framing import Payload

if TYPE_CHECKING:
    from forge_client.client import Client
    from forge_client.session import Session


class Target:
    """One endpoint of a bound service: what a call needs to be judged, addressed and read."""

    __slots__ = (
        "binding",
        "client",
        "id",
        "label",
        "least",
        "matcher",
        "most",
        "name",
        "options",
        "replay_last",
        "timeout",
    )

    def __init__(self, binding: Binding, name: str, number: int, matcher: Matcher, options: dict[str, Any]) -> None:
        self.binding = binding
        self.client = binding.client
        self.name = name
        self.label = f"{binding.name}.{name}"
        self.id = number
        self.matcher = matcher
        self.least = matcher.least
        self.most = matcher.most
        self.options = options  # of the endpoint, as the broker describes them
        self.timeout: float | None = options.get("timeout")
        self.replay_last = options.get("replay_last") is True


class Binding:
    """`over` makes the error that every further call gets; None while the service lives."""

    def __init__(self, client: Client, description: dict[str, Any]) -> None:
        self.client = client
        self.description = description
        self.incarnation = client.incarnation  # the broker's that has the service now; a successor's after a recovery
        self.started_here = False
        # What a broker without memory needs to have the service again, and the constructor's arguments (PROTOCOL.md
        # §7.2). Of services that this client started, and that end with it: nobody else would declare them.
        self.deed: tuple[dict[str, Any], Payload] | None = None
        self.over: Callable[[], Exception] | None = None
        self.sessions: dict[str, Session] = {}
        # Of these, those that no call was made in: they have no state to lose. The few of them, as a call looks here.
        self.unused: set[str] = set()
        # By endpoint the arguments of the last fan-out that every replica has had (A11), oldest first: a broker that comes
        # back plays them to replicas that start later.
        self.replays: dict[int, Payload] = {}
        self._stopping: asyncio.Future[dict[str, Any]] | None = None
        try:
            self.service = int(description["service"])
            # What the service is called among all of all brokers; a recovery changes nothing about it.
            self.key = (self.incarnation, self.service)
            self.name = str(description["name"])
            self.sizes: dict[str, int] = dict(description.get("sizes") or {"procs": 1})
            self.state_epoch = int(description.get("state_epoch") or 0)
            signatures = description.get("signatures") or {}
            options = description.get("options") or {}
            self.targets = {
                name: Target(
                    self,
                    name,
                    int(number),
                    Matcher.from_wire(signatures.get(name)),
                    options.get(name, {}),
                )
                for name, number in description["endpoints"].items()
            }
            self.metrics = Metrics(description.get("metrics"))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ProtocolError(f"a service was described in no known form: {error!r}") from error

    def __repr__(self) -> str:
        return f"<Binding {self.name} service {self.service} {'over' if self.over else 'bound'}>"

    @property
    def world(self) -> int:
        """Ranks of a replica."""
        return math.prod(self.sizes.values())

    @property
    def errors_return(self) -> bool:
        return self.description.get("errors") == "return"

    @property
    def return_first(self) -> bool:
        return self.description.get("return_first") is not False

    @property
    def detached(self) -> bool:
        return self.description.get("detached") is True

    def keep_replay(self, endpoint: int, payload: Payload) -> None:
        self.replays.pop(endpoint, None)
        self.replays[endpoint] = payload

    def declared_sessions(self) -> list[list[Any]]:
        """The sessions of this service that are open here, as a hello declares them."""
        if self.over:
            return []
        unused = self.unused
        return [[self.service, sid, one.hints, sid not in unused] for sid, one in self.sessions.items()]

    def forget_session(self, session: str) -> Session | None:
        """It has ended, or was never open."""
        self.unused.discard(session)
        return self.sessions.pop(session, None)

    def keep_deed(self, spec: dict[str, Any], payload: Payload, *, owner: int, trusted: bool) -> None:
        """Remember how the service was made, for a broker that has forgotten it."""
        ids = self.description["endpoints"]
        deed = {
            "service": self.service,
            "name": self.name,
            "spec": spec,
            "endpoints": [ids[one["name"]] for one in spec["endpoints"]],
            "owner": owner,
            "trusted": trusted,
        }
        self.deed = (deed, payload)

    def learn(self, snapshot: Any) -> Metrics:
        """Take in the broker's latest figures (X4)."""
        self.metrics = Metrics(snapshot)
        return self.metrics

    def notice(self, topic: str, fields: dict[str, Any]) -> None:
        if topic == "metrics":
            self.learn(fields.get("snapshot"))
        elif topic == "restarted":
            # Each such notice is a new state, also from a broker that has not counted the earlier ones.
            self.state_epoch = max(int(fields.get("epoch") or 0), self.state_epoch + 1)
        elif topic == "resized" and self.deed is not None:
            self.deed[0].update(wanted=fields.get("wanted"), resizes=fields.get("resizes"))
        elif topic == "stopped":
            error = fields.get("error")
            why = f": {from_wire(error)}" if error else ""
            self.ended(lambda: ServiceStopped(service=self.name, why=why))

    def ended(self, why: Callable[[], Exception]) -> None:
        if self.over is None:
            self.over = why

    async def stop(self) -> None:
        """Stop the service and wait until its last worker is gone. Calls from now on get ServiceStopped."""
        if self._stopping is None:
            if self.over is not None:
                return
            self._stopping = self.client.control_soon("stop", {"service": self.service})
            self.ended(lambda: ServiceStopped(service=self.name, why=""))
        with contextlib.suppress(UnknownService, ServiceStopped, BrokerLost):  # it is stopped: what was asked for
            # Two may wait for one stop; the first one's cancellation is not the second one's.
            await asyncio.shield(self._stopping)
        self.deed = None
