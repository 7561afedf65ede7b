"""How a call ended, as a status and a payload: a value, the user's exception, an error of ours (design A5, W5, B2).

`actor_host` asks, on the loop or in a thread; nothing here knows of either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Final

import msgpack

from forge_contract.errors import BatchError, ForgeError, PayloadTooLarge
from forge_contract.framing import Payload
from forge_contract.messages import FAILED, OK, RAISED
from forge_contract.payload import encode, encode_exception, payload_size
from forge_worker.fatal import breaks_process
from forge_worker.last_resort import give_up

Outcome = tuple[int, Payload]

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
        self._fatal = frozenset(fatal)

    def returned(self, endpoint: str, value: Any, takes_lists: bool) -> Outcome:
        try:
            if takes_lists:
                value = self._only_one(endpoint, value)
            payload: Payload = encode(value, trusted=self._trusted, where=endpoint)
        except ForgeError as error:
            return self.failed(error)
        except Exception as error:  # a value's own code: its __reduce__, the exception it was in a list
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

    def _only_one(self, endpoint: str, value: Any) -> Any:
        """The one result of a call made in lists; its own exception is raised."""
        if not isinstance(value, (list, tuple)) or len(value) != 1:
            got = f"{len(value)} results" if isinstance(value, (list, tuple)) else f"a {type(value).__name__}"
            raise BatchError(endpoint=endpoint, why=f"for 1 call it returned {got}, not a list of 1")
        (one,) = value
        if isinstance(one, BaseException):
            raise one
        return one


def in_lists(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of one call as those of a batch of one (B2)."""
    return tuple([value] for value in args), {name: [value] for name, value in kwargs.items()}


def trimmed(error: BaseException) -> BaseException:
    """The error with its traceback beginning in the user's code: how the worker got there is nobody's concern."""
    trace: TracebackType | None = error.__traceback__
    while trace is not None and trace.tb_frame.f_globals.get("__name__", "").startswith("forge_worker."):
        trace = trace.tb_next
    return error if trace is None else error.with_traceback(trace)
