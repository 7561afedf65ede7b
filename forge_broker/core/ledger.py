"""Which replica holds which request (C4). `dispatch` adds when it sends and takes when a reply comes; `release` is the only
other way out. When a replica counts as lost is the business of `lifecycle`, not ours.

Fencing: a reply is accepted only for the attempt that is current under the replica's current epoch; everything else
is refused and counted (W3).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from forge_broker.core.requests import Request


class Ledger:
    """In flight: `held[replica.key]` has the requests of one replica by id, in the order of their dispatch. `dispatch` adds and
    deletes there, once per call; nobody else does."""

    def __init__(self) -> None:
        self.held: defaultdict[int, dict[int, Request]] = defaultdict(dict)
        self.fenced = 0  # replies refused, because their attempt or epoch was not the current one

    def __repr__(self) -> str:
        return (
            f"<Ledger {sum(map(len, self.held.values()))} in flight on {len(self.held)} replicas, {self.fenced} fenced>"
        )

    def release(self, replica: Any) -> list[Request]:
        """All that the replica holds, in the order of dispatch; it holds nothing afterwards."""
        return list(self.held.pop(replica.key, {}).values())

    def __iter__(self) -> Iterator[tuple[int, Request]]:
        for key, held in self.held.items():
            for request in held.values():
                yield key, request
