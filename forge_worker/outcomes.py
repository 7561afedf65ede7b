"""How a call ended, as a status and a payload: a value, the user's exception, an error of ours (design A5, W5).

`actor_host` asks, on the loop or in a thread; nothing here knows of either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Final

import msgpack

from forge_contract.errors import ForgeError, PayloadTooLarge
from forge_contract.framing import Payload
from forge_contract.messages import FAILED, OK, RAISED
from forge_contract.payload import LARGE, encode, encode_exception, payload_size
from forge_worker.fatal import breaks_process
from forge_worker.last_resort import give_up

Outcome = tuple[int, Payload]

_PLAIN: Final = frozenset({bytes, str, int, float, bool, type(None)})
_pack = msgpack.Packer(
    strict_types=True, buf_size=4 * LARGE
).pack  # runs no Python without a `default`: no thread comes in between

BROKEN: Final = -1  # RAISED for its caller, and the end of this process (F6); it stays in here


class Outcomes:
    """`trusted`: whether values may travel as pickles; `limit`: bytes of one result; `fatal`: the names in fatal_errors;
    `share` puts large results into shared memory.
    An endpoint is `Class.method`."""

    def __init__(
        self, trusted: bool, limit: int, fatal: Iterable[str] = (), share: Callable[[Payload], Payload] | None = None
    ) -> None:
        self._share = share
        self._trusted = trusted
        self._limit = limit
        self._small = min(limit, LARGE - 1)
        self._fatal = frozenset(fatal)

    def plain(self, value: Any) -> bytes | None:
        """What `returned` would make of a small and plain value, as most are, in half the time. None: ask `returned`."""
        kind = type(value)
        if kind not in _PLAIN or (kind is bytes and len(value) > self._small):
            return None
        try:
            payload: bytes = _pack(value)
        except (ValueError, OverflowError):  # lone surrogates, ints beyond 64 bits
            return None
        return payload if len(payload) <= self._small else None

    def returned(self, endpoint: str, value: Any) -> Outcome:
        try:
            payload: Payload = encode(value, trusted=self._trusted, where=endpoint)
        except ForgeError as error:
            return self.failed(error)
        except Exception as error:  # a value's own code, such as its __reduce__
            return self.raised(error)
        size = len(payload) if type(payload) is bytes else payload_size(payload)
        if size > self._limit:
            what = f"the result of {endpoint}"
            return self.failed(PayloadTooLarge(what=what, size=size, limit=self._limit))
        return OK, payload if self._share is None or type(payload) is bytes else self._share(payload)

    def raised(self, error: BaseException) -> Outcome:
        """RAISED, or BROKEN. Ends the process where there is not even the memory to say so: somebody waits for it."""
        try:
            payload: Payload = encode_exception(trimmed(error), trusted=self._trusted)
            return BROKEN if breaks_process(error, self._fatal) else RAISED, payload
        except BaseException as another:
            give_up(another)

    def failed(self, error: ForgeError) -> Outcome:
        payload: bytes = msgpack.packb(error.to_wire(), default=str)
        return FAILED, payload


def trimmed(error: BaseException) -> BaseException:
    """The error with its traceback beginning in the user's code: how the worker got there is nobody's concern."""
    trace: TracebackType | None = error.__traceback__
    while trace is not None and trace.tb_frame.f_globals.get("__name__", "").startswith("forge_worker."):
        trace = trace.tb_next
    return error if trace is None else error.with_traceback(trace)
