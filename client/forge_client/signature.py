"""Whether a call fits an endpoint's signature, told before anything travels (design §5, "bad input").

A `Matcher` is compiled once for each endpoint. On the hot path it compares two numbers; only a call that does not
fit pays for `Signature.bind`, whose words are Python's own. It crosses the wire as names, kinds and whether there is
a default, so that a handle found by name judges calls as the class itself would.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from forge_contract.errors import BadCall

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_ENDLESS = 1 << 30


class Matcher:
    """Judges calls. Positional calls with `least` to `most` arguments fit; everything else is for `check`.

    `signature` None: nothing is known, and every call fits.
    """

    __slots__ = ("_named", "_order", "_signature", "least", "most")

    def __init__(self, signature: inspect.Signature | None) -> None:
        self._signature = signature
        self._order: tuple[str, ...] = ()
        self._named: frozenset[str] | None = None  # keywords a call may use; None: any
        self.least, self.most = 0, _ENDLESS
        if signature is None:
            return
        parameters = list(signature.parameters.values())
        positional = [one for one in parameters if one.kind in _POSITIONAL]
        self._order = tuple(one.name for one in positional)
        self.least = sum(one.default is one.empty for one in positional)
        if all(one.kind is not one.VAR_POSITIONAL for one in parameters):
            self.most = len(positional)
        if any(one.kind is one.KEYWORD_ONLY and one.default is one.empty for one in parameters):
            self.least = _ENDLESS  # no call by position alone fits
        if all(one.kind is not one.VAR_KEYWORD for one in parameters):
            self._named = frozenset(one.name for one in parameters if one.kind in _NAMED)

    @classmethod
    def of(cls, method: Callable[..., Any]) -> Matcher:
        """Of a plain function in a class: its first parameter is the instance."""
        try:
            signature = inspect.signature(method)
        except (TypeError, ValueError):
            return cls(None)
        first, *others = signature.parameters.values() or (None,)
        if first is None or first.kind not in (*_POSITIONAL, inspect.Parameter.VAR_POSITIONAL):
            return cls(None)
        if first.kind is inspect.Parameter.VAR_POSITIONAL:
            others = [first, *others]
        return cls(signature.replace(parameters=others))

    def argument(self, name: str) -> Callable[[tuple[Any, ...], dict[str, Any]], Any]:
        """Finds the argument of this name in a call; None where it was left to its default."""
        at = self._order.index(name) if name in self._order else _ENDLESS

        def find(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return args[at] if at < len(args) else kwargs.get(name)

        return find

    def check(self, endpoint: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raises BadCall, with Python's own words, when the call does not fit."""
        if self._signature is None:
            return
        if not kwargs and self.least <= len(args) <= self.most:
            return
        try:
            self._signature.bind(*args, **kwargs)
        except TypeError as error:
            hint = ""
            if self._named is not None and any(name not in self._named for name in kwargs):
                takes = [name for name in self._signature.parameters if name in self._named]
                hint = f"; it takes {', '.join(takes) or 'no keywords'}"
            raise BadCall(endpoint=endpoint, why=f"{error}{hint}") from None

    def to_wire(self) -> list[list[Any]] | None:
        """`[[name, kind, has a default], …]`, kinds numbered as in `inspect`; None when nothing is known."""
        if self._signature is None:
            return None
        return [[one.name, int(one.kind), one.default is not one.empty] for one in self._signature.parameters.values()]

    @classmethod
    def from_wire(cls, described: Any) -> Matcher:
        """What a peer described. Nonsense means that nothing is known: the worker judges then."""
        try:
            parameters = [
                inspect.Parameter(
                    name, inspect._ParameterKind(kind), default=None if has_default else inspect.Parameter.empty
                )
                for name, kind, has_default in described
            ]
            return cls(inspect.Signature(parameters))
        except (TypeError, ValueError):
            return cls(None)
