"""The two halves of the payload codec, without knowledge of any type: msgpack with extensions, and buffers set aside.

`payload` is the door and holds the table of extensions; `payload_types`, `payload_classes`, `payload_arrays` and
`payload_exceptions` each teach the codec some types, by entering functions into `ENCODERS`, `CLASSIFIERS` and
`DECODERS` here; `payload_walk` looks into values when something is large or cannot travel.

An extension's data is again a packed value, so types nest. msgpack itself packs None, bool, int, float, str, bytes,
list and dict in C; everything else comes to `Encoder.extension`, once for each object.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import msgpack
from msgpack import ExtType

from forge_contract.errors import ForgeError, ProtocolError
from forge_contract.payload_walk import LARGE, Aside, Cannot, nests_beyond, set_large_aside

Buffer = bytes | bytearray | memoryview
Payload = bytes | list[Buffer]

# Each level of extensions is a call of msgpack within a call of msgpack, and its decoder keeps 40 KiB of stack for
# each: 64 levels are 2.6 MiB of the 8 MiB a thread has. Lists and dicts nest within msgpack itself, to 511, and packing
# takes some 280 bytes of stack for each: 511 at each of 64 levels would be too many (it crashes the process, there is
# no RecursionError in C), so below the first 16 levels lists may nest only LISTS_BELOW deep.
MAX_NESTING = 64
UNCHECKED_NESTING = 16
LISTS_BELOW = 32
# Above this size a document is checked before it is built, see Decoder.document.
CHECK_FROM = 1024

EXT_BUFFER = 0
EXT_TUPLE = 1
EXT_SET = 2
EXT_FROZENSET = 3
EXT_INT = 4
EXT_COMPLEX = 5
EXT_STR = 6
EXT_DATETIME = 7
EXT_DATE = 8
EXT_TIME = 9
EXT_TIMEDELTA = 10
EXT_DECIMAL = 11
EXT_UUID = 12
EXT_PATH = 13
EXT_RANGE = 14
EXT_SLICE = 15
EXT_COLLECTION = 16
EXT_ENUM = 17
EXT_DATACLASS = 18
EXT_NAMEDTUPLE = 19
EXT_NDARRAY = 20
EXT_SCALAR = 21
EXT_TENSOR = 22
EXT_VALUE_MESH = 23
EXT_REGISTERED = 24
EXT_EXCEPTION = 25
EXT_ERROR = 26
EXT_PICKLE = 27

EncodeOne = Callable[["Encoder", Any], ExtType]
DecodeOne = Callable[["Decoder", bytes], Any]

# By exact type. Types found by a classifier are remembered in `_FOUND`, weakly: classes of notebooks come and go.
ENCODERS: dict[type, EncodeOne] = {}
# Asked in this order for a type not in ENCODERS; the first that answers with a function has it.
CLASSIFIERS: list[Callable[[type], EncodeOne | None]] = []
DECODERS: dict[int, DecodeOne] = {}
_FOUND: weakref.WeakKeyDictionary[type, EncodeOne] = weakref.WeakKeyDictionary()


def forget_classes() -> None:
    """To be called when a classifier would answer differently from now on (a type was registered)."""
    _FOUND.clear()


class Encoder:
    """Makes one payload at a time: `pack` gives its document, `buffers` what was set aside meanwhile.

    Encoders are kept and used again, since making a Packer costs more than packing a small value.
    """

    __slots__ = ("_depth", "_packers", "buffers", "trusted")

    def __init__(self) -> None:
        self.trusted = False
        self.buffers: list[Buffer] = []
        self._depth = 0
        # One for each level of extensions: a Packer cannot be entered again while its `default` is running.
        self._packers: list[msgpack.Packer] = []

    def pack(self, value: Any) -> bytes:
        """`value` as a document. Raises `Cannot` with the object that cannot travel."""
        depth = self._depth
        if depth == len(self._packers):
            if depth > MAX_NESTING:
                raise Cannot(value, f"it is nested more than {MAX_NESTING} deep, or refers to itself")
            self._packers.append(msgpack.Packer(strict_types=True, default=self.extension, buf_size=4096))
        if depth > UNCHECKED_NESTING and nests_beyond(value, LISTS_BELOW):
            raise Cannot(value, f"it is nested more than {MAX_NESTING} deep, or refers to itself")
        packer = self._packers[depth]
        aside = len(self.buffers)
        self._depth = depth + 1
        try:
            try:
                document: bytes = packer.pack(value)
            except (ValueError, BufferError) as error:
                # Lone surrogates, memoryviews with gaps, and lists nested without end come here.
                lifted = set_large_aside(value, thorough=True)
                if lifted is value:
                    raise Cannot(value, str(error)) from error
                del self.buffers[aside:]
                return bytes(packer.pack(lifted))
            if len(document) >= LARGE:
                lifted = set_large_aside(value)
                if lifted is not value:
                    # Packed once in vain, at the speed of memory. `payload` looks ahead for large bytes where
                    # they usually are, so this is the rare case; looking everywhere first would cost all calls.
                    del self.buffers[aside:]
                    document = packer.pack(lifted)
            return document
        finally:
            self._depth = depth

    def extension(self, value: Any) -> ExtType:
        """The `default` of msgpack: whatever it does not know itself."""
        kind = type(value)
        encode = ENCODERS.get(kind) or _FOUND.get(kind)
        if encode is None:
            encode = _FOUND[kind] = _classify(kind)
        return encode(self, value)

    def ext(self, code: int, value: Any) -> ExtType:
        return ExtType(code, self.pack(value))

    def aside(self, buffer: Buffer) -> int | Buffer:
        """What stands for `buffer` in the document: itself while small, else its index among the frames.

        Frames are read-only views. When the two ends are in one process (tests do that) nothing is copied in
        between, and the receiver must not be able to write into the sender's array.
        """
        view = memoryview(buffer)
        if view.nbytes < LARGE:
            return buffer
        self.buffers.append(buffer if type(buffer) is bytes else view.cast("B").toreadonly())
        return len(self.buffers) - 1


def _classify(kind: type) -> EncodeOne:
    for classifier in CLASSIFIERS:
        encode = classifier(kind)
        if encode is not None:
            return encode
    raise Cannot(None, f"no classifier takes {kind!r}")


def writable(memory: Any) -> Any:
    """`memory` if it may be written to, else a copy that may."""
    return bytearray(memory) if memoryview(memory).readonly else memory


def _encode_aside(encoder: Encoder, value: Aside) -> ExtType:
    index = encoder.aside(value.buffer)
    assert type(index) is int
    return ExtType(EXT_BUFFER, index.to_bytes(4, "big"))


def _decode_aside(decoder: Decoder, data: bytes) -> bytes:
    return bytes(decoder.buffer(int.from_bytes(data, "big")))  # of bytes, bytes() makes no copy


ENCODERS[Aside] = _encode_aside
DECODERS[EXT_BUFFER] = _decode_aside


def unreadable(error: Exception) -> ProtocolError:
    return ProtocolError(f"a payload cannot be read: {type(error).__name__}: {error!s:.200}")


class Decoder:
    """Reads documents of one payload at one depth; never changes, so those without buffers serve all threads."""

    __slots__ = ("_depth", "buffers", "trusted")

    def __init__(self, trusted: bool, buffers: Sequence[Any] = (), depth: int = 0) -> None:
        self.trusted = trusted
        self.buffers = buffers
        self._depth = depth

    def document(self, data: Buffer) -> Any:
        """The value in `data`. Raises ForgeError and nothing else, whatever the bytes and the classes in them do."""
        try:
            if len(data) > CHECK_FROM:
                # msgpack believes an array's header and allocates for it: nested headers that each claim as many
                # elements as there are bytes cost 8 KiB per byte. `skip` reads all of the structure and allocates
                # nothing. It takes a quarter of the time of building; a document below the limit can claim 2 MiB.
                check = msgpack.Unpacker(max_buffer_size=len(data), read_size=len(data))
                check.feed(data)
                check.skip()
            return msgpack.unpackb(data, ext_hook=self.extension, strict_map_key=False)
        except ForgeError:
            raise
        except Exception as error:
            raise unreadable(error) from error

    def extension(self, code: int, data: bytes) -> Any:
        # Not bound once and kept: an object that holds a method of its own is a cycle, and its buffers would lie about until
        # the collector comes by.
        decode = DECODERS.get(code)
        if decode is None:
            raise ProtocolError(f"a payload holds the unknown extension {code}; is the other side newer?")
        return decode(self, data)

    def unpack(self, data: Buffer) -> Any:
        """The value packed as the data of an extension."""
        if self._depth >= MAX_NESTING:
            raise ProtocolError(f"a payload is nested more than {MAX_NESTING} deep")
        return Decoder(self.trusted, self.buffers, self._depth + 1).document(data)

    def fields(self, data: Buffer, count: int) -> list[Any]:
        """The same, where it has to be a list of so many fields."""
        fields = self.unpack(data)
        if type(fields) is not list or len(fields) != count:
            raise ProtocolError(f"an extension of a payload has other than its {count} fields")
        return fields

    def buffer(self, aside: Any) -> Any:
        """The buffer that `Encoder.aside` left this for: bytes, or the frame as it was received."""
        if type(aside) is bytes:
            return aside
        if type(aside) is int and 0 <= aside < len(self.buffers):
            return self.buffers[aside]
        raise ProtocolError(f"a payload refers to frame {aside!r:.40} and has {len(self.buffers)}")
