"""How the standard library's plain values travel. Part of the payload codec: see `payload` for the table.

Exact types only: a subclass of datetime (pandas has one) or of dict may hold more than these functions know of,
and goes the way of unknown classes instead.
"""

from __future__ import annotations

import datetime as dt
import pathlib
import struct
import uuid
from collections import Counter, OrderedDict, defaultdict, deque
from decimal import Decimal
from typing import Any

from msgpack import ExtType

from forge_contract import payload_core as core
from forge_contract.errors import ProtocolError
from forge_contract.payload_core import DECODERS, ENCODERS, Decoder, Encoder
from forge_contract.payload_walk import Cannot, Surrogates
from forge_contract.value_mesh import ValueMesh


def _encode_tuple(encoder: Encoder, value: tuple[Any, ...]) -> ExtType:
    return encoder.ext(core.EXT_TUPLE, list(value))


def _encode_set(encoder: Encoder, value: set[Any]) -> ExtType:
    return encoder.ext(core.EXT_SET, list(value))


def _encode_frozenset(encoder: Encoder, value: frozenset[Any]) -> ExtType:
    return encoder.ext(core.EXT_FROZENSET, list(value))


def _list(decoder: Decoder, data: bytes) -> list[Any]:
    items = decoder.unpack(data)
    if type(items) is not list:
        raise ProtocolError("a payload has a tuple, set or frozenset that is not made of a list")
    return items


def _encode_int(encoder: Encoder, value: int) -> ExtType:
    return ExtType(core.EXT_INT, value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True))


def _encode_complex(encoder: Encoder, value: complex) -> ExtType:
    return ExtType(core.EXT_COMPLEX, struct.pack("!dd", value.real, value.imag))


def _encode_surrogates(encoder: Encoder, value: Surrogates) -> ExtType:
    return ExtType(core.EXT_STR, value.text.encode("utf-8", "surrogatepass"))


# Time zones: None, [microseconds, name] for a fixed offset, or the key of a zoneinfo.ZoneInfo. Another kind of tzinfo
# (pytz, dateutil) travels as the fixed offset it gives for this very moment, so the moment stays the same.
def _zone(value: dt.datetime | dt.time) -> list[Any] | str | None:
    zone = value.tzinfo
    if zone is None:
        return None
    key = getattr(zone, "key", None)
    if type(key) is str and type(zone).__module__.partition(".")[0] in ("zoneinfo", "_zoneinfo"):
        return key
    offset = value.utcoffset()
    if offset is None:
        raise Cannot(value, f"its time zone {zone!r} gives no offset")
    name = value.tzname()
    return [offset // dt.timedelta(microseconds=1), name]


def _zone_from(zone: Any) -> dt.tzinfo | None:
    if zone is None:
        return None
    if type(zone) is str:
        from zoneinfo import ZoneInfo

        return ZoneInfo(zone)  # reads the time zone database; refuses keys that lead out of it
    micros, name = zone
    offset = dt.timedelta(microseconds=micros)
    plain = dt.UTC if not offset else dt.timezone(offset)
    return plain if name is None or name == plain.tzname(None) else dt.timezone(offset, name)


def _encode_datetime(encoder: Encoder, value: dt.datetime) -> ExtType:
    parts = [value.year, value.month, value.day, value.hour, value.minute, value.second, value.microsecond]
    return encoder.ext(core.EXT_DATETIME, [*parts, value.fold, _zone(value)])


def _decode_datetime(decoder: Decoder, data: bytes) -> dt.datetime:
    year, month, day, hour, minute, second, micro, fold, zone = decoder.fields(data, 9)
    return dt.datetime(year, month, day, hour, minute, second, micro, _zone_from(zone), fold=fold)


def _encode_date(encoder: Encoder, value: dt.date) -> ExtType:
    return encoder.ext(core.EXT_DATE, [value.year, value.month, value.day])


def _encode_time(encoder: Encoder, value: dt.time) -> ExtType:
    parts = [value.hour, value.minute, value.second, value.microsecond, value.fold]
    return encoder.ext(core.EXT_TIME, [*parts, _zone(value)])


def _decode_time(decoder: Decoder, data: bytes) -> dt.time:
    hour, minute, second, micro, fold, zone = decoder.fields(data, 6)
    return dt.time(hour, minute, second, micro, _zone_from(zone), fold=fold)


def _encode_timedelta(encoder: Encoder, value: dt.timedelta) -> ExtType:
    return encoder.ext(core.EXT_TIMEDELTA, [value.days, value.seconds, value.microseconds])


def _encode_decimal(encoder: Encoder, value: Decimal) -> ExtType:
    return ExtType(core.EXT_DECIMAL, str(value).encode())


def _encode_uuid(encoder: Encoder, value: uuid.UUID) -> ExtType:
    return ExtType(core.EXT_UUID, value.bytes)


# A concrete path is rebuilt as the concrete path of the receiving system; a pure one keeps its flavour.
_PATHS: dict[str, type[pathlib.PurePath]] = {
    "Path": pathlib.Path,
    "PurePosixPath": pathlib.PurePosixPath,
    "PureWindowsPath": pathlib.PureWindowsPath,
}


def _encode_path(encoder: Encoder, value: pathlib.PurePath) -> ExtType:
    flavour = "Path" if isinstance(value, pathlib.Path) else type(value).__name__
    return encoder.ext(core.EXT_PATH, [flavour, str(value)])


def _decode_path(decoder: Decoder, data: bytes) -> pathlib.PurePath:
    flavour, text = decoder.fields(data, 2)
    return _PATHS[flavour](text)


def _encode_range(encoder: Encoder, value: range) -> ExtType:
    return encoder.ext(core.EXT_RANGE, [value.start, value.stop, value.step])


def _encode_slice(encoder: Encoder, value: slice) -> ExtType:
    return encoder.ext(core.EXT_SLICE, [value.start, value.stop, value.step])


# [kind, items, more]. OrderedDict is here because it is what `state_dict()` gives; its attributes (`_metadata`, which
# `load_state_dict` reads) go along. A defaultdict travels when its factory is one of these, which call no code.
_FACTORIES: dict[str, Any] = {kind.__name__: kind for kind in (list, dict, set, int, float, str, tuple, bool)}


def _encode_ordered(encoder: Encoder, value: OrderedDict[Any, Any]) -> ExtType:
    return encoder.ext(core.EXT_COLLECTION, ["OrderedDict", dict(value), vars(value) or None])


def _encode_counter(encoder: Encoder, value: Counter[Any]) -> ExtType:
    return encoder.ext(core.EXT_COLLECTION, ["Counter", dict(value), None])


def _encode_deque(encoder: Encoder, value: deque[Any]) -> ExtType:
    return encoder.ext(core.EXT_COLLECTION, ["deque", list(value), value.maxlen])


def _encode_defaultdict(encoder: Encoder, value: defaultdict[Any, Any]) -> ExtType:
    factory: Any = value.default_factory
    if factory is None:
        name = None
    else:
        name = getattr(factory, "__name__", "")
        if _FACTORIES.get(name) is not factory:
            # Imported here: payload_classes stands above this module.
            from forge_contract.payload_classes import encode_pickle

            return encode_pickle(encoder, value)
    return encoder.ext(core.EXT_COLLECTION, ["defaultdict", dict(value), name])


def _decode_collection(decoder: Decoder, data: bytes) -> Any:
    kind, items, more = decoder.fields(data, 3)
    if type(items) is not (list if kind == "deque" else dict):
        raise ProtocolError(f"a payload has a {kind!r:.40} with items of type {type(items).__name__}")
    if kind == "OrderedDict":
        ordered: OrderedDict[Any, Any] = OrderedDict(items)
        if more is not None:
            vars(ordered).update(more)
        return ordered
    if kind == "Counter":
        return Counter(items)
    if kind == "deque":
        return deque(items, more)
    if kind == "defaultdict":
        return defaultdict(None if more is None else _FACTORIES[more], items)
    raise ProtocolError(f"a payload has the unknown collection {kind!r:.40}")


def _encode_mesh(encoder: Encoder, value: ValueMesh[Any]) -> ExtType:
    return encoder.ext(core.EXT_VALUE_MESH, [value.sizes, list(value.values())])


ENCODERS.update(
    {
        tuple: _encode_tuple,
        set: _encode_set,
        frozenset: _encode_frozenset,
        int: _encode_int,  # msgpack asks for those beyond 64 bits
        complex: _encode_complex,
        Surrogates: _encode_surrogates,
        dt.datetime: _encode_datetime,
        dt.date: _encode_date,
        dt.time: _encode_time,
        dt.timedelta: _encode_timedelta,
        Decimal: _encode_decimal,
        uuid.UUID: _encode_uuid,
        type(pathlib.Path()): _encode_path,
        pathlib.PurePosixPath: _encode_path,
        pathlib.PureWindowsPath: _encode_path,
        range: _encode_range,
        slice: _encode_slice,
        OrderedDict: _encode_ordered,
        Counter: _encode_counter,
        deque: _encode_deque,
        defaultdict: _encode_defaultdict,
        ValueMesh: _encode_mesh,
    }
)
DECODERS.update(
    {
        core.EXT_TUPLE: lambda decoder, data: tuple(_list(decoder, data)),
        core.EXT_SET: lambda decoder, data: set(_list(decoder, data)),
        core.EXT_FROZENSET: lambda decoder, data: frozenset(_list(decoder, data)),
        core.EXT_INT: lambda decoder, data: int.from_bytes(data, "big", signed=True),
        core.EXT_COMPLEX: lambda decoder, data: complex(*struct.unpack("!dd", data)),
        core.EXT_STR: lambda decoder, data: data.decode("utf-8", "surrogatepass"),
        core.EXT_DATETIME: _decode_datetime,
        core.EXT_DATE: lambda decoder, data: dt.date(*decoder.fields(data, 3)),
        core.EXT_TIME: _decode_time,
        core.EXT_TIMEDELTA: lambda decoder, data: dt.timedelta(*decoder.fields(data, 3)),
        core.EXT_DECIMAL: lambda decoder, data: Decimal(data.decode()),
        core.EXT_UUID: lambda decoder, data: uuid.UUID(bytes=data),
        core.EXT_PATH: _decode_path,
        core.EXT_RANGE: lambda decoder, data: range(*decoder.fields(data, 3)),
        core.EXT_SLICE: lambda decoder, data: slice(*decoder.fields(data, 3)),
        core.EXT_COLLECTION: _decode_collection,
        core.EXT_VALUE_MESH: lambda decoder, data: ValueMesh(*decoder.fields(data, 2)),
    }
)
