"""The columns of CALLS, FANOUT and REPLIES, checked before anything is done with them: a peer's nonsense is data (W8).

The checks work on whole columns at C speed, because this is the hot path; `dispatch` calls them once per message.
"""

from __future__ import annotations

import math
from types import NoneType
from typing import Any, Final

from forge_broker.core.requests import Request
from forge_contract.errors import ProtocolError
from forge_contract.framing import Payload, Payloads
from forge_contract.messages import DROPPED, FAILED, OK, RAISED, RETURNED, UNTOUCHED

BATCHING = ("shape", "key", "weight")  # what a batch is made by, with `batcher.PLAIN` where nothing is said
_COLUMNS = frozenset({"timeout", "session", "priority", "hints", "rank", "again", *BATCHING})
_STATUSES = frozenset({OK, RAISED, FAILED, DROPPED, UNTOUCHED, RETURNED})
_INT = frozenset({int})  # and no bool
_NOT_FIELDS = frozenset({"timeout", "again", *BATCHING})


def fill(request: Request, columns: dict[str, Any], at: int) -> None:
    """The fields of one item from the columns of its message."""
    for name, values in columns.items():
        if name in _NOT_FIELDS:
            continue
        value = values[at] if isinstance(values, list) else values
        if value is not None:
            setattr(request, name, value)


def batching(columns: dict[str, Any], at: int) -> tuple[int, Any, float] | None:
    """Shape, key and weight of one item; None when it says none of them."""
    found = [columns.get(name) for name in BATCHING]
    shape, key, weight = (values[at] if isinstance(values, list) else values for values in found)
    if shape is None and key is None and weight is None:
        return None
    return shape or 0, key, 1.0 if weight is None else weight


_KINDS: Final[dict[str, frozenset[type]]] = {
    name: frozenset({*kinds, NoneType})
    for name, kinds in {
        "timeout": (float, int),
        "session": (str,),
        "priority": (int,),
        "hints": (dict,),
        "rank": (int,),
        "shape": (int,),
        "key": (str, int, bytes),
        "weight": (float, int),
        "again": (bool,),
    }.items()
}


def read_calls(message: list[Any]) -> tuple[int, list[int], list[int], dict[str, Any]]:
    """The fields of CALLS, checked (PROTOCOL.md §7). Raises ProtocolError."""
    if len(message) != 5:
        raise ProtocolError(f"CALLS has {len(message)} fields instead of 5")
    _, endpoint, sequences, sizes, columns = message
    if type(endpoint) is not int or not _ints(sequences) or not _ints(sizes) or len(sequences) != len(sizes):
        raise ProtocolError("CALLS with columns that do not match")
    if sequences and not 0 < min(sequences) <= max(sequences) < 1 << 40:
        raise ProtocolError("CALLS with a sequence out of range")
    if not isinstance(columns, dict):
        raise ProtocolError("CALLS with columns that are no map")
    if not columns.keys() <= _COLUMNS:  # a newer peer's
        columns = {name: values for name, values in columns.items() if name in _COLUMNS}
    for name, values in columns.items():
        many = values if isinstance(values, list) else [values]
        if isinstance(values, list) and len(values) != len(sequences):
            raise ProtocolError(f"CALLS with {len(values)} values of {name} for {len(sequences)} items")
        if not _KINDS[name].issuperset(map(type, many)):
            raise ProtocolError(f"CALLS with a {name} of another type")
        if name == "timeout" and any(value is not None and math.isnan(value) for value in many):
            raise ProtocolError("CALLS with a timeout that is no number")  # nan would never be due, nor let others be
        if name == "weight" and not all(value is None or 0 <= value < math.inf for value in many):
            raise ProtocolError("CALLS with a weight that is none")
    priority = columns.get("priority")
    if priority is not None and not all(
        -100 <= (one or 0) <= 100 for one in (priority if isinstance(priority, list) else [priority])
    ):
        raise ProtocolError("CALLS with a priority out of -100 … 100")
    return endpoint, sequences, sizes, columns


def read_fanout(message: list[Any]) -> tuple[int, list[int], list[int], dict[str, Any]]:
    """The fields of FANOUT as those of CALLS with one item (PROTOCOL.md §7). Raises ProtocolError."""
    return read_calls(
        [message[0], message[1], [message[2]], [message[3]], message[4]] if len(message) == 5 else message
    )


def read_replies(message: list[Any]) -> tuple[int, list[int], int | list[int], int | list[int], list[int], int]:
    """The fields of REPLIES, checked: epoch, ids, attempts, statuses, sizes, cost. Raises ProtocolError."""
    if len(message) == 6:
        message = [*message, 0]
    if len(message) != 7:
        raise ProtocolError(f"REPLIES has {len(message)} fields instead of 7")
    _, epoch, ids, attempts, statuses, sizes, cost = message
    if type(cost) is not int or cost < 0:
        raise ProtocolError("REPLIES with a cost that is none")
    if type(epoch) is not int or not _ints(ids) or not _ints(sizes) or len(ids) != len(sizes):
        raise ProtocolError("REPLIES with columns that do not match")
    for values in (attempts, statuses):
        if not (type(values) is int or (_ints(values) and len(values) == len(ids))):
            raise ProtocolError("REPLIES with columns that do not match")
    if not (_STATUSES.issuperset(statuses) if isinstance(statuses, list) else statuses in _STATUSES):
        raise ProtocolError("REPLIES with an unknown status")
    return epoch, ids, attempts, statuses, sizes, cost


def read_states(message: list[Any], payloads: Payloads) -> tuple[list[str], list[Payload]]:
    """The sessions and states of STATES, checked. Raises ProtocolError."""
    if len(message) != 3 or not isinstance(message[1], list) or not _ints(message[2]):
        raise ProtocolError("STATES is [52, sessions, sizes]")
    _, ids, sizes = message
    if len(ids) != len(sizes) or set(map(type, ids)) - {str}:
        raise ProtocolError("STATES with columns that do not match")
    return ids, payloads.take_all(sizes)


def _ints(values: Any) -> bool:
    return isinstance(values, list) and _INT.issuperset(map(type, values))
