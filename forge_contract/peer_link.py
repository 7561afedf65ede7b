"""The peer's half of a link: hello, welcome, *who are you*, and a channel in between (PROTOCOL.md §4, §5). No I/O.

`forge_client.link` and `forge_worker.link` build their conversations on it; their shells move frames between it and a socket:

    for frames in socket: link.receive(frames, now)      # app messages go to `on_envelope`
    for frames in link.flush(now): socket.send(frames)   # once per turn of the loop
    sleep until link.next_deadline()

What is put into `outbox` waits for the welcome. A new epoch (the broker does not know us, or is another one) empties
the outbox and the channel: what it means for what was under way is for `on_lost` to say.
"""

from __future__ import annotations

import enum
from typing import Any, Final

from forge_contract.channel import Channel, Due, Verdict
from forge_contract.errors import ForgeError, ProtocolError, VersionMismatch, from_wire
from forge_contract.framing import Envelope, Frame, Outbox, Payload, decode, encode, weigh
from forge_contract.messages import BROKER_NAME, BYE, HELLO, PROBE, REFUSE, WELCOME, WHO

HELLO_AGAIN_S: Final = 1.0
# Having heard nothing for so long we ask: a broker that took us for dead meanwhile has no reason to say so by itself, and
# we might wait for an answer for ever.
ASK_AFTER_S: Final = 5.0


class LinkState(enum.Enum):
    GREETING = "greeting"
    OPEN = "open"
    CLOSED = "closed"


class PeerLink:
    """Subclass it, give `hello_fields` (and `hello_payloads`, where they name some), and override the `on_…` methods."""

    def __init__(self, name: str, now: float) -> None:
        self.name = name
        self.state = LinkState.GREETING
        self.incarnation = 0
        self.outbox = Outbox()
        self.channel = Channel()
        self.refused_envelopes = 0  # of another epoch or incarnation, or no envelopes at all
        self._hello_due = now
        self._ask_due = now  # once the link is open
        self._ready: list[list[Frame]] = []  # to be sent again, before anything new
        self._leaving = False  # bye was said

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name} {self.state.value} {self.channel!r}>"

    # What a subclass says.

    def hello_fields(self) -> dict[str, Any]:
        """The fields of HELLO, with what is held (`holds`, `declares`)."""
        raise NotImplementedError

    def hello_payloads(self) -> list[Payload]:
        """The payloads that `holds` or `declares` name, in their order. Asked right after `hello_fields`."""
        return []

    def on_welcome(self, fields: dict[str, Any], now: float) -> None:
        """The link is open. Comes once per epoch."""

    def on_lost(self, now: float) -> None:
        """The broker we were welcomed by no longer knows us, or is gone: nothing under way will be answered by it."""

    def on_sealed(self, number: int, size: int) -> None:
        """What was in an outbox is envelope `number` of this epoch now, of `size` bytes."""

    def on_refused(self, error: ForgeError, now: float) -> None:
        """The broker will not have us; the link is closed."""

    def on_envelope(self, envelope: Envelope, now: float) -> None:
        """An envelope in order, exactly once."""

    def send_first(self, outbox: Outbox, now: float) -> None:
        """Seal these now, as an envelope before all that waits in our own outbox. For `on_welcome`."""
        if len(outbox):
            self._ready.append(self._seal(outbox, now))

    # What the shell calls.

    def receive(self, frames: list[Frame], now: float) -> None:
        """Take one envelope from the socket. Nonsense is dropped and counted: the transport has other ways to hurt us."""
        try:
            envelope = decode(frames)
        except VersionMismatch as error:
            self.refused_envelopes += 1
            if self.state is LinkState.GREETING:
                # A refusal comes in the refuser's version (PROTOCOL.md §5): unread, it still says all there is to say.
                self.state = LinkState.CLOSED
                self.on_refused(error, now)
            return
        except ProtocolError:
            self.refused_envelopes += 1
            return
        if envelope.sender != BROKER_NAME or self.state is LinkState.CLOSED:
            self.refused_envelopes += 1
            return
        self._ask_due = now + ASK_AFTER_S
        if envelope.epoch not in (self.channel.epoch, 0):  # 0: a refusal by one that could not read our epoch
            self.refused_envelopes += 1
            return
        if self.state is LinkState.GREETING:
            self._greeted(envelope, now)
            return
        if envelope.incarnation != self.incarnation and not self._asks_who(envelope):
            # The broker's successor asks who we are when it hears from us; whatever else it says is not for us.
            self.refused_envelopes += 1
            return
        asked = self.channel.probing
        self.channel.acknowledged(envelope.ack, now)
        if envelope.number:
            if self.channel.accept(envelope.number, now) is Verdict.DELIVER:
                self.on_envelope(envelope, now)
            return
        if not envelope.body:
            if asked:
                self.channel.probing = False
                self._ready.extend(self.channel.kept_after(envelope.ack))
            return
        self._unnumbered(envelope, now)

    def reconnected(self, now: float) -> None:
        """The socket has a new connection: what was in the old one's pipes is gone, and our routing id is another."""
        if self.state is LinkState.OPEN:
            self._probe()
        elif self.state is LinkState.GREETING:
            self._hello_due = now

    def flush(self, now: float) -> list[list[Frame]]:
        """Everything to be sent now, at most one new numbered envelope among it."""
        if self.state is LinkState.GREETING and self._hello_due <= now:
            self._hello_due = now + HELLO_AGAIN_S
            return [self._hello()]
        if self.state is not LinkState.OPEN:
            return []
        due = self.channel.due(now)
        if due is Due.PROBE or self._ask_due <= now:
            self._ask_due = now + ASK_AFTER_S
            self._probe()
        ready, self._ready = self._ready, []
        if len(self.outbox):
            ready.append(self._seal(self.outbox, now))
        elif due is Due.ACK:
            ready.append(self._unnumbered_frames([]))
        return ready

    def next_deadline(self) -> float | None:
        """When to call `flush` again though nothing came in; None: not before something does."""
        if self.state is LinkState.GREETING:
            return self._hello_due
        if self.state is not LinkState.OPEN:
            return None
        due = self.channel.next_deadline()
        return self._ask_due if due is None else min(due, self._ask_due)

    def bye(self, reason: str) -> None:
        """Leave on purpose with the next flush; the shell then lingers and calls `close`."""
        if self.state is LinkState.OPEN:
            self._leaving = True
            self.outbox.body.append([BYE, reason])

    def close(self) -> None:
        self.state = LinkState.CLOSED

    # Inside.

    def _greeted(self, envelope: Envelope, now: float) -> None:
        for message in envelope.body:
            if message[0] == WELCOME and len(message) == 2 and isinstance(message[1], dict):
                self.incarnation = envelope.incarnation
                self.state = LinkState.OPEN
                self.on_welcome(message[1], now)
            elif message[0] == REFUSE:
                self._refused(message, now)
            else:
                self.refused_envelopes += 1

    def _asks_who(self, envelope: Envelope) -> bool:
        return any(message[0] in (WHO, REFUSE) for message in envelope.body)

    def _unnumbered(self, envelope: Envelope, now: float) -> None:
        for message in envelope.body:
            if message[0] == WHO and self._leaving:
                # The goodbye has arrived and we are forgotten, which is what it asked for; a hello would bring us back.
                self.channel = Channel(self.channel.epoch + 1)
                self.state = LinkState.CLOSED
                return
            if message[0] == WHO:
                self._begin_again(now)
                return
            if message[0] == REFUSE:
                self._refused(message, now)
                return
            if message[0] == PROBE:
                self.channel.owe_ack(now)
            elif message[0] != WELCOME:  # a second welcome answers a hello that was sent twice
                self.refused_envelopes += 1

    def _begin_again(self, now: float) -> None:
        self.channel = Channel(self.channel.epoch + 1)
        self.outbox = Outbox()
        self._ready = []
        self.state = LinkState.GREETING
        self._hello_due = now
        self.on_lost(now)

    def _refused(self, message: list[Any], now: float) -> None:
        self.state = LinkState.CLOSED
        self.on_refused(from_wire(message[1:3]), now)

    def _probe(self) -> None:
        self.channel.probing = True
        self._ready.append(self._unnumbered_frames([[PROBE]]))

    def _seal(self, outbox: Outbox, now: float) -> list[Frame]:
        channel = self.channel
        number = channel.next_number()
        frames = outbox.seal(self.name, channel.epoch, self.incarnation, number, channel.received)
        size = len(frames[0]) if len(frames) == 1 else weigh(frames)
        channel.keep(frames, size, now)
        self.on_sealed(number, size)
        return frames

    def _hello(self) -> list[Frame]:
        """A hello is made anew each time: what is held may have become another since the last."""
        hello = Outbox()
        fields = self.hello_fields()
        hello.body.append([HELLO, fields, [hello.attach(payload) for payload in self.hello_payloads()]])
        return hello.seal(self.name, self.channel.epoch, self.incarnation, 0, self.channel.received)

    def _unnumbered_frames(self, body: list[list[Any]]) -> list[Frame]:
        channel = self.channel
        return encode(self.name, channel.epoch, self.incarnation, 0, channel.received, body)
