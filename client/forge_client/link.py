"""The client's side of the conversation, without I/O (PROTOCOL.md §7): calls and controls out, results and notices in.

`client` gives it a loop, a socket and futures; a simulation gives it a listener of its own and a virtual clock. Calls of
one turn are gathered in runs, one message for each endpoint, and become columns when the turn is flushed. What a
result means is for the listener: the link hands it payloads and the *waiter* that was given with the call. How calls become
columns, and what is kept of them until they are answered, is in `outgoing`.

Order (A6): a call with an `order` (its session, its actor) never gets into a run that stands before an earlier call of
the same order; fan-outs and controls close all open runs, so nothing overtakes a weight update or the opening of its session.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Final, NamedTuple, Protocol

from forge_client.outgoing import Extras, Item, Plain, Run, Sent, payload_bytes
from forge_contract.channel import PROBE_AFTER_S
from forge_contract.errors import ForgeError, Overloaded, ProtocolError
from forge_contract.framing import MAX_MESSAGES, Envelope, Frame, Payload, Payloads
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
    spread,
)
from forge_contract.payload import LARGE
from forge_contract.peer_link import LinkState, PeerLink
from forge_contract.segments import Terms

# An envelope is sealed when it has so many bytes: what follows may be worked on while it still travels.
ENVELOPE_BYTES: Final = 16 << 20
CALLS_A_MESSAGE: Final = 4096
RETRY_AFTER_S: Final = 0.1  # a link at its limit drains in about as long: it is the age at which an ack is paid


class Declared(NamedTuple):
    """What of the client hangs on its broker, for a successor that knows nothing (PROTOCOL.md §5, `declares`)."""

    services: list[dict[str, Any]]  # deeds
    sessions: list[list[Any]]  # [service, session, hints, used]
    payloads: list[Payload]  # the constructor's arguments for each deed, then those of each replay
    replays: list[int] = []  # noqa: RUF012 - endpoints whose last fan-out newcomers are to have (A11)


class Listener(Protocol):
    """Who is told what came in. A waiter is whatever was given with the call; None when it was cancelled."""

    def welcomed(self, fields: dict[str, Any]) -> None: ...
    def refused(self, error: ForgeError) -> None: ...
    def lost(self, waiters: list[Any], controls: list[Any]) -> None:
        """The broker does not know us any more: these will not be answered."""
        ...

    def unsure(self, waiters: list[Any]) -> None:
        """The broker died while these fan-outs ran. Its successor goes on with everything else."""
        ...

    def declares(self) -> Declared | None:
        """None when nothing hangs on the broker."""
        ...

    def results(self, trusted: bool, waiters: list[Any], statuses: list[int], payloads: list[Payload]) -> None: ...
    def parts(
        self, trusted: bool, waiter: Any, points: list[list[int]], statuses: list[int], payloads: list[Payload]
    ) -> None: ...
    def answer(self, waiter: Any, ok: bool, fields: dict[str, Any], payload: Payload | None) -> None: ...
    def notice(self, topic: str, fields: dict[str, Any]) -> None: ...


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
        self.segments: Terms | None = None  # on which large arrays may go by shared memory
        self.welcomes = 0
        self.refused_replies = 0  # of calls that are not ours, or have been answered
        self.unanswered: dict[int, Any] = {}  # sequence → waiter, None when cancelled
        self._identity = hello
        self._detached = detached
        self._listener = listener
        self._sequence = 0
        self._control_number = 0
        self._controls: dict[int, Any] = {}
        self.sent = Sent(self.unanswered, self._controls)
        self._held = False
        self._ask_at: float | None = None  # while held, and connected again: when to probe once more
        self._declared: Declared | None = None  # by the last hello
        self._next_turn()

    def _next_turn(self) -> None:
        self._turn: list[Item] = []
        self._cancels: list[int] = []
        self._turn_bytes = 0
        self._close_runs()

    def _close_runs(self) -> None:
        self._open: dict[int, Run] = {}  # endpoint → where its last call went
        self._shaped: dict[tuple[int, int], Run] = {}  # endpoint, call shape (B2) → the same
        self._last: dict[Hashable, int] = {}

    # What the client says.

    def submit(
        self,
        endpoint: int,
        payload: Payload,
        waiter: Any,
        extras: Extras | None = None,
        order: Hashable | None = None,
        shape: int = 0,
        session: str | None = None,
    ) -> int:
        """Call an endpoint once; returns the sequence number. `shape`: see `batching`; a session is an order as well. Raises Overloaded
        when the link's credit is used up."""
        size = len(payload) if type(payload) is bytes else payload_bytes(payload)
        self._turn_bytes += size
        if self._turn_bytes + self.channel.kept_bytes > self.link_bytes:
            self._refuse_or_bear(size)
        self._sequence = seq = self._sequence + 1
        run = self._open.get(endpoint)
        if run is None or len(run.seqs) == CALLS_A_MESSAGE or run.shape != shape:
            run = self._run_of(endpoint, shape)
        if session is not None or order is not None:
            behind = order if session is None else session
            if self._last and self._last.get(behind, 0) > run.place:
                run = self._new_run(endpoint, shape)
            if run.place:  # before the first run there is nothing to get into
                self._last[behind] = run.place
        if run.sessions is not None:
            run.sessions.append(session)
        elif session is not None:
            run.begin_sessions(session)
        if extras is not None or run.extras is not None:
            run.add_extras(extras)
        run.seqs.append(seq)
        run.payloads.append(payload)
        self.unanswered[seq] = waiter
        return seq

    def _run_of(self, endpoint: int, shape: int) -> Run:
        """Another than the last one. Calls whose shapes take turns are a run for each shape all the same: a message for each
        call would cost as much as one for hundreds, and what is in different messages the broker does not batch at once."""
        run = self._shaped.get((endpoint, shape))
        if run is None or len(run.seqs) == CALLS_A_MESSAGE:
            return self._new_run(endpoint, shape)
        self._open[endpoint] = run
        return run

    def _new_run(self, endpoint: int, shape: int) -> Run:
        run = self._open[endpoint] = self._shaped[endpoint, shape] = Run(CALLS, endpoint, len(self._turn), shape)
        self._turn.append(run)
        return run

    def fanout(self, endpoint: int, payload: Payload, waiter: Any, extras: Extras | None = None) -> int:
        """Call an endpoint on every replica that is healthy when the broker reads this."""
        self._take_credit(payload)
        self._sequence = seq = self._sequence + 1
        run = Run(FANOUT, endpoint, len(self._turn))
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
        self._turn.append(Plain([CONTROL, self._control_number, op, fields], payload))
        self._close_runs()
        return self._control_number

    def bye(self, reason: str) -> None:
        if self.state is LinkState.OPEN:
            self._held = False  # there is no later turn to wait for
            self._turn.append(Plain([BYE, reason]))

    def _take_credit(self, payload: Payload) -> None:
        size = payload_bytes(payload)
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

    # The broker is away.

    @property
    def heard(self) -> bool:
        """Whether the broker that welcomed us is there, as far as can be known."""
        return self.state is LinkState.OPEN and not self._held

    def disconnected(self, now: float) -> None:
        """The connection broke. What is said from now on is held until whoever answers next has shown who it is: a
        call given to the socket would reach a successor as one that may have run already, which an at-most-once call
        does not survive. What was said a moment before is in that doubt, and rightly so."""
        if self.state is LinkState.OPEN:
            self._held = True
            self._ask_at = None

    def reconnected(self, now: float) -> None:
        super().reconnected(now)
        if self._held:
            self._ask_at = now + PROBE_AFTER_S

    def _hold_on(self, now: float) -> bool:
        """Whether what is said has to wait on; asks who is there, again and again."""
        if self._ask_at is None:
            return True
        if not self.channel.probing:
            self._held = False
            self._drop_cancelled()
            return False
        if self._ask_at <= now:
            self._probe()
            self._ask_at = now + PROBE_AFTER_S
        return True

    def _drop_cancelled(self) -> None:
        """Calls that were given up before they were ever sent are not sent at all."""
        unanswered = self.unanswered
        unsaid = [seq for item in self._turn if isinstance(item, Run) for seq in item.seqs]
        given_up = {seq for seq in unsaid if unanswered.get(seq) is None}
        if given_up:
            rest = [item.left(unanswered) if isinstance(item, Run) else item for item in self._turn]
            self._turn = [item for item in rest if item is not None]
            self._cancels = [seq for seq in self._cancels if seq not in given_up]
            self._close_runs()
            self.sent.never_said(len(given_up))
            for seq in given_up:
                del unanswered[seq]

    def next_deadline(self) -> float | None:
        deadline = super().next_deadline()
        if self._held and self._ask_at is not None and self.state is LinkState.OPEN:
            return self._ask_at if deadline is None else min(deadline, self._ask_at)
        return deadline

    def flush(self, now: float) -> list[list[Frame]]:
        if self.state is not LinkState.OPEN or (self._held and self._hold_on(now)):
            return super().flush(now)
        if not (self._turn or self._cancels):
            return super().flush(now)
        turn, cancels = self._turn, self._cancels
        self.sent.keep(turn, self._turn_bytes, self._said)
        self._next_turn()
        if cancels:
            turn = [*turn, Plain([CANCEL, cancels])]
        outbox, ready, weight = self.outbox, [], 0
        for one in turn:
            outbox.body.append(one.message(outbox, now))
            if type(one) is Run:
                weight += sum(map(len, one.payloads))
            if len(outbox) == MAX_MESSAGES or weight > ENVELOPE_BYTES:
                ready.extend(super().flush(now))
                weight = 0
        ready.extend(super().flush(now))
        return ready

    @property
    def _said(self) -> int:
        """Calls and controls so far."""
        return self._sequence + self._control_number

    # What the broker says.

    def hello_fields(self) -> dict[str, Any]:
        # Before its first welcome a client has nothing that any broker could have known.
        declared = self._listener.declares() if self.welcomes else None
        # What was given up is not said again: a broker would wait for it as long as it can.
        waiting = bool(self._controls) or any(waiter is not None for waiter in self.unanswered.values())
        if declared is None and self.welcomes and waiting:
            declared = Declared([], [], [])
        self._declared = declared
        return {
            **self._identity,
            "role": "client",
            "client": self.client,
            "detached": self._detached,
            "declares": None
            if declared is None
            else {
                "services": declared.services,
                "sessions": declared.sessions,
                "replays": declared.replays,
                "waiting": waiting,
            },
        }

    def hello_payloads(self) -> list[Payload]:
        return [] if self._declared is None else self._declared.payloads

    def on_welcome(self, fields: dict[str, Any], now: float) -> None:
        before, self.client = self.client, int(fields.get("client") or 0)
        self.trusted = fields.get("trusted") is True
        self.max_payload_bytes = int(fields.get("max_payload_bytes") or self.max_payload_bytes)
        self.link_bytes = int(fields.get("link_bytes") or self.link_bytes)
        self.segments = Terms.read(fields.get("segments"))
        self.welcomes += 1
        self._held = False
        self._declared = None
        unsure: list[Any] = []
        if self.welcomes > 1:
            # Under another client id our calls would be strangers to the workers that run them.
            if fields.get("recovering") is True and self.client == before:
                unsure = self._say_again()
            else:
                self._listener.lost(*self.give_up())
        self._listener.welcomed(fields)
        if unsure:
            self._listener.unsure(unsure)

    def on_refused(self, error: ForgeError, now: float) -> None:
        self._listener.refused(error)

    def _say_again(self) -> list[Any]:
        """Put what was said to the last broker, and is unanswered, before what is to be said next (F10). Controls and
        calls keep their order: a session's first call never overtakes its opening. Returns the waiters of fan-outs."""
        self._drop_cancelled()
        again, fanouts, size = self.sent.take(self._said)
        waiters = [self.unanswered.pop(seq) for seq in fanouts]
        for seq in [seq for seq, waiter in self.unanswered.items() if waiter is None]:
            del self.unanswered[seq]  # cancelled: nobody will answer what is not asked again
        self._cancels = []
        self._turn = [*again, *self._turn]
        self._turn_bytes += size
        self._close_runs()
        return waiters

    def give_up(self) -> tuple[list[Any], list[Any]]:
        """The waiters of all calls and controls that are unanswered; they are forgotten here."""
        waiters = [waiter for waiter in self.unanswered.values() if waiter is not None]
        controls = list(self._controls.values())
        self.unanswered.clear()
        self._controls.clear()
        self.sent.forget(self._said)
        self._next_turn()
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
            if self.sent.kept_bytes > LARGE and not unanswered and not self._controls:
                self.sent.forget(self._said)  # a caller of one large call after another need not have two in memory
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
