"""How values of people's own classes travel: enums, dataclasses, named tuples, registered values, and pickles.

Part of the payload codec: see `payload` for the table and the law. A class travels as `module:qualname`. Whoever
receives it looks it up among what is already imported, by plain dictionary look-ups that run no code (no module's
`__getattr__`, no property), and only with trust imports the module. The instance is then put together without its
`__init__`, `__new__`, `__setstate__` or any other function of the class. A class that does more in these than a plain
one would arrive half made, so it is pickled, with trust, or refused.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib
import sys
import weakref
from collections.abc import Callable
from typing import Any

from msgpack import ExtType

from forge_contract import payload_core as core
from forge_contract.errors import ForgeError, ProtocolError, SerializationError, TrustRequired
from forge_contract.payload_core import DECODERS, Decoder, EncodeOne, Encoder, forget_classes
from forge_contract.payload_walk import Cannot

_WAYS_OUT = (
    "send plain data, arrays, or a dataclass, enum or named tuple of a module that both sides import; "
    "or use a trusted address (the broker's private ipc socket), where it is pickled"
)


def type_name(cls: type) -> str:
    return cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"


# ---- classes by reference

_REFERENCES: weakref.WeakKeyDictionary[type, str] = weakref.WeakKeyDictionary()


def reference(cls: type) -> str | None:
    """`module:qualname` when that leads back to this very class on any side that can import the module, else None."""
    known = _REFERENCES.get(cls)
    if known is None:
        ref = f"{cls.__module__}:{cls.__qualname__}"
        # Two processes have two different `__main__`s.
        if cls.__module__ in ("__main__", "__mp_main__") or _find(ref) is not cls:
            return None
        known = _REFERENCES[cls] = ref
    return known


def look_up(ref: Any, trusted: bool) -> type:
    """The class of a reference. Raises SerializationError when its module is not imported here and may not be."""
    if type(ref) is not str or ":" not in ref:
        raise ProtocolError(f"a payload names a class by {ref!r:.80}, not by module:qualname")
    module = ref.partition(":")[0]
    if trusted and module not in sys.modules:
        try:
            importlib.import_module(module)
        except Exception as error:
            raise _no_class(ref, f"importing {module} failed here: {type(error).__name__}: {error}") from error
    cls = _find(ref)
    if cls is None:
        if module in sys.modules:
            raise _no_class(ref, f"{module} has no such class here; run the same code on both sides")
        raise _no_class(
            ref, f"{module} is not imported here; import it on the receiving side, or use a trusted address"
        )
    return cls


def _find(ref: str) -> type | None:
    module, _, qualname = ref.partition(":")
    found: Any = sys.modules.get(module)
    for name in qualname.split("."):
        namespace = getattr(found, "__dict__", None)
        found = namespace.get(name) if namespace is not None else None
        if not isinstance(found, type):
            return None
    return found if isinstance(found, type) else None


def _no_class(ref: str, why: str) -> SerializationError:
    return SerializationError(where="a received value", type_name=ref.replace(":", "."), why=why)


def _unfit(ref: Any, what: str) -> SerializationError:
    return _no_class(str(ref), f"here it is not {what}; run the same code on both sides")


# ---- enums


def _encode_enum(encoder: Encoder, value: enum.Enum) -> ExtType:
    ref = reference(type(value))
    if ref is None:
        return encode_pickle(encoder, value)
    if value.name in type(value)._member_map_:
        return encoder.ext(core.EXT_ENUM, [ref, value.name, None])
    return encoder.ext(core.EXT_ENUM, [ref, None, value.value])  # flags combined


def _decode_enum(decoder: Decoder, data: bytes) -> enum.Enum:
    ref, name, value = decoder.fields(data, 3)
    cls = look_up(ref, decoder.trusted)
    if not issubclass(cls, enum.Enum):
        raise _unfit(ref, "an enum")
    if name is not None:
        member = cls._member_map_.get(name)
        if member is None:
            raise _no_class(ref, f"it has no member {name!r:.80} here; run the same code on both sides")
        return member
    combining: Any = getattr(cls._missing_, "__func__", None)
    if not issubclass(cls, enum.Flag) or combining is not enum.Flag._missing_.__func__:  # type: ignore[attr-defined]
        raise _unfit(ref, "a plain flag")
    if type(value) is not int:
        raise ProtocolError(f"a payload combines flags of {ref} to {value!r:.40}")
    return cls(value)


# ---- dataclasses

# What a plain dataclass may have of these is what `dataclass(slots=True, frozen=True)` itself gives it.
_HOOKS = (
    "__new__",
    "__reduce__",
    "__reduce_ex__",
    "__getstate__",
    "__setstate__",
    "__getnewargs__",
    "__getnewargs_ex__",
)
_OWN_HOOKS = frozenset(getattr(dataclasses, name, None) for name in ("_dataclass_getstate", "_dataclass_setstate"))
_MISSING = object()


def _is_plain(cls: type) -> bool:
    for hook in _HOOKS:
        for base in cls.__mro__[:-1]:
            found = base.__dict__.get(hook)
            if found is not None and found not in _OWN_HOOKS:
                return False
    return getattr(cls, "__new__", None) is object.__new__


def _encode_dataclass(encoder: Encoder, value: Any) -> ExtType:
    cls = type(value)
    ref = reference(cls)
    if ref is None or not _is_plain(cls):
        return encode_pickle(encoder, value)
    fields = {}
    for field in dataclasses.fields(cls):
        item = getattr(value, field.name, _MISSING)
        if item is not _MISSING:
            fields[field.name] = item
    more = [name for name in getattr(value, "__dict__", ()) if name not in cls.__dataclass_fields__]
    if more:
        # Set by __post_init__ or a cached_property. Left out, the other side would have half an object.
        return encode_pickle(encoder, value, f"it has attributes that are no fields ({', '.join(more)})")
    return encoder.ext(core.EXT_DATACLASS, [ref, fields])


def _decode_dataclass(decoder: Decoder, data: bytes) -> Any:
    ref, fields = decoder.fields(data, 2)
    cls = look_up(ref, decoder.trusted)
    declared: dict[str, Any] | None = getattr(cls, "__dataclass_fields__", None)
    if type(declared) is not dict or not _is_plain(cls):
        raise _unfit(ref, "a plain dataclass")
    if type(fields) is not dict or not all(name in declared for name in fields):
        raise _unfit(ref, "a dataclass with the fields it was sent with")
    value: Any = object.__new__(cls)
    for name, item in fields.items():
        object.__setattr__(value, name, item)  # of frozen ones too; a __setattr__ of the class is not called
    return value


# ---- named tuples


def _encode_namedtuple(encoder: Encoder, value: Any) -> ExtType:
    ref = reference(type(value))
    if ref is None:
        return encode_pickle(encoder, value)
    return encoder.ext(core.EXT_NAMEDTUPLE, [ref, list(value)])


def _is_namedtuple(cls: type) -> bool:
    return issubclass(cls, tuple) and type(getattr(cls, "_fields", None)) is tuple


def _decode_namedtuple(decoder: Decoder, data: bytes) -> Any:
    ref, items = decoder.fields(data, 2)
    cls: Any = look_up(ref, decoder.trusted)
    if not _is_namedtuple(cls) or type(items) is not list or len(items) != len(cls._fields):
        raise _unfit(ref, "a named tuple with the fields it was sent with")
    return tuple.__new__(cls, items)


# ---- registered values (A8)


class _Registered:
    __slots__ = ("cls", "from_fields", "name", "to_fields")

    def __init__(
        self,
        cls: type,
        name: str,
        to_fields: Callable[[Any], dict[str, Any]],
        from_fields: Callable[[dict[str, Any]], Any],
    ) -> None:
        self.cls = cls
        self.name = name
        self.to_fields = to_fields
        self.from_fields = from_fields

    def encode(self, encoder: Encoder, value: Any) -> ExtType:
        return encoder.ext(core.EXT_REGISTERED, [self.name, self.to_fields(value)])


_REGISTERED: dict[str, _Registered] = {}


def register_value(
    cls: type, name: str, to_fields: Callable[[Any], dict[str, Any]], from_fields: Callable[[dict[str, Any]], Any]
) -> None:
    """Lets values of `cls` and its subclasses travel, as fields under this name; `from_fields` makes one of them again.

    `from_fields` gets what any peer may have sent, trusted or not: it has to check it. Raises ValueError when the
    name belongs to another class.
    """
    known = _REGISTERED.get(name)
    if known is not None and (known.cls.__module__, known.cls.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(f"payload name {name!r} belongs to {type_name(known.cls)}")
    _REGISTERED[name] = _Registered(cls, name, to_fields, from_fields)
    forget_classes()


def _decode_registered(decoder: Decoder, data: bytes) -> Any:
    name, fields = decoder.fields(data, 2)
    known = _REGISTERED.get(name) if type(name) is str else None
    if known is None:
        raise SerializationError(
            where="a received value", type_name=str(name), why="nobody here has registered it; import forge_client"
        )
    if type(fields) is not dict:
        raise ProtocolError(f"a payload has a {name} whose fields are of type {type(fields).__name__}")
    return known.from_fields(fields)


# ---- everything else


def encode_pickle(encoder: Encoder, value: Any, because: str = "") -> ExtType:
    """The value by pickle, with trust. Raises `Cannot` without, or when it cannot be pickled."""
    if not encoder.trusted:
        cls = type(value)
        if not because and reference(cls) is None:
            because = "its class cannot be imported by another process"
        raise Cannot(value, f"{because + '; ' if because else ''}{_WAYS_OUT}")
    import cloudpickle

    buffers: list[Any] = []
    try:
        # Protocol 5 leaves the memory of large arrays inside the object out of the pickle.
        pickled = cloudpickle.dumps(value, protocol=5, buffer_callback=lambda buffer: buffers.append(buffer.raw()))
    except Exception as error:
        raise Cannot(value, f"it cannot be pickled: {type(error).__name__}: {error}") from error
    parts = [encoder.aside(part) for part in (pickled, *buffers)]
    return encoder.ext(core.EXT_PICKLE, [type_name(type(value)), parts])


def _decode_pickle(decoder: Decoder, data: bytes) -> Any:
    name, parts = decoder.fields(data, 2)
    if not decoder.trusted:
        raise TrustRequired(what=f"a pickled value of type {name!s:.200}")
    pickled, *buffers = [decoder.buffer(part) for part in parts]
    import pickle

    try:
        # An array must not come out read-only for the way it travelled.
        return pickle.loads(pickled, buffers=map(core.writable, buffers))  # noqa: S301 - the address this came in by is trusted (W6)
    except ForgeError:
        raise
    except Exception as error:
        raise SerializationError(
            where="a received value", type_name=str(name), why=f"unpickling failed: {type(error).__name__}: {error}"
        ) from error


def classify(cls: type) -> EncodeOne:
    for base in cls.__mro__:
        for known in _REGISTERED.values():
            if known.cls is base:
                return known.encode
    if issubclass(cls, enum.Enum):
        return _encode_enum
    if "__dataclass_fields__" in cls.__dict__ or dataclasses.is_dataclass(cls):
        return _encode_dataclass
    if _is_namedtuple(cls):
        return _encode_namedtuple
    return encode_pickle


DECODERS.update(
    {
        core.EXT_ENUM: _decode_enum,
        core.EXT_DATACLASS: _decode_dataclass,
        core.EXT_NAMEDTUPLE: _decode_namedtuple,
        core.EXT_REGISTERED: _decode_registered,
        core.EXT_PICKLE: _decode_pickle,
    }
)
