"""Looking into a value in Python: setting large bytes aside, and finding what could not travel.

`payload_core` calls `set_large_aside` only when a document came out large or msgpack refused, `payload` calls
`locate` only to compose an error, so neither costs an ordinary call anything.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

# Bytes and arrays at least this large leave the document and travel as a frame of their own, uncopied.
LARGE = 32 * 1024

BYTES_LIKE = frozenset((bytes, bytearray, memoryview))
_LOOK_AT = BYTES_LIKE | {list, dict}
_LOOK_AT_THOROUGHLY = _LOOK_AT | {str}
_NESTING = frozenset((list, dict))
_MAX_DEPTH = 500
_MAX_VISITS = 100_000


class Cannot(Exception):
    """`value` cannot travel, because `why`. `payload` makes a SerializationError of it that says where it sits."""

    def __init__(self, value: object, why: str) -> None:
        self.value = value
        self.why = why
        super().__init__(why)


class Aside:
    """Stands in a value for large bytes that get a frame of their own."""

    __slots__ = ("buffer",)

    def __init__(self, buffer: bytes | bytearray | memoryview) -> None:
        self.buffer = buffer


class Surrogates:
    """Stands in a value for a str that UTF-8 has no bytes for (file names with undecodable bytes)."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text


def is_large(value: Any) -> bool:
    kind = type(value)
    return kind in BYTES_LIKE and (value.nbytes if kind is memoryview else len(value)) >= LARGE


def holds_large(values: Iterable[Any]) -> bool:
    """Whether large bytes are among these values, or in a short list or dict among them."""
    for value in values:
        kind = type(value)
        if kind in BYTES_LIKE:
            if is_large(value):
                return True
        elif kind is list:
            if len(value) <= 64 and any(map(is_large, value)):
                return True
        elif kind is dict and len(value) <= 64 and any(map(is_large, value.values())):
            return True
    return False


def nests_beyond(value: Any, depth: int) -> bool:
    """Whether lists and dicts nest more than `depth` deep in `value`."""
    kind = type(value)
    if kind is not list and kind is not dict:
        return False
    if not depth:
        return True
    items = value if kind is list else value.values()
    return not _NESTING.isdisjoint(map(type, items)) and any(nests_beyond(item, depth - 1) for item in items)


def set_large_aside(value: Any, *, thorough: bool = False) -> Any:
    """`value` with its large bytes replaced by `Aside`, in lists and dicts of any depth; itself when there are none.

    `thorough` also replaces what msgpack refuses although its type is known. Raises `Cannot` for what is nested
    without end.
    """
    try:
        return _lift(value, 0, thorough)
    except RecursionError as error:
        raise _endless(value) from error


def _endless(value: Any) -> Cannot:
    return Cannot(value, f"it is nested more than {_MAX_DEPTH} deep, or refers to itself")


def _lift(value: Any, depth: int, thorough: bool) -> Any:
    kind = type(value)
    if kind in BYTES_LIKE:
        if kind is memoryview and not value.c_contiguous:
            value = value.tobytes()
        return Aside(value) if is_large(value) else value
    if kind is list:
        if depth > _MAX_DEPTH:
            raise _endless(value)
        # A hundred thousand numbers are looked over in C.
        if not (_LOOK_AT_THOROUGHLY if thorough else _LOOK_AT).isdisjoint(map(type, value)):
            lifted = []
            changed = False
            for item in value:
                new = _lift(item, depth + 1, thorough)
                changed |= new is not item
                lifted.append(new)
            return lifted if changed else value
    elif kind is dict:
        if depth > _MAX_DEPTH:
            raise _endless(value)
        if thorough or not _LOOK_AT.isdisjoint(map(type, value.values())):
            mapped = {}
            changed = False
            for key, item in value.items():
                new_key = _lift(key, depth + 1, thorough) if thorough and type(key) is str else key
                new = _lift(item, depth + 1, thorough)
                changed |= new is not item or new_key is not key
                mapped[new_key] = new
            return mapped if changed else value
    elif thorough and kind is str:
        try:
            value.encode()
        except UnicodeEncodeError:
            return Surrogates(value)
    return value


def locate(root: Any, target: object) -> str | None:
    """Where in `root` the object `target` sits, as Python would say it: `['lr'].schedule[0]`; None if not found."""
    stack: list[tuple[Any, str, int]] = [(root, "", 0)]
    seen: set[int] = set()
    while stack and len(seen) < _MAX_VISITS:
        value, path, depth = stack.pop()
        if value is target:
            return path
        if id(value) in seen or depth > _MAX_DEPTH:
            continue
        seen.add(id(value))
        stack.extend((child, path + step, depth + 1) for step, child in _children(value))
    return None


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield f"[{key!r:.40}]" if isinstance(key, (str, int)) else "[…]", item
            yield " (a key)", key
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        for name, item in zip(value._fields, value, strict=False):
            yield f".{name}", item
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield f"[{number}]", item
    elif isinstance(value, (set, frozenset)):
        for item in value:
            yield " (an element)", item
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            if hasattr(value, field.name):
                yield f".{field.name}", getattr(value, field.name)
