"""Values to bytes and back: the arguments of a call, its result, its exception (W5, W6, A5, A8).

Client and worker encode and decode; the broker only counts the bytes (W2). A payload is one msgpack document, and a
buffer for every large piece of memory in it, so that arrays are sent and received without being copied. Python's
types stay what they were; what plain msgpack cannot say is an extension, whose data is itself a packed value:

| code | type | data |
|---|---|---|
| 0 | large bytes | u32: index of the buffer that holds them |
| 1, 2, 3 | tuple, set, frozenset | array of the elements |
| 4 | int beyond 64 bits | two's complement, big-endian |
| 5 | complex | two big-endian doubles |
| 6 | str with lone surrogates | UTF-8 with surrogates passed |
| 7 | datetime | [year, month, day, hour, minute, second, µs, fold, zone]; zone: nil, [µs, name], zoneinfo key |
| 8, 9, 10 | date, time, timedelta | [y, m, d]; [h, min, s, µs, fold, zone]; [days, s, µs] |
| 11, 12 | Decimal, UUID | its text; its 16 bytes |
| 13 | path | ["Path", "PurePosixPath" or "PureWindowsPath", text] |
| 14, 15 | range, slice | [start, stop, step] |
| 16 | OrderedDict, Counter, deque, defaultdict | [kind, items, attributes or maxlen or factory] |
| 17 | enum member | [class, name, nil], or [class, nil, value] for combined flags |
| 18 | dataclass | [class, {field: value}] |
| 19 | named tuple | [class, elements] |
| 20 | numpy array | [dtype, shape, "C" or "F", memory] |
| 21 | numpy scalar | [dtype, bytes] |
| 22 | torch tensor | [dtype, shape, device it was on, memory] |
| 23 | ValueMesh | [sizes, values] |
| 24 | registered value (handles) | [name, {field: value}] |
| 25 | exception | [type name, text, traceback, nil or packed [class, arguments, attributes]] |
| 26 | error of ours | [[code, fields], traceback] |
| 27 | pickle | [type name, [pickle, buffer, …]] |

*class* is `module:qualname`; *memory* is bytes, or the index of a buffer. bytearray and memoryview come out as bytes.
Two references to one object come out as two objects; a value that refers to itself cannot travel.

Trust (W6): 27 is written and read only with trust, whichever side lacks it refuses. Without trust a class is only
looked up in modules that are already imported, and no function of it is called but its hash
and equality, when it is a key. Garbage raises ProtocolError.
"""

from __future__ import annotations

from typing import Any

import msgpack

from forge_contract import payload_arrays, payload_classes, payload_exceptions
from forge_contract import payload_types as _entered  # noqa: F401 - it enters its types by itself
from forge_contract.errors import ForgeError, ProtocolError, SerializationError
from forge_contract.payload_classes import register_value, type_name
from forge_contract.payload_core import CHECK_FROM, CLASSIFIERS, Buffer, Decoder, Encoder, Payload, unreadable
from forge_contract.payload_walk import LARGE, Cannot, holds_large, locate, set_large_aside
from forge_contract.segments import opened

__all__ = [
    "LARGE",
    "Buffer",
    "Payload",
    "decode",
    "decode_call",
    "decode_exception",
    "decode_small",
    "encode",
    "encode_call",
    "encode_exception",
    "encode_plain_call",
    "payload_size",
    "register_value",
]

# Asked in this order: an exception may be a dataclass, and anything may be pickled.
CLASSIFIERS.extend((payload_arrays.classify, payload_exceptions.classify, payload_classes.classify))
# Encoders at rest. pop and append are atomic, so threads and encoders within encoders (in `to_fields`) get their own.
_IDLE: list[Encoder] = []
# A Packer keeps the memory of its largest document; one that grew beyond this is let go.
_KEEP_BELOW = 256 * 1024
_PLAIN = {trusted: Decoder(trusted) for trusted in (False, True)}
_PLAIN_TYPES = frozenset({bytes, str, int, float, bool, type(None)})
_pack_plain = msgpack.Packer(strict_types=True, buf_size=4 * LARGE).pack
_unpack = msgpack.unpackb
_HOOKS = {trusted: decoder.extension for trusted, decoder in _PLAIN.items()}


def encode(value: object, *, trusted: bool, where: str = "value") -> Payload:
    """`value` as bytes, or as [document, buffer, …] when one of them is 32 KiB or more; buffers are not copied.

    `trusted`: whether the address it goes to is trusted, so that values of unknown types may be pickled. `where`
    begins the error. Raises SerializationError for what cannot travel.
    """
    kind = type(value)
    if kind in _PLAIN_TYPES and (kind is not bytes or len(value) < LARGE):  # type: ignore[arg-type]  # bytes have a length
        document = _plainly(value)
        if document is not None:
            return document
    try:
        return _encode(value, trusted, holds_large((value,)))
    except Cannot as cannot:
        raise _refusal(cannot, where, locate(value, cannot.value) or "") from cannot.__cause__


def encode_call(args: tuple[Any, ...], kwargs: dict[str, Any], *, trusted: bool, where: str) -> Payload:
    """The arguments of a call, as `encode` would encode `[[*args], kwargs]`. `where`: the endpoint, for the error."""
    if not kwargs:
        document = encode_plain_call(args)
        if document is not None:
            return document
    try:
        large = holds_large(args) or (bool(kwargs) and holds_large(kwargs.values()))
        return _encode([[*args], kwargs], trusted, large)
    except Cannot as cannot:
        path = ""
        for name, argument in (*enumerate(args), *kwargs.items()):
            found = locate(argument, cannot.value)
            if found is not None:
                path = f", argument {name!r}{found}"
                break
        raise _refusal(cannot, where, path) from cannot.__cause__


def encode_plain_call(args: tuple[Any, ...]) -> bytes | None:
    """The same for a small call by position whose arguments plain msgpack can say, as most are; None for any other. Half of what
    it costs is not the packing (0.2 µs), so it does nothing else.
    """
    for value in args:
        kind = type(value)
        if kind not in _PLAIN_TYPES or (kind is bytes and len(value) >= LARGE):
            return None
    try:
        document: bytes = _pack_plain([[*args], {}])
    except (ValueError, OverflowError):  # lone surrogates, ints beyond 64 bits
        return None
    return document if len(document) < LARGE else None


def encode_exception(error: BaseException, *, trusted: bool) -> Payload:
    """The exception with its traceback. Never raises: one that cannot travel goes as name, text and traceback."""
    try:
        return _encode(error, trusted, False)
    except Exception:
        # Even its attributes' own encoding was caught before; left are errors so large or deep that msgpack refuses.
        encoder = Encoder()
        return _finish(encoder, encoder.pack(payload_exceptions.encode_degraded(encoder, error)))


def _plainly(value: object) -> bytes | None:
    """The small document of a value that plain msgpack can say, as most can; None for any other, which takes the long way. Half of what
    a small payload costs is this call and not the packing (0.3 µs), so it does nothing else.

    One packer serves all threads: without a `default` it runs no Python, so nobody else can come in between.
    """
    try:
        document: bytes = _pack_plain(value)
    except (ValueError, OverflowError):  # lone surrogates, ints beyond 64 bits
        return None
    return document if len(document) < LARGE else None


def _encode(value: object, trusted: bool, large: bool) -> Payload:
    try:
        encoder = _IDLE.pop()
    except IndexError:
        encoder = Encoder()
    encoder.trusted = trusted
    try:
        document = encoder.pack(set_large_aside(value) if large else value)
    except RecursionError as error:
        raise Cannot(value, "it is nested too deep for the stack there is left") from error
    # Not put back after an error: it may have stopped anywhere.
    if encoder.buffers or len(document) >= LARGE:
        return _finish(encoder, document)
    _IDLE.append(encoder)
    return document


def _finish(encoder: Encoder, document: bytes) -> Payload:
    buffers, encoder.buffers = encoder.buffers, []  # an encoder is a cycle with its packers: nothing may hang on it
    if len(document) < _KEEP_BELOW:
        _IDLE.append(encoder)
    return [document, *buffers] if buffers or len(document) >= LARGE else document


def _refusal(cannot: Cannot, where: str, path: str) -> SerializationError:
    return SerializationError(type_name=type_name(type(cannot.value)), where=where + path, why=cannot.why)


def decode(payload: Any, *, trusted: bool) -> Any:
    """The value of a payload: bytes or memoryview of a document, or [document, buffer, …] as the frames came in.

    `trusted`: the stamp of the request (W6), not of the link it came by. Arrays are views of the buffers; see
    `payload_arrays` for who may write to them. Raises ProtocolError for garbage, TrustRequired for a pickle without
    trust, SerializationError for a class that is not to be had here, or whose module is not imported.
    """
    if type(payload) is bytes and len(payload) <= CHECK_FROM:  # `Decoder.document`, for the many that are small
        try:
            return _unpack(payload, ext_hook=_HOOKS[trusted], strict_map_key=False)
        except ForgeError:
            raise
        except Exception as error:
            raise unreadable(error) from error
    if type(payload) is list or type(payload) is tuple:
        if not payload:
            raise ProtocolError("a payload without frames")
        if len(payload) > 1:
            return Decoder(trusted, opened(payload[1:], trusted)).document(payload[0])
        payload = payload[0]
    return _PLAIN[trusted].document(payload)


def decode_small(payloads: list[Any], *, trusted: bool) -> list[Any] | None:
    """What `decode` gives for each, if all are small, as in most columns they are; None if one is not, or cannot be read: to be
    decoded one by one then, to learn which. A call of `decode` costs as much as what it does for a small payload.
    """
    if set(map(type, payloads)) != {bytes} or max(map(len, payloads)) > CHECK_FROM:
        return None
    hook = _HOOKS[trusted]
    try:
        return [_unpack(payload, ext_hook=hook, strict_map_key=False) for payload in payloads]
    except Exception:
        return None  # `decode` will raise it, for whoever has that payload


def decode_call(payload: Any, *, trusted: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments that `encode_call` encoded. Raises as `decode` does."""
    call = decode(payload, trusted=trusted)
    if type(call) is list and len(call) == 2:
        args, kwargs = call
        if type(args) is list and type(kwargs) is dict and (not kwargs or all(type(name) is str for name in kwargs)):
            return tuple(args), kwargs
    raise ProtocolError("the payload of a call is not a list of arguments and a dict of keyword arguments")


def decode_exception(payload: Any, *, trusted: bool) -> BaseException:
    """The exception, of the type it had where that can be had here, else a RemoteError; a new object each time.

    Its `__cause__` is a RemoteTraceback. Raises ProtocolError when the payload holds no exception.
    """
    error = decode(payload, trusted=trusted)
    if not isinstance(error, BaseException):
        raise ProtocolError(f"the payload of an error holds a value of type {type_name(type(error))}")
    return error


def payload_size(payload: Any) -> int:
    """Bytes of the document and all its buffers."""
    if isinstance(payload, (list, tuple)):
        return sum(memoryview(part).nbytes for part in payload)
    return memoryview(payload).nbytes
