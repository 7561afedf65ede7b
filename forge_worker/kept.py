"""Replies that a worker keeps until their callers have them (design F10, PROTOCOL.md §8). No I/O.

What the broker has acknowledged it has in memory, and a broker that dies takes it along. Its successor asks who we are,
and is told what the calls came to that no client is known to have the result of, so that none of them runs again.

What is kept is the columns as they were sent, one entry for each envelope: nothing is done for a single call.
"""

from __future__ import annotations

from collections import deque
from itertools import chain
from typing import NamedTuple

from forge_contract.framing import Payload
from forge_contract.segments import Handle


class Columns(NamedTuple):
    """Replies as they are gathered, one item each."""

    ids: list[int]
    attempts: list[int]
    statuses: list[int]
    payloads: list[Payload]


class _Entry(NamedTuple):
    number: int  # of the envelope, in the link's present epoch
    size: int  # bytes, of all its frames
    columns: Columns


class KeptReplies:
    """`limit`: bytes; past it the oldest go first, whose callers have waited longest for a broker to tell us so."""

    def __init__(self, limit: int = 0) -> None:
        self.limit = limit
        self.bytes = 0
        self._entries: deque[_Entry] = deque()
        self._leases: deque[tuple[int, list[Handle]]] = deque()  # of entries that were dropped, by number

    def __repr__(self) -> str:
        return f"<KeptReplies of {len(self._entries)} envelopes, {self.bytes} of {self.limit} B>"

    def __bool__(self) -> bool:
        return bool(self._entries)

    def keep(self, number: int, size: int, columns: Columns) -> None:
        """These have left as envelope `number`."""
        self._entries.append(_Entry(number, size, columns))
        self.bytes += size
        while self.bytes > self.limit:
            entry = self._entries.popleft()
            self.bytes -= entry.size
            # They will not be sent again, but what they lie in must not be used again before their callers have looked.
            leases = [
                one
                for payload in entry.columns.payloads
                if type(payload) is list
                for one in payload
                if type(one) is Handle
            ]
            if leases:
                self._leases.append((entry.number, leases))

    def settled(self, number: int) -> None:
        """The callers have all up to envelope `number`."""
        entries = self._entries
        while entries and entries[0].number <= number:
            self.bytes -= entries.popleft().size
        while self._leases and self._leases[0][0] <= number:
            self._leases.popleft()

    def take(self) -> Columns | None:
        """All of them, oldest first, to be sent under a new number. None: there is none."""
        if not self._entries:
            return None
        columns = zip(*(entry.columns for entry in self._entries), strict=True)
        taken = Columns(*(list(chain.from_iterable(column)) for column in columns))
        self.clear()
        return taken

    def clear(self) -> None:
        self._entries.clear()
        self._leases.clear()
        self.bytes = 0
