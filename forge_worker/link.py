"""The worker's side of the conversation with its broker (PROTOCOL.md §7). No I/O, no clock: `now` is an argument.

`receive` turns envelopes into instructions, which whoever carries them out takes with `take()`; what comes of them goes
back by `master`, `ready`, `unready`, `reply`, and leaves with the next `flush`. `runtime` is one that carries out, with
a socket and an actor; a simulation with neither is another.

The link knows which calls run, because a broker that does not know us asks for that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from forge_contract.errors import ForgeError, ProtocolError
from forge_contract.framing import Envelope, Frame, Payload, encode
from forge_contract.messages import (
    ASSIGN,
    BEGIN,
    DISPATCH,
    DROP,
    HEARTBEAT,
    MASTER,
    READY,
    REPLIES,
    SETTLED,
    STOP,
    UNREADY,
    column,
    spread,
)
from forge_contract.peer_link import PeerLink
from forge_worker.assignment import Assignment


class Assign(NamedTuple):
    """Become this rank. Comes once in a worker's life."""

    assignment: Assignment
    arguments: Payload  # of the constructor


class Begin(NamedTuple):
    """Rank 0 has chosen where the ranks meet."""

    addr: str
    port: int


class Run(NamedTuple):
    """Calls of one endpoint, in the order in which they are to start where order is promised."""

    method: int
    trusted: bool  # the stamp for decoding the arguments (W6)
    ids: list[int]
    attempts: list[int]
    payloads: list[Payload]
    sessions: list[str | None]
    by_client: list[bool]  # calls of one client start in this order


class Drop(NamedTuple):
    """Nobody waits for these any more. Answer each once it has ended."""

    ids: list[int]


class Stop(NamedTuple):
    """Finish what runs, give back what has not started, tear down, leave."""

    reason: str
    grace_s: float


class Welcomed(NamedTuple):
    """The link is open, for the first time or again."""

    fields: Mapping[str, Any]


class Refused(NamedTuple):
    """The broker will not have us; the link is closed."""

    error: ForgeError


Instruction = Assign | Begin | Run | Drop | Stop | Welcomed | Refused


class WorkerLink(PeerLink):
    """See PeerLink for what a shell does with it. `identity` is what HELLO says of every process: host, pid, …"""

    def __init__(
        self,
        name: str,
        now: float,
        *,
        identity: Mapping[str, Any],
        gpus: tuple[str, ...] = (),
        labels: Mapping[str, str] | None = None,
        launch: int = 0,
    ) -> None:
        super().__init__(name, now)
        self.assignment: Assignment | None = None
        self.running: dict[int, int] = {}  # request id -> attempt, until replied
        self.refused_messages = 0  # of a form we do not know, or for an epoch that is not ours
        self.trusted = False  # the trust of our own address, which our replies are encoded by
        self._identity = dict(identity)
        self._gpus = list(gpus)
        self._labels = dict(labels or {})
        self._launch = launch
        self._instructions: list[Instruction] = []
        self._ids: list[int] = []
        self._attempts: list[int] = []
        self._statuses: list[int] = []
        self._payloads: list[Payload] = []

    # What carries out the instructions says.

    def take(self) -> list[Instruction]:
        """What has come since the last time, in order."""
        taken, self._instructions = self._instructions, []
        return taken

    def master(self, addr: str, port: int) -> None:
        """Rank 0's choice of where the ranks meet."""
        self.outbox.body.append([MASTER, addr, port])

    def ready(self) -> None:
        self.outbox.body.append([READY])

    def unready(self, error: ForgeError | None, exception: Payload | None = None) -> None:
        """The start failed, by an error of ours or a user's exception."""
        self._gather()
        size = 0 if exception is None else self.outbox.attach(exception)
        self.outbox.body.append([UNREADY, None if error is None else error.to_wire(), size])

    def reply(self, request: int, attempt: int, status: int, payload: Payload) -> None:
        """How a call ended. Gathered: all replies of a turn leave as one message."""
        if self.running.pop(request, None) != attempt:
            raise KeyError(f"attempt {attempt} of request {request} is not running here")
        self._ids.append(request)
        self._attempts.append(attempt)
        self._statuses.append(status)
        self._payloads.append(payload)

    def bye(self, reason: str) -> None:
        self._gather()
        super().bye(reason)

    def heartbeat(self, fields: Mapping[str, Any]) -> list[Frame] | None:
        """The frames of a heartbeat, None while nobody has welcomed us. May be called in the heartbeat's thread: it
        reads, and acknowledges nothing."""
        if not self.incarnation:
            return None
        return encode(self.name, self.channel.epoch, self.incarnation, 0, 0, [[HEARTBEAT, dict(fields)]])

    def flush(self, now: float) -> list[list[Frame]]:
        self._gather()
        return super().flush(now)

    # What PeerLink asks.

    def hello_fields(self) -> dict[str, Any]:
        return {
            "role": "worker",
            **self._identity,
            "gpus": self._gpus,
            "labels": self._labels,
            "launch": self._launch,
            "holds": self._holds(),
        }

    def on_welcome(self, fields: dict[str, Any], now: float) -> None:
        self.trusted = fields.get("trusted") is True
        self._instructions.append(Welcomed(fields))

    def on_refused(self, error: ForgeError, now: float) -> None:
        self._instructions.append(Refused(error))

    def on_envelope(self, envelope: Envelope, now: float) -> None:
        try:
            for message in envelope.body:
                self._hear(message, envelope)
            envelope.payloads.close()
        except (ProtocolError, TypeError, ValueError, LookupError, AttributeError, OverflowError):
            # A message of another shape than the specification's: what follows it cannot be matched with its payloads.
            self.refused_messages += 1

    # Inside.

    def _hear(self, message: list[Any], envelope: Envelope) -> None:
        kind = message[0]
        if kind == DISPATCH:
            self._dispatched(message, envelope)
        elif kind == DROP:
            self._instructions.append(Drop([request for request in message[1] if request in self.running]))
        elif kind == ASSIGN:
            _, fields, size = message
            self._assigned(fields, envelope.payloads.take(size))
        elif kind == BEGIN:
            _, addr, port = message
            self._instructions.append(Begin(str(addr), int(port)))
        elif kind == STOP:
            _, reason, grace_s = message
            self._instructions.append(Stop(str(reason), float(grace_s)))
        elif kind != SETTLED:  # it frees kept replies; this release keeps none
            raise ProtocolError(f"message {kind} to a worker")

    def _assigned(self, fields: Any, arguments: Payload) -> None:
        if self.assignment is not None:
            raise ProtocolError("assigned twice")
        try:
            self.assignment = Assignment.read(fields)
        except ProtocolError as error:
            # The broker waits for READY or UNREADY, so this one has an answer.
            self.unready(error)
            self._instructions.append(Stop(str(error), 0.0))
        else:
            self._instructions.append(Assign(self.assignment, arguments))

    def _dispatched(self, message: list[Any], envelope: Envelope) -> None:
        _, epoch, method, trusted, ids, attempts, sizes, columns = message
        payloads = envelope.payloads.take_all(sizes)
        count = len(ids)
        if self.assignment is None or epoch != self.assignment.epoch or len(payloads) != count:
            self.refused_messages += 1
            return
        if not 0 <= method < len(self.assignment.endpoints):
            raise ProtocolError(f"a dispatch to method {method} of {len(self.assignment.endpoints)}")
        attempts = spread(attempts, count)
        sessions = spread(columns.get("session"), count)
        by_client = spread(columns.get("client", False), count)
        self.running.update(zip(ids, attempts, strict=True))  # last: what cannot be read does not run
        self._instructions.append(Run(method, trusted is True, ids, attempts, payloads, sessions, by_client))

    def _gather(self) -> None:
        if not self._ids:
            return
        assert self.assignment is not None
        attach = self.outbox.attach
        sizes = [attach(payload) for payload in self._payloads]
        self.outbox.body.append(
            [REPLIES, self.assignment.epoch, self._ids, column(self._attempts), column(self._statuses), sizes]
        )
        self._ids, self._attempts, self._statuses, self._payloads = [], [], [], []

    def _holds(self) -> dict[str, Any] | None:
        held = self.assignment
        if held is None:
            return None
        return {
            "service": held.service,
            "name": held.name,
            "replica": held.replica,
            "epoch": held.epoch,
            "rank": held.rank,
            "running": [[request, attempt] for request, attempt in self.running.items()],
            "finished": [],
            "sessions": [],
        }
