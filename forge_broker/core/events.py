"""What can happen to the broker. The shell turns frames, dead processes and failed launches into these; `Broker.handle` takes them.

The grain of `Received` is an envelope, not a request (C2): one event may carry hundreds of calls.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Final, NamedTuple

Route = tuple[int, bytes]
"""Where a peer is reached: which of the broker's addresses, and the routing id ZeroMQ gave the connection."""


class Received(NamedTuple):
    """An envelope came in. `frames` without the routing id: header, large ones."""

    route: Route
    frames: list[Any]


received: Final = partial(
    tuple.__new__, Received
)  # what it costs to name the fields is paid for every envelope otherwise


class Unroutable(NamedTuple):
    """The connection behind this route is gone: an envelope could not be sent."""

    route: Route


class Watched(NamedTuple):
    """The kernel will tell when this peer's process ends, so its silence means nothing (F1)."""

    name: str


class ProcessGone(NamedTuple):
    """The process of a watched peer has ended."""

    name: str


class Stopped(NamedTuple):
    """The process of a silent peer, looked at because of a Look, is stopped (state T)."""

    name: str


class LaunchEnded(NamedTuple):
    """A process the scaler launched has ended, or could not be started (`why` says which)."""

    launch: int
    why: str  # "exit code 1", "signal SIGKILL", "could not be started: …"
    last_lines: list[str]


class Preloaded(NamedTuple):
    """Workers of this service are forked from now on; or they cannot be, and are started the ordinary way."""

    service: int
    why: str  # they cannot be; "": they can


class Stalled(NamedTuple):
    """A turn of the loop took so long that it is worth telling: everybody waited meanwhile, for a router perhaps (R4)."""

    seconds: float


class Terminate(NamedTuple):
    """Somebody wants the broker to end: stop everything it runs, then ask the shell to exit."""

    why: str


Event = Received | Unroutable | Watched | ProcessGone | Stopped | LaunchEnded | Preloaded | Stalled | Terminate
