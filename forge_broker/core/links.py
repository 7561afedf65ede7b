"""The broker's half of a link to one peer: its route, its channel, and what is to go to it at the end of this turn.

`clients` and `workers` build on it. Numbering is `channel`'s; what to do with an envelope is `broker`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from forge_broker.core.events import Route
from forge_contract.channel import Channel
from forge_contract.framing import Frame, Outbox, encode, weigh
from forge_contract.messages import BROKER_NAME, Message, column
from forge_contract.segments import is_handle


class Segments(Protocol):
    """The shared memory of this machine, as far as we have to do with it (PROTOCOL.md §9.1)."""

    id: str  # as hellos name it
    prefix: str

    def read(self, frame: Frame) -> Frame:
        """The buffer that a handle stands for; never raises."""


class Link:
    """One peer. `vitals`: what its last heartbeat said.

    What goes to a peer in quantity is gathered in `group`, a message of columns at the end of the outbox that is still open.
    """

    role = "peer"
    constant_field = (
        0  # of the group: the column that is mostly one value, and shortened to it when the group is closed
    )

    __slots__ = (
        "channel",
        "delivering",
        "group",
        "heard_at",
        "hello",
        "incarnation",
        "name",
        "outbox",
        "route",
        "timer_at",
        "trusted",
        "unshared",
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
        self.group: Message | None = None
        self.delivering = False  # a Deliver action is out for it in this turn
        self.heard_at = now
        # For a peer that does not see our shared memory: what gives it the buffers that handles of others stand for.
        self.unshared: Callable[[Frame], Frame] | None = _as_it_is
        self.watched = False  # the kernel will tell of its death
        self.vitals: dict[str, Any] = {}
        self.timer_at = float("inf")  # when the deadline heap will look at its channel

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name} {self.channel!r}>"

    def post(self, message: Message) -> None:
        """A message of its own."""
        self.close_group()
        self.outbox.body.append(message)

    def open_group(self, message: Message) -> Message:
        """A message whose columns the caller goes on to fill, until the next one or the end of the turn."""
        self.post(message)
        self.group = message
        return message

    def close_group(self) -> None:
        if self.group is not None:
            self.group[self.constant_field] = column(self.group[self.constant_field])
            self.group = None

    def pack(self, now: float) -> list[Frame]:
        """Seal the outbox into one numbered envelope, and keep it until it is acknowledged."""
        self.close_group()
        channel = self.channel
        number = channel.next_number()
        frames = self.outbox.seal(BROKER_NAME, channel.epoch, self.incarnation, number, channel.received)
        if len(frames) > 1 and self.unshared is not None:
            frames[1:] = [self.unshared(frame) if is_handle(frame) else frame for frame in frames[1:]]
        channel.keep(frames, len(frames[0]) if len(frames) == 1 else weigh(frames), now)
        return frames

    def unnumbered(self, body: list[Message]) -> list[Frame]:
        return encode(BROKER_NAME, self.channel.epoch, self.incarnation, 0, self.channel.received, body)


def _as_it_is(frame: Frame) -> Frame:
    return frame
