"""Envelopes to frames and back (PROTOCOL.md §2). Pure: no socket, no clock.

`Outbox` gathers what a sender has for one peer during one turn of its loop and seals it into one envelope; `decode`
reads one. What the messages mean is in `messages` and with the parties; what a payload means, in `payload`: here
it is some bytes, or some frames. Numbering and acknowledgement are the business of `channel`, which hands us the numbers.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Final, NamedTuple, cast

import msgpack

from forge_contract.errors import ProtocolError, VersionMismatch
from forge_contract.messages import CALLS, DISPATCH, REPLIES, RESULTS, VERSION, Message

MAX_MESSAGES: Final = 1 << 16
MAX_DEPTH: Final = 64  # msgpack reads deeper than it writes, so what came in could not always be passed on

_FLAT: Final = frozenset({CALLS, DISPATCH, REPLIES, RESULTS})  # the hot ones: whoever reads them checks their columns
_RANGES: Final = (("epoch", 1 << 32), ("incarnation", 1 << 64), ("number", 1 << 63), ("ack", 1 << 63))
_in_range: Final = struct.Struct("<IQqq").pack  # raises unless all fit: one step of Python's instead of twenty
_INT: Final = frozenset({int})  # and no bool, which would pass for a number

# What travels as a frame of its own; the broker relays it as it came (a zmq.Frame), so all we ask of it is `len`.
Frame = Any
Payload = bytes | list[Frame]


class Envelope(NamedTuple):
    """One envelope as received. `payloads` reads the frames in the order in which the messages name them."""

    sender: str
    epoch: int
    incarnation: int
    number: int
    ack: int
    body: list[Message]
    payloads: Payloads


# By the tuple's own `__new__`: the named one takes its fields one by one, in Python, which is a tenth of reading a short envelope.
_envelope: Final = partial(tuple.__new__, Envelope)


class Payloads:
    """Takes payloads out of the frames of an envelope, in order."""

    __slots__ = ("_at", "_large", "_next", "_packed")

    def __init__(self, packed: bytes, large: Sequence[Frame]) -> None:
        self._packed = packed
        self._at = 0
        self._large = large
        self._next = 0

    def take(self, size: int) -> Payload:
        if size >= 0:
            start = self._at
            self._at = end = start + size
            if end > len(self._packed):
                raise ProtocolError(f"a payload of {size} bytes, but {len(self._packed) - start} are left")
            return self._packed[start:end]
        first = self._next
        self._next = end = first - size
        if end > len(self._large):
            raise ProtocolError(f"a payload of {-size} frames, but {len(self._large) - first} are left")
        return list(self._large[first:end])

    def take_all(self, sizes: Sequence[int]) -> list[Payload]:
        """The payloads of a column, all small ones in one pass: this is the hot path."""
        packed = self._packed
        at = self._at
        count = len(sizes)
        if count > 1 and type(sizes) is list and (size := sizes[0]) > 0 and sizes.count(size) == count:
            # As results and arguments of a fixed shape are: a third of the loop's time.
            self._at = end = at + size * count
            if end > len(packed):
                raise ProtocolError(f"payloads of {end} bytes in {len(packed)}")
            return [*struct.unpack_from(f"{size:d}s" * count, packed, at)]
        found: list[Payload] = []
        for size in sizes:
            if size >= 0:
                end = at + size
                found.append(packed[at:end])
                at = end
            else:
                found.append(self.take(size))
        if at > len(packed):
            raise ProtocolError(f"payloads of {at} bytes in {len(packed)}")
        self._at = at
        return found

    def take_packed(self, sizes: Sequence[int]) -> bytes:
        """The payloads of a column whose items are all small, side by side as they came. Raises ProtocolError."""
        start = self._at
        self._at = end = start + sum(sizes)
        if end > len(self._packed):
            raise ProtocolError(f"payloads of {end - start} bytes, but {len(self._packed) - start} are left")
        return self._packed[start:end]

    def close(self) -> None:
        """Sizes must add up: bytes that no message names are a sign of a confused peer."""
        if self._at != len(self._packed) or self._next != len(self._large):
            raise ProtocolError(
                f"{len(self._packed) - self._at} bytes and {len(self._large) - self._next} frames that no message names"
            )


class Taken(Payloads):
    """Payloads that were taken out of their envelope before, one after another, to be taken again by who acts on its message."""

    __slots__ = ("_taken",)

    def __init__(self, taken: list[Payload]) -> None:
        super().__init__(b"", ())
        self._taken = taken

    def take(self, size: int) -> Payload:
        return self._taken.pop(0)

    def take_all(self, sizes: Sequence[int]) -> list[Payload]:
        return [self.take(size) for size in sizes]

    def take_packed(self, sizes: Sequence[int]) -> bytes:
        return b"".join(cast(list[bytes], self.take_all(sizes)))


class Outbox:
    """What one sender has for one peer in this turn: messages and payloads, until `seal`."""

    __slots__ = ("_large", "_packed", "body")

    def __init__(self) -> None:
        self.body: list[Message] = []
        self._packed: list[bytes] = []
        self._large: list[Frame] = []

    def __len__(self) -> int:
        return len(self.body)

    def attach(self, payload: Payload) -> int:
        """Add a payload; returns the size that its message must name. Attach in the order of the messages."""
        if isinstance(payload, bytes):
            self._packed.append(payload)
            return len(payload)
        self._large.extend(payload)
        return -len(payload)

    def attach_all(self, payloads: Sequence[Payload]) -> Iterable[int]:
        """`attach` for a column; where all are small, which is the hot path, without a call for each."""
        if list in set(map(type, payloads)):
            return [self.attach(payload) for payload in payloads]
        self._packed += cast(Sequence[bytes], payloads)
        return map(len, payloads)

    def attach_packed(self, packed: bytes) -> None:
        """Small payloads that are side by side already; the message names the size of each."""
        self._packed.append(packed)

    def seal(self, sender: str, epoch: int, incarnation: int, number: int, ack: int) -> list[Frame]:
        """The frames of the envelope; the outbox is empty afterwards."""
        frames = encode(sender, epoch, incarnation, number, ack, self.body, b"".join(self._packed), self._large)
        self.body = []
        self._packed = []
        self._large = []
        return frames


_pack = msgpack.Packer(use_bin_type=True, autoreset=True).pack


def encode(
    sender: str,
    epoch: int,
    incarnation: int,
    number: int,
    ack: int,
    body: list[Message],
    packed: bytes = b"",
    large: Sequence[Frame] = (),
) -> list[Frame]:
    return [_pack([VERSION, sender, epoch, incarnation, number, ack, body, packed]), *large]


def weigh(frames: Iterable[Frame]) -> int:
    """Bytes of all frames."""
    return sum(map(len, frames))


def _is_shallow(value: Any, depth: int) -> bool:
    if not isinstance(value, (list, dict)):
        return True
    inner = value if isinstance(value, list) else value.values()
    return depth > 0 and all(_is_shallow(one, depth - 1) for one in inner)


def _wrong_header(header: Any) -> ProtocolError | VersionMismatch:
    """What is wrong with it. `decode` has seen that something is, by means that are quick and say nothing."""
    if not isinstance(header, list) or not header:
        return ProtocolError("a header that is no array")
    if header[0] != VERSION:
        return VersionMismatch(ours=VERSION, theirs=header[0] if isinstance(header[0], int) else "something else")
    if len(header) != 8:
        return ProtocolError(f"a header of {len(header)} fields instead of 8")
    if not (isinstance(header[1], str) and 0 < len(header[1]) <= 64):
        return ProtocolError("a sender that is no name")
    name, limit = next(
        (name, limit)
        for (name, limit), value in zip(_RANGES, header[2:6], strict=True)
        if type(value) is not int or not 0 <= value < limit
    )
    return ProtocolError(f"{name} is no number from 0 to {limit - 1}")


def decode(frames: Sequence[Frame]) -> Envelope:
    """Read an envelope. The first frame is bytes, the others whatever the socket gave.

    Raises ProtocolError for what is no envelope, VersionMismatch for one of another version.
    """
    if not frames:
        raise ProtocolError("an envelope without a frame")
    head = frames[0]
    try:
        header = msgpack.unpackb(head, use_list=True, strict_map_key=False, raw=False)
    except (
        ValueError,
        TypeError,
        RecursionError,
        msgpack.UnpackException,
    ) as error:  # TypeError: a map with an array as key
        raise ProtocolError(f"a header that is no msgpack: {error}") from error
    try:
        version, sender, epoch, incarnation, number, ack, body, packed = header
        _in_range(epoch, incarnation, number, ack)
    except (TypeError, ValueError, struct.error):
        raise _wrong_header(header) from None
    if not (
        version == VERSION
        and type(sender) is str
        and 0 < len(sender) <= 64
        and _INT.issuperset(map(type, header[2:6]))
        and number >= 0 <= ack
    ):
        raise _wrong_header(header)
    if type(packed) is not bytes:
        raise ProtocolError("packed payloads that are no bytes")
    if not isinstance(body, list) or len(body) > MAX_MESSAGES:
        raise ProtocolError("a body that is no array of messages, or too long a one")
    for message in body:
        if type(message) is not list or not message or type(message[0]) is not int:
            raise ProtocolError("a message that is no array with its type first")
        if message[0] not in _FLAT and not _is_shallow(message, MAX_DEPTH):
            raise ProtocolError(f"a message nested deeper than {MAX_DEPTH}")
    return _envelope((sender, epoch, incarnation, number, ack, body, Payloads(packed, frames[1:])))
