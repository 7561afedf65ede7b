"""What peers leave in shared memory (PROTOCOL.md §9.1), and when it may be removed. The shell removes it.

A client's segments hold arguments of calls that nobody waits for any more: they go at once. A worker's hold results that were
answered with and may not have been read: they stay until their clients have acknowledged the envelopes these came in. In a recovery
window, and for a client that is late for it, nobody has been answered yet.
"""

from __future__ import annotations

from typing import Final

from forge_broker.core.actions import Unlink
from forge_broker.core.deadlines import Kind
from forge_broker.core.links import Link
from forge_broker.core.state import State
from forge_broker.core.workers import Worker

LOOK_AGAIN_S: Final = (
    0.25  # an acknowledgement is owed for 0.1 s at most; a caller whose loop stands still takes longer
)
LAST_LOOK_S: Final = 1.0  # so long a broker that ends waits for it


class Leftovers:
    def __init__(self, state: State) -> None:
        self._state = state

    def of(self, link: Link, now: float) -> None:
        """This peer is gone."""
        if link.unshared is not None:
            return
        if isinstance(link, Worker):
            self._state.unread[link.name] = link, now
            self.look(link.name, now)
        else:
            self._state.actions.append(Unlink(link.name))

    def look(self, name: str, now: float) -> None:
        """Have its last replies been read?"""
        state = self._state
        if name in state.links or name not in state.unread:
            state.unread.pop(name, None)  # it came back, under a new epoch
            return
        worker, since = state.unread[name]
        worker.settle()
        unread = worker.unsettled or self._is_quoted(worker)
        if unread and not (state.terminating and now - since >= LAST_LOOK_S):
            state.deadlines.add(now + LOOK_AGAIN_S, Kind.UNREAD, name)
            return
        del state.unread[name]
        state.actions.append(Unlink(name))

    def _is_quoted(self, worker: Worker) -> bool:
        """Whether a result that it told us after our predecessor's death has not been asked for yet."""
        state = self._state
        claims = state.claims if state.window is None else state.window.claims
        return any(worker in claim.told.values() for claim in claims.values())
