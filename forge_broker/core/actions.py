"""What the broker wants done. `Broker.handle` and `Broker.tick` return these; the shell carries them out."""

from __future__ import annotations

from functools import partial
from typing import Any, Final, NamedTuple

from forge_broker.core.events import Route


class Send(NamedTuple):
    """Send these frames now: the unnumbered envelopes of a link (welcome, refusal, who are you, acks), and resends."""

    route: Route
    frames: list[Any]


class Deliver(NamedTuple):
    """This peer has something in its outbox. Once per peer and turn; the shell calls `Broker.pack` when its sockets are empty."""

    name: str


class Preload(NamedTuple):
    """What a process has to import to fork workers of this service."""

    service: int
    label: str  # for its output
    source: dict[str, Any]  # PROTOCOL.md §7, WARM
    on_gpus: bool  # its workers will see some


class Launch(NamedTuple):
    """Start a worker process on this machine with these GPUs. Its hello will carry the launch's number."""

    launch: int
    gpus: tuple[str, ...]
    label: str  # "Class/replica.rank", for its output
    preload: Preload | None = None  # forked, if that can be; a Preloaded tells whether


class Unload(NamedTuple):
    """No worker of this service will be forked any more."""

    service: int


class Label(NamedTuple):
    """What a launched process has become: for its output from now on."""

    launch: int
    label: str


class Kill(NamedTuple):
    """End a launched process now."""

    launch: int


class KillPeer(NamedTuple):
    """End a watched peer's process now; it was started by hand on this machine."""

    name: str


class Watch(NamedTuple):
    """Hold this process by a pidfd, if it is on this machine and what it says it is."""

    name: str
    host: str
    pid: int
    pid_namespace: int
    started: int


class Look(NamedTuple):
    """See whether this silent peer of this machine is stopped, and say so by a Stopped (F1)."""

    name: str
    pid: int


class Unlink(NamedTuple):
    """Remove what this peer has left in shared memory."""

    owner: str


class Sweep(NamedTuple):
    """Remove what anybody has left there but these."""

    living: frozenset[str]


class Note(NamedTuple):
    """A line for the log."""

    level: str  # "debug", "info", "warning", "error"
    event: str
    fields: dict[str, Any]


class Exit(NamedTuple):
    """All is stopped: the shell may end."""


# By the tuple's own `__new__`, one of each for every envelope: the named one takes its fields one by one, in Python.
send: Final = partial(tuple.__new__, Send)
deliver: Final = partial(tuple.__new__, Deliver)

Action = Send | Deliver | Launch | Unload | Label | Kill | KillPeer | Watch | Look | Unlink | Sweep | Note | Exit
