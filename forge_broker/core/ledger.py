"""Which replica holds which request (C4). `dispatch` adds when it sends and takes when a reply comes; `release` is the only
other way out. When a replica counts as lost is the business of `lifecycle`, not ours.

Fencing: a reply is accepted only for the attempt that is current under the replica's current epoch; everything else
is refused and counted (W3).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from forge_broker.core.requests import Request, Slice
from forge_contract.messages import client_of, sequence_of


class Ledger:
    """In flight: `held[replica.key]` has the requests of one replica by id, in the order of their dispatch; those of a Slice have that
    instead. `dispatch` adds and deletes there, nobody else does."""

    def __init__(self) -> None:
        self.held: defaultdict[int, dict[int, Request | Slice]] = defaultdict(dict)
        self.fenced = 0  # replies refused, because their attempt or epoch was not the current one

    def __repr__(self) -> str:
        return (
            f"<Ledger {sum(map(len, self.held.values()))} in flight on {len(self.held)} replicas, {self.fenced} fenced>"
        )

    def of(self, replica: Any) -> list[Request]:
        """All that the replica holds, in the order of dispatch, one by one."""
        held = self.held[replica.key]
        for one in set(held.values()):
            if type(one) is Slice:
                one.split()
        return [one for one in held.values() if type(one) is Request]

    def one(self, replica: Any, key: int) -> Request | None:
        """A call that the replica holds, by itself."""
        held = self.held[replica.key]
        request = held.get(key)
        if type(request) is Slice:
            request.split()
            request = held[key]
        return request  # type: ignore[return-value]  # split, it is no Slice any more

    def last_sequence(self, client: int) -> int:
        """The highest of this client's calls that are in flight, 0 when none is: one that was given up leaves such calls behind, and may
        come back under its id."""
        return max(
            (sequence_of(key) for held in self.held.values() for key in held if client_of(key) == client), default=0
        )

    def release(self, replica: Any) -> list[Request]:
        """All that the replica holds, in the order of dispatch; it holds nothing afterwards."""
        released = self.of(replica)
        del self.held[replica.key]
        return released

    def __iter__(self) -> Iterator[tuple[int, int, Request | Slice]]:
        """Replica key, id, and what holds that call."""
        for key, held in self.held.items():
            for request, one in held.items():
                yield key, request, one
