"""Calls sent ahead of room (R1): how many more than it may run at once a replica is given, while calls wait that it ends in microseconds.

A replica with room for ten that ends ten calls in the time of a round trip to it does nothing for most of that time. So, while calls wait
and nobody has room, we look every `LOOK_S` how many each replica has ended since, and widen its room to what it ends in the
service's `dispatch_ahead_s`. The worker keeps to what it may run at once; the others wait there rather than here, and no longer than that.

When a replica slows down, what was sent ahead is stuck behind what it runs, while others may be free. Then its room is what it was, and it
is told to give back what it has not begun (RECALL). Calls that run for longer than a round trip are never sent ahead.
"""

from __future__ import annotations

from typing import Final

from forge_broker.core.deadlines import Kind
from forge_broker.core.dispatch import LOOK_S, Dispatch
from forge_broker.core.replicas import AHEAD_AT_MOST, Replica
from forge_broker.core.state import State
from forge_contract.messages import RECALL

PATIENCE: Final = 10.0  # in `dispatch_ahead_s`: what would take a replica longer to begin is called back
SHARE: Final = 100  # with more replicas than that, looks are rarer


def widened(limit: int, ended: int, elapsed_s: float, ahead_s: float) -> int:
    """The room of a replica that runs `limit` at once and has ended so many units in `elapsed_s` seconds."""
    return max(limit, min(int(ended * ahead_s / elapsed_s), limit + AHEAD_AT_MOST))


def is_stuck(ahead: int, ended: int, elapsed_s: float, ahead_s: float) -> bool:
    """Whether so many that wait at a replica wait too long, at the pace at which it has ended so many units in `elapsed_s` seconds."""
    return ahead * elapsed_s > PATIENCE * ahead_s * ended


class Ahead:
    def __init__(self, state: State, dispatch: Dispatch) -> None:
        self._state = state
        self._dispatch = dispatch

    def look(self, service_id: int, now: float) -> None:
        """Some of its calls waited and nobody had room, or some were sent ahead, when we looked last."""
        service = self._state.services.get(service_id)
        if service is None:
            return
        elapsed_s, service.looked_at = now - service.looked_at, now
        interval_s = LOOK_S * max(1.0, len(service.pool) / SHARE)
        ahead = False
        for replica in service.pool:
            ended = replica.pace.since_last_look()
            # After a longer time than that we do not know when they were ended.
            if elapsed_s > 2 * interval_s or self._slows(replica, ended, elapsed_s, now):
                room = replica.limit
            else:
                room = widened(replica.limit, ended, elapsed_s, service.ahead_s)
            if room != replica.room:
                service.pool.resize(replica, room)
            ahead = ahead or max(room, replica.active) > replica.limit
        self._dispatch.pump(service, now)
        service.looking = ahead or bool(service.ready)
        if service.looking:
            self._state.deadlines.add(now + interval_s, Kind.AHEAD, service_id)

    def _slows(self, replica: Replica, ended: int, elapsed_s: float, now: float) -> bool:
        """Whether it has more than it may run and is slow to end it: then it is told to give back the rest, once."""
        pace = replica.pace
        ahead = replica.active - replica.limit
        if ahead <= 0:
            pace.crowded = pace.recalled = False
            return False
        # What came a moment ago may be why it has ended little.
        if pace.crowded and not pace.recalled and is_stuck(ahead, ended, elapsed_s, replica.service.ahead_s):
            pace.recalled = True
            self._state.story.tell(now, replica.name, f"slower than before: {ahead} calls sent ahead are called back")
            for worker in replica.ranks_for(None):
                worker.post([RECALL])
                self._state.deliver(worker)
        pace.crowded = True
        return pace.recalled
