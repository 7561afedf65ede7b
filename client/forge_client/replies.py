"""What a reply means to the one who called (A4, A5, A7): values, lists, meshes, or an error to raise. Pure.

`endpoints` gives each way of calling its reader; `client` hands the reader the payloads as they come. A reader
returns the value, or raises what the caller shall see.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from copy import copy
from typing import Any

import msgpack

from forge_contract.errors import CallCancelled, FanoutError, ForgeError, ProtocolError, RemoteError, from_wire
from forge_contract.framing import Payload
from forge_contract.messages import OK, RAISED
from forge_contract.payload import decode, decode_exception
from forge_contract.value_mesh import ValueMesh


def failure(payload: Any) -> ForgeError:
    """Our own error in the payload of a FAILED reply; a new object each time."""
    try:
        return from_wire(
            msgpack.unpackb(b"".join(payload) if isinstance(payload, list) else payload, strict_map_key=False)
        )
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        return ProtocolError(f"a failed call whose error cannot be read: {error}")


def raisable(error: BaseException, label: str) -> Exception:
    """The exception an endpoint raised, as one that a coroutine may be given: what would end the caller's loop
    (SystemExit), be taken for its own cancellation, or cannot leave a coroutine (StopIteration) is told by a RemoteError."""
    if isinstance(error, Exception) and not isinstance(error, StopIteration):
        return error
    instead: ForgeError = (
        CallCancelled(endpoint=label, why="it raised CancelledError itself")
        if type(error).__name__ == "CancelledError"
        else RemoteError(
            type_name=type(error).__name__, remote_message=str(error), remote_traceback=str(error.__cause__ or "")
        )
    )
    instead.__cause__ = error.__cause__
    return instead


class Reader:
    """Of calls that have one answer: `route`, `call_one`, `choose`, one rank of a `stream`."""

    __slots__ = ("errors_return", "label", "return_first", "sizes")

    def __init__(
        self,
        label: str,
        *,
        errors_return: bool = False,
        return_first: bool = True,
        sizes: Mapping[str, int] | None = None,
    ) -> None:
        self.label = label
        self.errors_return = errors_return
        self.return_first = return_first
        self.sizes = dict(sizes or {"procs": 1})

    def one(self, status: int, payload: Payload, trusted: bool) -> Any:
        """The value of a RESULTS item. Raises what the endpoint raised, or our error."""
        if status == OK:
            return decode(payload, trusted=trusted)
        if status == RAISED:
            error = raisable(decode_exception(payload, trusted=trusted), self.label)
            if self.errors_return:
                return error
            raise error
        raise failure(payload)

    def parts(self, trusted: bool, points: list[list[int]], statuses: list[int], payloads: list[Payload]) -> Any:
        """The value of a PARTS message: of a call that every rank of one replica answered."""
        return self.mesh(self._ranks(trusted, points, statuses, payloads))

    def _ranks(
        self, trusted: bool, points: list[list[int]], statuses: list[int], payloads: list[Payload]
    ) -> list[Any | _Raised]:
        """What each rank of one replica answered; an error says which rank raised it."""
        parts = [self._part(part, trusted) for part in zip(statuses, payloads, strict=True)]
        if len(parts) > 1:
            for (_, rank), part in zip(points, parts, strict=True):
                if type(part) is _Raised:
                    _note(part.error, f"{self.label}: rank {rank} of {len(parts)}")
        return parts

    def mesh(self, parts: list[Any | _Raised]) -> Any:
        """Rank 0's value or the whole mesh; the first rank's error if one failed."""
        for part in parts:
            if type(part) is _Raised:
                raise part.error
        if not parts:
            raise ProtocolError(f"{self.label}: a reply without parts")
        if self.return_first or math.prod(self.sizes.values()) != len(parts):
            return parts[0]
        return parts[0] if len(parts) == 1 else ValueMesh(self.sizes, parts)

    def _part(self, part: tuple[int, Payload], trusted: bool) -> Any:
        try:
            return Reader.one(self, *part, trusted)
        except Exception as error:
            # Kept to be raised, or to stand in the caller's list: other parts may be fine.
            return _Raised(error)


class _Raised:
    __slots__ = ("error",)

    def __init__(self, error: Exception) -> None:
        self.error = error


def _note(error: Exception, note: str) -> None:
    """Say where it was raised beside the exception, which keeps its type and text (PEP 678)."""
    try:
        error.add_note(note)
    except Exception:
        # A user's class may refuse attributes. Its own text is what the caller needs; ours is not worth losing it.
        return


class MeshReader(Reader):
    """Of an actor's `call`: always a ValueMesh over its ranks."""

    __slots__ = ()

    def one(self, status: int, payload: Payload, trusted: bool) -> Any:
        return ValueMesh(self.sizes, [Reader.one(self, status, payload, trusted)])

    def parts(self, trusted: bool, points: list[list[int]], statuses: list[int], payloads: list[Payload]) -> Any:
        values = self._ranks(trusted, points, statuses, payloads)
        for value in values:
            if type(value) is _Raised:
                raise value.error
        return ValueMesh(self.sizes, values)


class FanoutReader(Reader):
    """Of a service's `fanout`: a list in replica order; a replica of several ranks counts once."""

    __slots__ = ("_every_one_had_it", "return_exceptions")
    return_exceptions: bool
    _every_one_had_it: Callable[[], None] | None

    def __init__(self, label: str, **how: Any) -> None:
        super().__init__(label, **how)
        self.return_exceptions = False
        self._every_one_had_it = None

    def replaying(self, keep: Callable[[], None]) -> FanoutReader:
        """A reader of one fan-out that newcomers are to have as well (A11): `keep` is called if every replica has had it."""
        reader = copy(self)
        reader._every_one_had_it = keep
        return reader

    def parts(self, trusted: bool, points: list[list[int]], statuses: list[int], payloads: list[Payload]) -> list[Any]:
        if self._every_one_had_it is not None and all(status == OK for status in statuses):
            self._every_one_had_it()
        by_replica: dict[int, list[tuple[list[int], int, Payload]]] = {}
        for part in zip(points, statuses, payloads, strict=True):
            by_replica.setdefault(part[0][0], []).append(part)
        results: dict[int, Any] = {}
        errors: dict[int, BaseException] = {}
        for replica in sorted(by_replica):
            ranks = sorted(by_replica[replica], key=lambda one: one[0])
            try:
                results[replica] = self.mesh(
                    self._ranks(
                        trusted, [at for at, _, _ in ranks], [how for _, how, _ in ranks], [p for *_, p in ranks]
                    )
                )
            except Exception as error:
                # Told to the caller below, with those of the other replicas.
                errors[replica] = error
        if errors and not self.return_exceptions:
            raise FanoutError(self.label, results, errors)
        return [results[replica] if replica in results else errors[replica] for replica in sorted(by_replica)]

    def one(self, status: int, payload: Payload, trusted: bool) -> Any:
        """No part at all: the fan-out failed as a whole."""
        if status in (OK, RAISED):
            return self.parts(trusted, [[0, 0]], [status], [payload])
        raise failure(payload)
