"""Calls of an endpoint with `batch_mode="call"`: one run of the method for many, with a list per argument (design B2).

`actor_host` gives a `Call` a `Batch` here, which turns its items into arguments and what the method returned into one outcome
for each item; when it runs, and in which thread, is decided there as for any call. A call that came in no batch is a
batch of one. Pure but for the values' own code.

What is wrong with one item is that item's alone: arguments that cannot be read or are of another shape than the others',
an array that does not fit on the stack, a result that cannot travel, an exception among the results. What is wrong with
the whole, such as a list of another length, is everybody's.

`collate="stack"`: of an argument that is an array for most items the method gets one array with a new first dimension,
and an array that it returns is taken apart along its first. Nothing is imported for that: what no value is of, nobody has.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

from forge_contract.errors import BatchError, ForgeError
from forge_contract.framing import Payload
from forge_contract.messages import DROPPED, OK, RAISED
from forge_worker.arguments import read_call
from forge_worker.outcomes import BROKEN, Outcome, Outcomes

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
_Row = tuple[int, Sequence[Any], dict[str, Any]]  # request, positionals, keywords


class Batch:
    """`endpoint`: `Class.method`, for errors. `ids` and `attempts` are of the items that have not left."""

    __slots__ = (
        "_documents",
        "_dropped",
        "_outcomes",
        "_stacks",
        "attempts",
        "endpoint",
        "ids",
        "own",
        "running",
        "trusted",
    )

    def __init__(
        self,
        ids: list[int],
        attempts: list[int],
        documents: list[Payload],
        *,
        endpoint: str,
        trusted: bool,
        stacks: bool,
        outcomes: Outcomes,
    ) -> None:
        self.ids = ids
        self.attempts = attempts
        self.endpoint = endpoint
        self.trusted = trusted
        self.running: list[int] = []  # whose arguments the method got, in the order of its lists
        self.own: dict[int, Outcome] = {}  # of the items that have one apart from the others'
        self._documents = documents
        self._stacks = stacks
        self._outcomes = outcomes
        self._dropped: set[int] = set()

    def __repr__(self) -> str:
        return f"<Batch of {len(self.ids)} calls of {self.endpoint}>"

    def leave(self, request: int) -> int:
        """Take an item out before the method runs; returns its attempt."""
        at = self.ids.index(request)
        del self.ids[at], self._documents[at]
        return self.attempts.pop(at)

    def drop(self, request: int) -> bool:
        """Nobody waits for this item any more. True when nobody waits for any."""
        self._dropped.add(request)
        return len(self._dropped) == len(self.ids)

    def arguments(self) -> Arguments | None:
        """A list per argument, or a stack; None when no item is left that could run. The documents are let go."""
        rows = self._alike(self._rows())
        self._documents = []
        if not rows:
            return None
        columns = [[row[1][at] for row in rows] for at in range(len(rows[0][1]))]
        named = {name: [row[2][name] for row in rows] for name in rows[0][2]}
        if self._stacks:
            # Which rows fit is known when all columns were looked at: one that is odd in any leaves them all.
            rows = self._fitting(rows, [*columns, *named.values()])
            columns = [_stacked([row[1][at] for row in rows]) for at in range(len(columns))]
            named = {name: _stacked([row[2][name] for row in rows]) for name in named}
        self.running = [row[0] for row in rows]
        return tuple(columns), named

    def returned(self, value: Any) -> Outcome:
        """What the method returned, dealt out to `own`. The outcome of those without one: of none, or of all."""
        count = len(self.running)
        if self._stacks and _is_array(value) and value.ndim and len(value) == count:
            value = list(value)
        if not isinstance(value, (list, tuple)) or len(value) != count:
            calls = f"{count} call{'s' if count > 1 else ''}"
            why = f"for {calls} it returned {self._described(value)}, not a list of {count}"
            return self._outcomes.failed(BatchError(endpoint=self.endpoint, why=why))
        common: Outcome = OK, b""
        own, of, name = self.own, self._outcomes, self.endpoint
        for request, one in zip(self.running, value, strict=True):
            if (payload := of.plain(one)) is not None:
                own[request] = OK, payload
                continue
            outcome = of.raised(one) if isinstance(one, BaseException) else of.returned(name, one)
            if outcome[0] == BROKEN:
                common, outcome = outcome, (RAISED, outcome[1])
            own[request] = outcome
        return common

    def replies(self, status: int, payload: Payload) -> tuple[list[int], list[Payload]]:
        """Statuses and payloads of all items; these for those that have none of their own."""
        both = status, payload
        ended = [self.own.get(request, both) for request in self.ids]
        for at, request in enumerate(self.ids) if self._dropped else ():
            if request in self._dropped:
                ended[at] = DROPPED, b""
        return [one for one, _ in ended], [one for _, one in ended]

    def _described(self, value: Any) -> str:
        """What was returned instead of a list."""
        if isinstance(value, (list, tuple)):
            return f"{len(value)} results"
        if not _is_array(value):
            return f"a {type(value).__name__}"
        hint = "" if self._stacks else ' (collate="stack" takes one array for all of them, and splits the one returned)'
        return f"an array of shape {tuple(value.shape)}{hint}"

    def _rows(self) -> list[_Row]:
        rows: list[_Row] = []
        for request, document in zip(self.ids, self._documents, strict=True):
            if request in self._dropped:
                continue
            try:
                rows.append((request, *read_call(document, self.trusted)))
            except ForgeError as error:
                self.own[request] = self._outcomes.failed(error)
            except BaseException as error:  # the arguments' own code, or memory
                self.own[request] = self._outcomes.raised(error)
        return rows

    def _alike(self, rows: list[_Row]) -> list[_Row]:
        """The rows of one call shape. The broker sees to it that all are; it believes what clients say."""
        if len({len(row[1]) for row in rows}) <= 1 and not any(row[2] for row in rows):
            return rows
        shapes = [(len(row[1]), frozenset(row[2])) for row in rows]
        if len(set(shapes)) <= 1:
            return rows
        wanted = _majority(shapes)
        why = "it was called with other arguments than the rest of its batch"
        return self._without(rows, {at: why for at, shape in enumerate(shapes) if shape != wanted})

    def _fitting(self, rows: list[_Row], columns: list[list[Any]]) -> list[_Row]:
        odd: dict[int, str] = {}  # by place: why
        for column in columns:
            keys = [_layout(value) for value in column]
            wanted = _majority([key for at, key in enumerate(keys) if at not in odd])
            for at, key in enumerate(keys) if wanted is not None else ():  # a list may hold anything
                if key != wanted:
                    odd.setdefault(
                        at, f"one of its arguments is {_told(key)}, and those of its batch are {_told(wanted)}"
                    )
        return self._without(rows, odd)

    def _without(self, rows: list[_Row], odd: dict[int, str]) -> list[_Row]:
        """All rows but those at the places that are `odd`, each of which is told why."""
        for at, why in odd.items():
            self.own[rows[at][0]] = self._outcomes.failed(BatchError(endpoint=self.endpoint, why=why))
        return [row for at, row in enumerate(rows) if at not in odd]


def in_lists(args: tuple[Any, ...], kwargs: dict[str, Any], *, stacks: bool) -> Arguments:
    """The arguments of one call as those of a batch of one, for a call whose result nobody waits for."""
    column = (lambda value: _stacked([value])) if stacks else (lambda value: [value])
    return tuple(map(column, args)), {name: column(value) for name, value in kwargs.items()}


def _majority(keys: Sequence[Hashable]) -> Any:
    """What more than half of them are; where nothing is, the first."""
    found, count = Counter(keys).most_common(1)[0]
    return found if 2 * count > len(keys) else keys[0]


def _is_array(value: Any) -> bool:
    numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
    return (numpy is not None and isinstance(value, numpy.ndarray)) or (
        torch is not None and isinstance(value, torch.Tensor)
    )


class _Layout(NamedTuple):
    """What arrays on one stack have in common."""

    library: str
    shape: tuple[int, ...]
    dtype: Any
    device: Any


def _layout(value: Any) -> _Layout | None:
    """None for what is no array."""
    if not _is_array(value):
        return None
    library = type(value).__module__.partition(".")[0]
    return _Layout(library, tuple(value.shape), value.dtype, getattr(value, "device", "cpu"))


def _told(layout: _Layout | None) -> str:
    if layout is None:
        return "no array"
    dtype = str(layout.dtype).rpartition(".")[2]  # torch's says where it is from
    where = "" if str(layout.device) == "cpu" else f" on {layout.device}"
    return f"a {layout.library} array of {dtype}, shape {layout.shape}{where}"


def _stacked(values: list[Any]) -> Any:
    """One array, with a new first dimension; a list, where the values are none."""
    if not all(map(_is_array, values)) or len({_layout(value) for value in values}) != 1:
        return values
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(values[0], torch.Tensor):
        return torch.stack(values)
    return sys.modules["numpy"].stack(values)
