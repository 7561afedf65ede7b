"""What a call says of itself to the broker that makes batches and sees no arguments (B2): its shape, its key, its weight.

`batch_key` and `batch_weight` are functions of a call's arguments, or the name of one of them. A name travels with the service, so
whoever finds the service by its name can call it; a function is known only where the class is.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import msgpack

from forge_client.signature import Matcher
from forge_contract.errors import BadCall
from forge_contract.payload import encode

Ask = Callable[[tuple[Any, ...], dict[str, Any]], Any]

_WITH_KEYWORDS: Final = 1 << 62


class Said(NamedTuple):
    shape: int = 0
    key: str | int | bytes | None = None
    weight: float | None = None


NOTHING_SAID: Final = Said()


class Batching:
    """Of one endpoint. `options`: as the service's description has them; `known`: its options where the class is at hand."""

    def __init__(self, label: str, options: Mapping[str, Any], known: Any, matcher: Matcher) -> None:
        self._label = label
        self.in_calls: bool = options.get("batch_mode") == "call"
        self._key = self._asked("batch_key", options, known, matcher)
        self._weight = self._asked("batch_weight", options, known, matcher)
        self._shapes: dict[tuple[int, tuple[str, ...]], int] = {}

    @property
    def asks(self) -> bool:
        """Whether calls differ in more than their shape."""
        return self._key is not None or self._weight is not None

    def said(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Said:
        """Raises BadCall when a function of the class gives what it must not."""
        return Said(self.shape(args, kwargs), self.key(args, kwargs), self.weight(args, kwargs))

    def shape(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """Equal for calls whose arguments can stand in one list each (PROTOCOL.md §7)."""
        if not self.in_calls:
            return 0
        if not kwargs:
            return len(args)
        names = (len(args), tuple(sorted(kwargs)))
        shape = self._shapes.get(names)
        if shape is None:
            said = msgpack.packb([names[0], list(names[1])])
            shape = _WITH_KEYWORDS + (int.from_bytes(hashlib.blake2b(said, digest_size=8).digest()) >> 4)
            self._shapes[names] = shape
        return shape

    def key(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | int | bytes | None:
        """Raises BadCall for what cannot be one: unhashable, or of a type that does not travel without trust."""
        if self._key is None:
            return None
        key = self._ask("batch_key", self._key, args, kwargs)
        if key is None or type(key) in (str, bytes) or (type(key) is int and abs(key) < 1 << 63):
            return key  # type: ignore[no-any-return]
        try:
            hash(key)
            said = encode(key, trusted=False, where=self._label)
        except Exception as error:  # the key's own code may raise anything
            raise BadCall(endpoint=self._label, why=f"batch_key gave {key!r:.80}, which is no key: {error}") from None
        return said if isinstance(said, bytes) else b"".join(said)

    def weight(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float | None:
        """Raises BadCall for what is no number from 0 on."""
        if self._weight is None:
            return None
        weight = self._ask("batch_weight", self._weight, args, kwargs)
        if weight is None:
            return None
        try:
            number = math.nan if isinstance(weight, (str, bytes)) else float(weight)
        except Exception:  # whatever the value's own code raises, an array of several numbers among them
            number = math.nan
        if not 0 <= number < math.inf:
            raise BadCall(endpoint=self._label, why=f"batch_weight gave {weight!r:.80}, which is no number from 0 on")
        return number

    def _asked(self, name: str, options: Mapping[str, Any], known: Any, matcher: Matcher) -> Ask | None:
        given = options.get(name)
        if not given:
            return None
        if isinstance(given, str):
            return matcher.argument(given)
        function = getattr(known, name, None)
        if function is None:
            return self._unknown(name)
        return lambda args, kwargs: function(*args, **kwargs)

    def _unknown(self, name: str) -> Ask:
        def refuse(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            raise BadCall(
                endpoint=self._label,
                why=f"its {name} is a function, which only a handle made from the class knows; a parameter's name "
                f'({name}="…") can be asked by everybody',
            )

        return refuse

    def _ask(self, name: str, ask: Ask, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            return ask(args, kwargs)
        except BadCall:
            raise
        except Exception as error:
            raise BadCall(endpoint=self._label, why=f"{name} raised {type(error).__name__}: {error}") from error
