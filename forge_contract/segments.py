"""Handles: what stands in a payload for memory that stays where it is (PROTOCOL.md §9.1). Pure: no file is touched here.

A payload is a document and its buffers, a frame each. Where both ends see the same shared memory, the sender puts the
buffers into a *segment*, a file in /dev/shm that it owns, and sends a *handle* for each: some sixty bytes that say
where the buffer lies. The number of frames stays what it was, so nothing on the way has to know; who must know (the broker,
for a peer elsewhere) tells a handle by its first byte, with which no document begins, and by its size, which no
buffer is so small as to have.

Who makes and reads segments is `forge_client.segments`, for client and worker alike; the broker's part is
`forge_broker.shell.segments`. The codec is taught to read them by `can_open`, so that it stays without I/O itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import msgpack

from forge_contract.errors import ProtocolError, SegmentLost

DIRECTORY: Final = "/dev/shm"  # noqa: S108 - the place itself, on every Linux
# A segment begins with its generation (u64, little-endian), which its owner counts up with every use: a handle of an
# earlier one is refused. Buffers begin at multiples of this, as no kernel asks for more.
ALIGN: Final = 64

_MAGIC: Final = b"\xc1forge"  # 0xc1 is the one byte that msgpack never uses
_LONGEST: Final = 256
_NAME: Final = re.compile(r"forge-[0-9a-f]{16}-[cw]-[0-9a-f]{16}-[0-9]{1,19}\Z")
_LIMIT: Final = 1 << 63


class Place(NamedTuple):
    """A handle's content: these bytes of this file, as long as it is of this generation. All 0: it was gone before it was sent."""

    name: str
    generation: int
    start: int
    size: int


class Handle(bytes):
    """A handle as its sender has it. The segment is the sender's to use again when all handles to it are collected: so it is leased
    for as long as anybody here may have to send them (again), without anybody keeping books."""

    lease: object
    size: int  # bytes of the buffer it stands for


class Terms(NamedTuple):
    """What the broker welcomes a peer with that sees its shared memory (WELCOME, `segments`)."""

    prefix: str  # of the files' names; the same for all peers of one broker, and its successors at the same address
    least: int  # bytes of a payload's buffers from which they go this way; 0: none do
    most: int  # bytes of all segments of one process

    @classmethod
    def read(cls, fields: Any) -> Terms | None:
        """None when there are none, or none that can be read."""
        match fields:
            case [str(prefix), int(least), int(most)] if least > 0:
                return cls(prefix, least, most)
        return None


def handle(place: Place, lease: object) -> Handle:
    made = Handle(_MAGIC + msgpack.packb(list(place)))
    made.lease = lease
    made.size = place.size
    return made


VANISHED: Final = handle(Place("", 0, 0, 0), None)


def is_handle(frame: Any) -> bool:
    """Whether a frame behind a document is a handle and no buffer. `frame`: whatever has bytes, as it was received."""
    return len(frame) < _LONGEST and bytes(memoryview(frame)[: len(_MAGIC)]) == _MAGIC


def read_handle(frame: Any) -> Place:
    """Raises ProtocolError for one that names anything but a segment's bytes, SegmentLost for one that names nothing."""
    try:
        fields = msgpack.unpackb(memoryview(frame)[len(_MAGIC) :])
    except Exception as error:
        raise ProtocolError("a handle to shared memory that cannot be read") from error
    match fields:
        case ["", 0, 0, 0]:
            raise SegmentLost(segment="a segment", why="it was gone when the broker wanted to send it on")
        case [str(name), int(generation), int(start), int(size)] if _NAME.match(name):
            if 0 <= generation < _LIMIT and ALIGN <= start < _LIMIT and 0 <= size < _LIMIT:
                return Place(name, generation, start, size)
    raise ProtocolError("a handle to shared memory that names none")


def lay_out(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where buffers of these sizes begin in one segment, and how many bytes it needs."""
    starts: list[int] = []
    at = ALIGN
    for size in sizes:
        starts.append(at)
        at += -(-size // ALIGN) * ALIGN
    return starts, at


Opener = Callable[[Sequence[Place]], list[Any]]
_openers: list[Opener] = []


def can_open(opener: Opener) -> None:
    """This process can: `opener` gives a buffer for each place, all of one payload."""
    _openers[:] = [opener]


def opened(frames: Sequence[Any], trusted: bool) -> Sequence[Any]:
    """The buffers of a payload, with those that handles stand for. `trusted`: a stranger's handle is none of ours to follow.

    Raises SegmentLost when one is gone, ProtocolError for handles that are not for us.
    """
    held = [at for at, frame in enumerate(frames) if is_handle(frame)]
    if not held:
        return frames
    places = [read_handle(frames[at]) for at in held]
    if not trusted or not _openers:
        raise ProtocolError(
            "a handle to shared memory, which is for trusted peers on one machine, came to somebody else"
        )
    buffers = list(frames)
    for at, buffer in zip(held, _openers[0](places), strict=True):
        buffers[at] = buffer
    return buffers
