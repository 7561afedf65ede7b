"""Time and the network of the simulation. The network's faults are ZeroMQ's: a broken connection loses in silence what is in
its pipes, and the new one has another routing id; a half-open one swallows one direction until the heartbeats of ZMTP end it.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from tests.face_to_face.parties import Peer
    from tests.face_to_face.world import World

BACK_S: Final = 0.5  # a hello, its welcome and what was kept, at the slowest


class Clock:
    """Virtual time: jumps to the next thing that happens."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0

    def at(self, when: float, do: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._heap, (max(when, self.now), self._count, do))

    def step(self, until: float) -> bool:
        """Do the next thing, if there is one by `until`."""
        if not self._heap or self._heap[0][0] > until:
            return False
        self.now, _, do = heapq.heappop(self._heap)
        do()
        return True


class Connection:
    """What is between one peer and the broker."""

    def __init__(self, world: World, peer: Peer) -> None:
        self.world = world
        self.peer = peer
        self.routing_id = world.new_routing_id()
        self.up = True
        self.swallow_to_broker = False
        self.swallow_to_peer = False
        self._generation = 0
        self._back_at = -BACK_S
        self._last = {"to_broker": 0.0, "to_peer": 0.0}

    def hindered(self, now: float) -> bool:
        """Whether it is down or swallows something; or has just been, and what is said since is still on its way."""
        return not self.up or self.swallow_to_broker or self.swallow_to_peer or now - self._back_at < BACK_S

    def used_again(self, now: float) -> None:
        """Its peer slept, and speaks by it as by one that was made anew."""
        self._back_at = now

    def to_broker(self, frames: list[Any]) -> None:
        if not self.up or self.swallow_to_broker:
            return
        copy = [bytes(frame) for frame in frames]
        routing_id = self.routing_id
        self._deliver("to_broker", lambda: self.world.receive(routing_id, copy))

    def to_peer(self, frames: list[Any]) -> None:
        if not self.up or self.swallow_to_peer:
            return
        copy = [bytes(frame) for frame in frames]
        self._deliver("to_peer", lambda: self.peer.receive(copy))

    def _deliver(self, direction: str, do: Callable[[], None]) -> None:
        """In order, after a delay; not at all if the connection breaks before."""
        generation = self._generation
        when = max(self.world.clock.now + self.world.delay(), self._last[direction])
        self._last[direction] = when

        def arrive() -> None:
            if generation == self._generation and self.up:
                do()

        self.world.clock.at(when, arrive)
        if self.world.random.random() < self.world.duplicates:
            self.world.faults["duplicate"] += 1
            self.world.clock.at(when, arrive)

    def reconnect(self, after: float = 0.02) -> None:
        """The connection breaks; the new one has another routing id. What was in the pipes is lost, and nobody is told but the peer."""
        self.world.faults["reconnect"] += 1
        self.cut()
        generation = self._generation
        self.world.clock.at(
            self.world.clock.now + after, lambda: self.back() if generation == self._generation else None
        )

    def cut(self) -> None:
        """It breaks, and nobody is at the other end."""
        self.world.routes.pop(self.routing_id, None)
        self._generation += 1
        self.up = False
        if self.peer.alive and not self.peer.paused:
            self.peer.disconnected()

    def lose_the_broker(self) -> None:
        self.cut()
        generation = self._generation
        when = self.world.clock.now + self.world.random.random() * 0.5
        self.world.clock.at(when, lambda: self.back() if generation == self._generation else None)

    def back(self) -> None:
        """It is made anew, as soon as there is somebody to connect to."""
        if not self.peer.alive:
            return
        if self.world.broker_is_down:
            generation = self._generation
            later = self.world.clock.now + 0.1
            self.world.clock.at(later, lambda: self.back() if generation == self._generation else None)
            return
        self.routing_id = self.world.new_routing_id()
        self.world.routes[self.routing_id] = self
        self.up = True
        self._back_at = self.world.clock.now
        self.swallow_to_broker = self.swallow_to_peer = False
        if self.peer.paused:
            self.peer.reconnected_meanwhile = True
        else:
            self.peer.link.reconnected(self.world.clock.now)
            self.peer.flush()

    def half_open(self, *, to_broker: bool, seconds: float = 6.0) -> None:
        """One direction swallows everything, until ZMTP's heartbeats notice and the connection is made anew."""
        if to_broker:
            self.swallow_to_broker = True
        else:
            self.swallow_to_peer = True
        self.world.faults["half_open"] += 1
        generation = self._generation
        self.world.clock.at(
            self.world.clock.now + seconds, lambda: self.reconnect() if generation == self._generation else None
        )
