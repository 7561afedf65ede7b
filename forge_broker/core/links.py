"""The broker's half of a link to one peer: its route, its channel, and what is to go to it at the end of this turn.

`clients` and `workers` build on it. Numbering is `channel`'s; what to do with an envelope is `broker`'s.
"""

from __future__ import annotations

from typing import Any

from forge_broker.core.events import Route
from forge_contract.channel import Channel
from forge_contract.framing import Frame, Outbox, encode, weigh
from forge_contract.messages import BROKER_NAME, Message


class Link:
    """One peer. `vitals`: what its last heartbeat said."""

    role = "peer"

    __slots__ = (
        "channel",
        "delivering",
        "heard_at",
        "hello",
        "incarnation",
        "name",
        "outbox",
        "route",
        "timer_at",
        "trusted",
        "vitals",
        "watched",
    )

    def __init__(
        self, name: str, route: Route, trusted: bool, epoch: int, hello: dict[str, Any], incarnation: int, now: float
    ) -> None:
        self.name = name
        self.route = route
        self.trusted = trusted
        self.hello = hello
        self.incarnation = incarnation  # the broker's own
        self.channel = Channel(epoch)
        self.outbox = Outbox()
        self.delivering = False  # a Deliver action is out for it in this turn
        self.heard_at = now
        self.watched = False  # the kernel will tell of its death
        self.vitals: dict[str, Any] = {}
        self.timer_at = float("inf")  # when the deadline heap will look at its channel

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name} {self.channel!r}>"

    def post(self, message: Message) -> None:
        self.outbox.body.append(message)

    def before_sealing(self) -> None:
        """Shorten the columns of what was gathered. Overridden by those that gather columns."""

    def pack(self, now: float) -> list[Frame]:
        """Seal the outbox into one numbered envelope, and keep it until it is acknowledged."""
        self.before_sealing()
        channel = self.channel
        number = channel.next_number()
        frames = self.outbox.seal(BROKER_NAME, channel.epoch, self.incarnation, number, channel.received)
        channel.keep(frames, weigh(frames), now)
        return frames

    def unnumbered(self, body: list[Message]) -> list[Frame]:
        return encode(BROKER_NAME, self.channel.epoch, self.incarnation, 0, self.channel.received, body)
