"""The client's side of the conversation, without I/O (PROTOCOL.md §7): calls and controls out, results and notices in.

`client` gives it a loop, a socket and futures; a simulation gives it a listener of its own and a virtual clock. Calls of
one turn are gathered in runs, one message for each endpoint, and become columns when the turn is flushed. What a
result means is for the listener: the link hands it payloads and the *waiter* that was given with the call.

Order (A6): a call with an `order` (its session, its actor) never gets into a run that stands before an earlier call of
the same order; fan-outs and controls close all open runs, so nothing overtakes a weight update or the opening of its session.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Final, NamedTuple, Protocol

from forge_contract.errors import ForgeError, Overloaded, ProtocolError
from forge_contract.framing import MAX_MESSAGES, Envelope, Frame, Outbox, Payload, Payloads, weigh
from forge_contract.messages import (
    ANSWER,
    BYE,
    CALLS,
    CANCEL,
    CONTROL,
    FANOUT,
    NOTICE,
    PARTS,
    RESULTS,
    Message,
    column,
    spread,
)
from forge_contract.peer_link import LinkState, PeerLink

# An envelope is sealed when it has so many bytes: what follows may be worked on while it still travels.
ENVELOPE_BYTES: Final = 16 << 20
CALLS_A_MESSAGE: Final = 4096
RETRY_AFTER_S: Final = 0.1  # a link at its limit drains in about as long: it is the age at which an ack is paid


class Extras(NamedTuple):
    """What a call may say beside its arguments; None instead of it when everything is default."""

    deadline: float | None = None  # of the link's clock; travels as seconds remaining
    session: str | None = None
    priority: int = 0
    hints: dict[str, Any] | None = None
    rank: int | None = None


class Listener(Protocol):
    """Who is told what came in. A waiter is whatever was given with the call; None when it was cancelled."""

    def welcomed(self, fields: dict[str, Any]) -> None: ...
    def refused(self, error: ForgeError) -> None: ...
    def lost(self, waiters: list[Any], controls: list[Any]) -> None:
        """The broker does not know us any more: these will not be answered."""
        ...

    def results(self, trusted: bool, waiters: list[Any], statuses: list[int], payloads: list[Payload]) -> None: ...
    def parts(
        self, trusted: bool, waiter: Any, points: list[list[int]], statuses: list[int], payloads: list[Payload]
    ) -> None: ...
    def answer(self, waiter: Any, ok: bool, fields: dict[str, Any], payload: Payload | None) -> None: ...
    def notice(self, topic: str, fields: dict[str, Any]) -> None: ...


class _Run:
    """Consecutive calls of one endpoint on their way into one message."""

    __slots__ = ("endpoint", "extras", "kind", "payloads", "place", "seqs")

    def __init__(self, kind: int, endpoint: int, place: int) -> None:
        self.kind = kind
        self.endpoint = endpoint
        self.place = place
        self.seqs: list[int] = []
        self.payloads: list[Payload] = []
        self.extras: list[Extras | None] | None = None

    def message(self, outbox: Outbox, now: float) -> Message:
        sizes = [outbox.attach(payload) for payload in self.payloads]
        columns = _columns(self.extras, now) if self.extras is not None else {}
        if self.kind == FANOUT:
            return [FANOUT, self.endpoint, self.seqs[0], sizes[0], columns]
        return [CALLS, self.endpoint, self.seqs, sizes, columns]


class _Plain:
    """A message with at most one payload."""

    __slots__ = ("body", "payload")

    def __init__(self, body: Message, payload: Payload | None = None) -> None:
        self.body = body
        self.payload = payload

    def message(self, outbox: Outbox, now: float) -> Message:
        return self.body if self.payload is None else [*self.body, outbox.attach(self.payload)]


_NOTHING_EXTRA: Final = Extras()


def _columns(extras: list[Extras | None], now: float) -> dict[str, Any]:
    rows = [extra or _NOTHING_EXTRA for extra in extras]
    wanted: dict[str, list[Any]] = {
        "timeout": [None if row.deadline is None else max(0.0, row.deadline - now) for row in rows],
        "session": [row.session for row in rows],
        "priority": [row.priority for row in rows],
        "hints": [row.hints for row in rows],
        "rank": [row.rank for row in rows],
    }
    # An item that says nothing is nil, and a column of such items is left out; 0 is the default of priority alone.
    return {
        name: column(values)
        for name, values in wanted.items()
        if any(value is not None if name != "priority" else value for value in values)
    }


_UNKNOWN: Final = object()


class ClientLink(PeerLink):
    """`hello` are the fields of `identity.hello_identity()`. `detached`: nothing ends with this client but its sessions."""

    def __init__(
        self, name: str, now: float, *, hello: dict[str, Any], listener: Listener, detached: bool = False
    ) -> None:
        super().__init__(name, now)
        self.client = 0
        self.trusted = False
        self.max_payload_bytes = 1 << 30  # the defaults of BrokerConfig, until the welcome tells
        self.link_bytes = 1 << 30
        self.welcomes = 0
        self.refused_replies = 0  # of calls that are not ours, or have been answered
        self.unanswered: dict[int, Any] = {}  # sequence → waiter, None when cancelled
        self._hello = hello
        self._detached = detached
        self._listener = listener
        self._sequence = 0
        self._control_number = 0
        self._controls: dict[int, Any] = {}
        self._forget()

    def _forget(self) -> None:
        self._turn: list[_Run | _Plain] = []
        self._cancels: list[int] = []
        self._turn_bytes = 0
        self._close_runs()

    def _close_runs(self) -> None:
        self._open: dict[int, _Run] = {}
        self._last: dict[Hashable, int] = {}

    # What the client says.

    def submit(
        self,
        endpoint: int,
        payload: Payload,
        waiter: Any,
        extras: Extras | None = None,
        order: Hashable | None = None,
    ) -> int:
        """Call an endpoint once; returns the sequence number. Raises Overloaded when the link's credit is used up."""
        size = len(payload) if type(payload) is bytes else weigh(payload)
        self._turn_bytes += size
        if self._turn_bytes + self.channel.kept_bytes > self.link_bytes:
            self._refuse_or_bear(size)
        self._sequence = seq = self._sequence + 1
        run = self._open.get(endpoint)
        if (
            run is None
            or len(run.seqs) == CALLS_A_MESSAGE
            or (order is not None and self._last.get(order, 0) > run.place)
        ):
            run = self._open[endpoint] = _Run(CALLS, endpoint, len(self._turn))
            self._turn.append(run)
        if order is not None:
            self._last[order] = run.place
        if extras is not None and run.extras is None:
            run.extras = [None] * len(run.seqs)
        if run.extras is not None:
            run.extras.append(extras)
        run.seqs.append(seq)
        run.payloads.append(payload)
        self.unanswered[seq] = waiter
        return seq

    def fanout(self, endpoint: int, payload: Payload, waiter: Any, extras: Extras | None = None) -> int:
        """Call an endpoint on every replica that is healthy when the broker reads this."""
        self._take_credit(payload)
        self._sequence = seq = self._sequence + 1
        run = _Run(FANOUT, endpoint, len(self._turn))
        run.seqs.append(seq)
        run.payloads.append(payload)
        if extras is not None:
            run.extras = [extras]
        self._turn.append(run)
        self._close_runs()
        self.unanswered[seq] = waiter
        return seq

    def cancel(self, seq: int) -> None:
        """Nobody waits for this call any more. Does nothing when it was answered."""
        if self.unanswered.get(seq) is not None:
            self.unanswered[seq] = None
            self._cancels.append(seq)

    def control(self, op: str, fields: dict[str, Any], payload: Payload, waiter: Any) -> int:
        """Ask for something; the one answer goes to `waiter`."""
        self._take_credit(payload)
        self._control_number += 1
        self._controls[self._control_number] = waiter
        self._turn.append(_Plain([CONTROL, self._control_number, op, fields], payload))
        self._close_runs()
        return self._control_number

    def bye(self, reason: str) -> None:
        if self.state is LinkState.OPEN:
            self._turn.append(_Plain([BYE, reason]))

    def _take_credit(self, payload: Payload) -> None:
        size = len(payload) if type(payload) is bytes else weigh(payload)
        self._turn_bytes += size
        if self._turn_bytes + self.channel.kept_bytes > self.link_bytes:
            self._refuse_or_bear(size)

    def _refuse_or_bear(self, size: int) -> None:
        """Past the limit. One payload that is larger than the whole credit goes when it is alone, or it never would."""
        if self._turn_bytes - size + self.channel.kept_bytes > 0:
            self._turn_bytes -= size
            raise Overloaded(
                what="the link to the broker",
                limit_name="link_bytes",
                limit=self.link_bytes,
                retry_after_s=RETRY_AFTER_S,
            )

    def flush(self, now: float) -> list[list[Frame]]:
        if self.state is not LinkState.OPEN or not (self._turn or self._cancels):
            return super().flush(now)
        turn, cancels = self._turn, self._cancels
        self._forget()
        if cancels:
            turn.append(_Plain([CANCEL, cancels]))
        outbox, ready, weight = self.outbox, [], 0
        for one in turn:
            outbox.body.append(one.message(outbox, now))
            if type(one) is _Run:
                weight += sum(map(len, one.payloads))
            if len(outbox) == MAX_MESSAGES or weight > ENVELOPE_BYTES:
                ready.extend(super().flush(now))
                weight = 0
        ready.extend(super().flush(now))
        return ready

    # What the broker says.

    def hello_fields(self) -> dict[str, Any]:
        # A client of this release fails what was unanswered when its broker is lost, so it has nothing to declare.
        return {**self._hello, "role": "client", "client": self.client, "detached": self._detached, "declares": None}

    def on_welcome(self, fields: dict[str, Any], now: float) -> None:
        self.welcomes += 1
        self.client = int(fields.get("client") or 0)
        self.trusted = fields.get("trusted") is True
        self.max_payload_bytes = int(fields.get("max_payload_bytes") or self.max_payload_bytes)
        self.link_bytes = int(fields.get("link_bytes") or self.link_bytes)
        self._listener.welcomed(fields)

    def on_refused(self, error: ForgeError, now: float) -> None:
        self._listener.refused(error)

    def on_lost(self, now: float) -> None:
        self._listener.lost(*self.give_up())

    def give_up(self) -> tuple[list[Any], list[Any]]:
        """The waiters of all calls and controls that are unanswered; they are forgotten here."""
        waiters = [waiter for waiter in self.unanswered.values() if waiter is not None]
        controls = list(self._controls.values())
        self.unanswered.clear()
        self._controls.clear()
        self._forget()
        return waiters, controls

    def on_envelope(self, envelope: Envelope, now: float) -> None:
        for message in envelope.body:
            try:
                deliver = self._read(message, envelope.payloads)
            except (ProtocolError, ValueError, TypeError, AttributeError, OverflowError):
                # The broker's nonsense. What follows in this envelope cannot be told apart from it any more.
                self.refused_envelopes += 1
                return
            deliver[0](*deliver[1:])

    def _read(self, message: Message, payloads: Payloads) -> tuple[Any, ...]:
        """A message as a call of the listener: reading is guarded against nonsense, the listener is not."""
        kind = message[0]
        if kind == RESULTS:
            _, trusted, seqs, statuses, sizes = message
            taken = payloads.take_all(sizes)
            statuses = spread(statuses, len(seqs))
            if not len(seqs) == len(statuses) == len(taken):
                raise ProtocolError("results with columns of different lengths")
            unanswered = self.unanswered
            before, pop = len(unanswered), self.unanswered.pop
            waiters = [pop(seq, None) for seq in seqs]
            self.refused_replies += len(waiters) - (before - len(unanswered))  # those that were not there
            return self._listener.results, trusted is True, waiters, statuses, taken
        if kind == PARTS:
            _, trusted, seq, points, statuses, sizes = message
            taken = payloads.take_all(sizes)
            statuses = spread(statuses, len(points))
            if not len(points) == len(statuses) == len(taken):
                raise ProtocolError("parts with columns of different lengths")
            points = [[int(replica), int(rank)] for replica, rank in points]
            waiter = self.unanswered.pop(seq, _UNKNOWN)
            if waiter is _UNKNOWN:
                self.refused_replies += 1
                waiter = None
            return self._listener.parts, trusted is True, waiter, points, statuses, taken
        if kind == ANSWER:
            _, number, ok, fields, size = message
            payload = payloads.take(size) if size else None
            waiter = self._controls.pop(number, None)
            return self._listener.answer, waiter, ok is True, dict(fields or {}), payload
        if kind == NOTICE:
            _, topic, fields = message
            return self._listener.notice, str(topic), dict(fields)
        raise ProtocolError(f"a client was sent a message of type {kind}")
