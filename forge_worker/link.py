"""The worker's side of the conversation with its broker (PROTOCOL.md §7). No I/O, no clock: `now` is an argument.

`receive` turns envelopes into instructions, which whoever carries them out takes with `take()`; what comes of them goes
back by `warmed`, `master`, `ready`, `unready`, `reply`, `states`, and leaves with the next `flush`. `runtime` is one that carries out, with
a socket and an actor; a simulation with neither is another.

The link knows which calls run, which sessions it has served, and what was replied of late, because a broker that does
not know us asks for that (§8): in the recovery window the replies that no caller may have are sent again first, and
then whatever comes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from itertools import compress, repeat
from types import NoneType
from typing import Any, Final, NamedTuple

from forge_contract.errors import ForgeError, ProtocolError
from forge_contract.framing import Envelope, Frame, Outbox, Payload, encode
from forge_contract.messages import (
    ASSIGN,
    BEGIN,
    DISPATCH,
    DROP,
    FORGET,
    HEARTBEAT,
    IMPORT,
    MASTER,
    READY,
    RECALL,
    REPLAY,
    REPLIES,
    RESIZED,
    SETTLED,
    STATES,
    STOP,
    UNREADY,
    WARM,
    WARMED,
    column,
    spread,
)
from forge_contract.peer_link import LinkState, PeerLink
from forge_contract.segments import Terms
from forge_worker.assignment import Assignment, Source
from forge_worker.kept import Columns, KeptReplies
from forge_worker.served import Served

_SESSION: Final = frozenset({str, NoneType})
PRUNE_FROM: Final = 1024  # batches; below it, looking for those that are over is not worth it


class Assign(NamedTuple):
    """Become this rank. Comes once in a worker's life."""

    assignment: Assignment
    arguments: Payload  # of the constructor


class Warm(NamedTuple):
    """Be a spare: import this class, and wait. Comes before Assign, if at all."""

    source: Source


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
    batches: list[int] | None = None  # their sizes, in order; None: no batches

    def only(self, chosen: slice | list[bool]) -> Run:
        """Some of these calls, which are in no batches."""
        columns: tuple[list[Any], ...] = (self.ids, self.attempts, self.payloads, self.sessions, self.by_client)
        if isinstance(chosen, slice):
            return Run(self.method, self.trusted, *(column[chosen] for column in columns))
        return Run(self.method, self.trusted, *(list(compress(column, chosen)) for column in columns))


class Drop(NamedTuple):
    """Nobody waits for these any more. Answer each once it has ended."""

    ids: list[int]


class Recall(NamedTuple):
    """Give back what cannot begin yet."""


class Stop(NamedTuple):
    """Finish what runs, give back what has not started, tear down, leave."""

    reason: str
    grace_s: float
    replace: bool  # whether a supervisor shall start another worker in our place


class Replay(NamedTuple):
    """Call this endpoint after `setup`, and count it in the next READY (A11). In order."""

    method: int
    trusted: bool
    payload: Payload


class Import(NamedTuple):
    """The state of a session that lived elsewhere, to be imported before its next call (S3)."""

    session: str
    trusted: bool
    payload: Payload


class Forget(NamedTuple):
    """These sessions have ended, or live elsewhere."""

    sessions: list[str]


class Welcomed(NamedTuple):
    """The link is open, for the first time or again. `recovering`: by a broker that had lost us and takes us as we are;
    it wants the states of our sessions."""

    fields: Mapping[str, Any]
    recovering: bool


class Refused(NamedTuple):
    """The broker will not have us; the link is closed."""

    error: ForgeError


Instruction = Assign | Warm | Begin | Run | Drop | Recall | Stop | Replay | Import | Forget | Welcomed | Refused


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
        self.served = Served()
        self._clock = now  # when we were told the time last
        self.kept = KeptReplies()
        # Nanoseconds of the loop for each call that began, and ended, with those replied to in this turn; 0: not known.
        self.cost = 0
        self.refused_messages = 0  # of a form we do not know, or for an epoch that is not ours
        self.trusted = False  # the trust of our own address, which our replies are encoded by
        self.segments: Terms | None = None  # on which large arrays may go by shared memory
        self._identity = dict(identity)
        self._gpus = list(gpus)
        self._labels = dict(labels or {})
        self._launch = launch
        self._instructions: list[Instruction] = []
        self._arguments: Payload = b""  # of the constructor
        self._has_setup = False  # READY was said
        self._batches: list[list[int]] = []  # ids of those that run, and of some that have
        self._prune_at = PRUNE_FROM
        self._ids: list[int] = []
        self._attempts: list[int] = []
        self._statuses: list[int] = []
        self._payloads: list[Payload] = []
        self._states: dict[str, Payload] = {}
        self._failure: tuple[ForgeError | None, Payload | None] | None = None
        self._gathered: Columns | None = None  # in the outbox, to be kept once we know its number

    # What carries out the instructions says.

    def take(self) -> list[Instruction]:
        """What has come since the last time, in order."""
        taken, self._instructions = self._instructions, []
        return taken

    def warmed(self) -> None:
        """The class is imported."""
        self.outbox.body.append([WARMED])

    def master(self, addr: str, port: int) -> None:
        """Rank 0's choice of where the ranks meet."""
        self.outbox.body.append([MASTER, addr, port])

    def ready(self, played: int = 0) -> None:
        """`setup` and so many replays are over. Said again after each later replay."""
        self._has_setup = True
        self.outbox.body.append([READY, played])

    def unready(self, error: ForgeError | None, exception: Payload | None = None) -> None:
        """The start failed, or the process is broken (F6), by an error of ours or a user's exception. It leaves behind
        the replies so far."""
        self._failure = error, exception

    def states(self, session: str, state: Payload) -> None:
        """A checkpoint (S3): the session after all its calls replied to so far. It leaves with these replies."""
        self._states[session] = state

    def reply(self, request: int, attempt: int, status: int, payload: Payload) -> None:
        """How a call ended. Gathered: all replies of a turn leave as one message."""
        if self.running.pop(request, None) != attempt:
            raise KeyError(f"attempt {attempt} of request {request} is not running here")
        self._ids.append(request)
        self._attempts.append(attempt)
        self._statuses.append(status)
        self._payloads.append(payload)

    def reply_all(self, requests: list[int], attempts: list[int], statuses: list[int], payloads: list[Payload]) -> None:
        """`reply` for many at once."""
        if list(map(self.running.pop, requests, repeat(None))) != attempts:
            raise KeyError(f"of requests {requests!r:.200} some do not run here as these attempts")
        self._ids += requests
        self._attempts += attempts
        self._statuses += statuses
        self._payloads += payloads

    def bye(self, reason: str) -> None:
        if self.state is LinkState.OPEN:
            self._gather()
        super().bye(reason)

    def heartbeat(self, fields: Mapping[str, Any]) -> list[Frame] | None:
        """The frames of a heartbeat, None while nobody has welcomed us. May be called in the heartbeat's thread: it
        reads, and acknowledges nothing."""
        if not self.incarnation:
            return None
        return encode(self.name, self.channel.epoch, self.incarnation, 0, 0, [[HEARTBEAT, dict(fields)]])

    def flush(self, now: float) -> list[list[Frame]]:
        self._clock = now
        if self.state is LinkState.OPEN:  # until then it stays gathered: what was kept goes first
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

    def hello_payloads(self) -> list[Payload]:
        return [] if self.assignment is None else [self._arguments]

    def on_welcome(self, fields: dict[str, Any], now: float) -> None:
        self.trusted = fields.get("trusted") is True
        self.segments = Terms.read(fields.get("segments"))
        recovering = self.assignment is not None and fields.get("recovering") is True
        if recovering:
            kept = self.kept.take()
            if kept is not None:
                first = Outbox()
                self._put_replies(first, kept)
                self.send_first(first, now)
        else:
            self.kept.clear()  # numbered in an epoch that is over, and nobody will ask
        self._instructions.append(Welcomed(fields, recovering))

    def on_sealed(self, number: int, size: int) -> None:
        if self._gathered is not None:
            self.kept.keep(number, size, self._gathered)
            self._gathered = None

    def on_refused(self, error: ForgeError, now: float) -> None:
        self._instructions.append(Refused(error))

    def on_envelope(self, envelope: Envelope, now: float) -> None:
        self._clock = now
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
        elif kind == RECALL:
            self._instructions.append(Recall())
        elif kind == ASSIGN:
            _, fields, size = message
            self._assigned(fields, envelope.payloads.take(size))
        elif kind == WARM:
            self._instructions.append(Warm(Source.read(message[1])))
        elif kind == BEGIN:
            _, addr, port = message
            self._instructions.append(Begin(str(addr), int(port)))
        elif kind == STOP:
            _, reason, grace_s, replace = message
            self._instructions.append(Stop(str(reason), float(grace_s), replace is True))
        elif kind == SETTLED:
            self.kept.settled(int(message[1]))
        elif kind == REPLAY:
            _, method, trusted, size = message
            payload = envelope.payloads.take(size)
            self._instructions.append(Replay(self._checked(method), trusted is True, payload))
        elif kind == IMPORT:
            _, session, trusted, size = message
            payload = envelope.payloads.take(size)
            self.served.used([str(session)], self._clock)
            self._instructions.append(Import(str(session), trusted is True, payload))
        elif kind == FORGET:
            ended = [str(session) for session in message[1]]
            self.served.forget(ended)
            self._instructions.append(Forget(ended))
        elif kind == RESIZED:
            _, wanted, resizes = message
            if self.assignment is not None:
                deed = {**self.assignment.deed, "wanted": wanted, "resizes": resizes}
                self.assignment = dataclasses.replace(self.assignment, deed=deed)
        else:
            raise ProtocolError(f"message {kind} to a worker")

    def _assigned(self, fields: Any, arguments: Payload) -> None:
        if self.assignment is not None:
            raise ProtocolError("assigned twice")
        try:
            self.assignment = Assignment.read(fields)
        except ProtocolError as error:
            # The broker waits for READY or UNREADY, so this one has an answer.
            self.unready(error)
            self._instructions.append(Stop(str(error), 0.0, True))
        else:
            self._arguments = arguments
            self.kept.limit = self.assignment.kept_reply_bytes
            self._instructions.append(Assign(self.assignment, arguments))

    def _dispatched(self, message: list[Any], envelope: Envelope) -> None:
        _, epoch, method, trusted, ids, attempts, sizes, columns = message
        payloads = envelope.payloads.take_all(sizes)
        count = len(ids)
        if self.assignment is None or epoch != self.assignment.epoch or len(payloads) != count:
            self.refused_messages += 1
            return
        self._checked(method)
        attempts = spread(attempts, count)
        session = columns.get("session")
        sessions = spread(session, count)
        if not _SESSION.issuperset(map(type, sessions)):
            raise ProtocolError("a dispatch with a session of another type")
        by_client = spread(columns.get("client", False), count)
        batches = columns.get("batches")
        if batches is not None and (set(map(type, batches)) != {int} or min(batches) < 1 or sum(batches) != count):
            raise ProtocolError(f"batches of {batches!r:.80} in a dispatch of {count}")
        if session is not None:
            self.served.used(sessions, self._clock)
        if batches is not None:
            self._keep_batches(ids, batches)
        self.running.update(zip(ids, attempts, strict=True))  # last: what cannot be read does not run
        self._instructions.append(Run(method, trusted is True, ids, attempts, payloads, sessions, by_client, batches))

    def _keep_batches(self, ids: list[int], sizes: list[int]) -> None:
        """Remember which calls take their room together; now and then forget those that are over, once for many."""
        if len(self._batches) >= self._prune_at:
            self._batches = self._running_batches()
            self._prune_at = 2 * len(self._batches) + PRUNE_FROM
        at = 0
        for size in sizes:
            self._batches.append(ids[at : at + size])
            at += size

    def _running_batches(self) -> list[list[int]]:
        return [batch for batch in self._batches if not self.running.keys().isdisjoint(batch)]

    def _checked(self, method: int) -> int:
        count = 0 if self.assignment is None else len(self.assignment.endpoints)
        if not 0 <= method < count:
            raise ProtocolError(f"a call of method {method} of {count}")
        return method

    def _gather(self) -> None:
        if self._ids:
            self._gathered = Columns(self._ids, self._attempts, self._statuses, self._payloads)
            self._ids, self._attempts, self._statuses, self._payloads = [], [], [], []
            self._put_replies(self.outbox, self._gathered)
        if self._states:
            sessions = list(self._states)
            self.outbox.body.append([STATES, sessions, [self.outbox.attach(one) for one in self._states.values()]])
            self._states = {}
        if self._failure is not None:
            error, exception = self._failure
            size = 0 if exception is None else self.outbox.attach(exception)
            self.outbox.body.append([UNREADY, None if error is None else error.to_wire(), size])
            self._failure = None

    def _put_replies(self, outbox: Outbox, replies: Columns) -> None:
        assert self.assignment is not None
        self._gathered = replies
        ids, attempts, statuses, payloads = replies
        sizes = list(outbox.attach_all(payloads))
        message = [REPLIES, self.assignment.epoch, ids, column(attempts), column(statuses), sizes]
        if self.cost:
            message.append(self.cost)
            self.cost = 0
        outbox.body.append(message)

    def _holds(self) -> dict[str, Any] | None:
        held = self.assignment
        if held is None:
            return None
        return {
            "deed": held.deed,
            "replica": held.replica,
            "epoch": held.epoch,
            "rank": held.rank,
            "ready": self._has_setup,
            "running": [[request, attempt] for request, attempt in self.running.items()],
            "batches": self._running_batches(),
            "replies": bool(self.kept or self._ids),
            "sessions": self.served.ages(self._clock),
        }
