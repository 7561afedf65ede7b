"""Client, broker core and workers face to face in one process, under a virtual clock, over a network that loses what ZeroMQ loses.

The parties are the real ones: `Broker`, `ClientLink`, `WorkerLink`; what is simulated is sockets, processes and time. After every event the
broker's invariants are checked. Nothing here knows what a test is about:

    world = World()
    client = world.client()
    service = client.deploy(replicas=2)
    call = client.call(service, "echo", b"hello")
    world.run_until(lambda: call.done)
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

from forge_broker.core import invariants
from forge_broker.core.actions import (
    Action,
    Deliver,
    Exit,
    Kill,
    KillPeer,
    Launch,
    Look,
    Note,
    Send,
    Sweep,
    Unlink,
    Watch,
)
from forge_broker.core.broker import Broker
from forge_broker.core.events import Event, LaunchEnded, ProcessGone, Received, Stopped, Terminate, Unroutable, Watched
from forge_broker.core.state import State
from forge_contract.config import BrokerConfig
from forge_contract.messages import FAILED, OK, RAISED
from tests.face_to_face.memory import Memory
from tests.face_to_face.network import Clock, Connection
from tests.face_to_face.parties import HERE, Peer, Reply, SimClient, SimWorker

ADDRESS = 0  # the one address of the simulated broker, trusted


class World:
    """One broker and everything around it. `delay_s`: seconds an envelope travels. `memory`: what peers of the broker's host share."""

    def __init__(
        self,
        seed: int = 0,
        *,
        delay_s: float = 0.001,
        watch: bool = True,
        memory: Memory | None = None,
        **config: Any,
    ) -> None:
        self.random = random.Random(seed)
        self.clock = Clock()
        self.config = BrokerConfig(**config)
        self.delay_s = delay_s
        self.watch = watch  # processes of this host are held by pidfds
        self.memory = memory
        self.load_s = 0.1
        self.load_failure: bytes | None = None
        self.launch_s = 0.05
        self.duplicates = 0.0  # the share of envelopes that arrive twice
        self.faults: Counter[str] = Counter()
        self.notes: list[Note] = []
        self.history: list[tuple[str, int, int]] = []  # (worker, request, attempt) as calls start
        self.replays: list[tuple[str, bytes]] = []  # (worker, arguments) as they are played
        self.states_lost: set[str] = set()  # sessions whose worker died with their states as no broker had them
        self.ended: Counter[tuple[str, bytes]] = Counter()  # (session, arguments) as calls of sessions end
        self._unheard_before = 0  # of the brokers before this one
        self._unheard_here = 0  # of this one, as far as it has been looked at
        self.exited = False
        self.routes: dict[bytes, Connection] = {}
        self.peers: dict[str, Peer] = {}
        self.launched: dict[int, SimWorker | None] = {}
        self.actor: Callable[[SimWorker, int, bytes], tuple[float, int, bytes]] = lambda worker, method, payload: (
            0.01,
            OK,
            payload,
        )
        self._pids = 100
        self._routing_ids = 0
        self._waiting: dict[str, None] = {}
        self._tick_at: float | None = None
        self._seed = seed
        self._incarnation = 6
        self.broker_is_down = False
        self.broker = self._new_broker(recovering=False)

    def _new_broker(self, *, recovering: bool) -> Broker:
        self._incarnation += 1
        return Broker(
            State(
                self.config,
                incarnation=self._incarnation,
                host=HERE,
                trusted=[True],
                random=random.Random(self._seed + self._incarnation),
                unpickle=lambda code: None,
                now=self.clock.now,
                segments=None if self.memory is None else self.memory.segments,
                recovering=recovering,
            )
        )

    def kill_broker(self, back_after_s: float = 0.5) -> None:
        """SIGKILL; a new one is started at the same address. It knows nothing, and none of the processes is its child."""
        self.faults["broker killed"] += 1
        self.broker_is_down = True
        self.launched.clear()
        self._waiting.clear()
        for peer in list(self.peers.values()):
            peer.connection.lose_the_broker()

        def started() -> None:
            self.broker_is_down = False
            self._unheard_before, self._unheard_here = self.unheard, 0
            self.broker = self._new_broker(recovering=True)
            self._tick_at = None
            self._schedule_tick()

        self.clock.at(self.clock.now + back_after_s, started)

    # Making things.

    def next_pid(self) -> int:
        self._pids += 1
        return self._pids

    def new_routing_id(self) -> bytes:
        self._routing_ids += 1
        return self._routing_ids.to_bytes(4, "big")

    def delay(self) -> float:
        return self.delay_s * (0.5 + self.random.random())

    def client(self, name: str | None = None, **kwargs: Any) -> SimClient:
        client = SimClient(self, name or f"c-{len(self.peers):016x}", **kwargs)
        self.peers[client.link.name] = client
        return client

    def worker(self, **kwargs: Any) -> SimWorker:
        worker = SimWorker(self, f"w-{len(self.peers):016x}", **kwargs)
        self.peers[worker.link.name] = worker
        return worker

    # The broker's shell.

    def receive(self, routing_id: bytes, frames: list[Any]) -> None:
        self.event(Received((ADDRESS, routing_id), frames))

    def event(self, event: Event) -> None:
        if self.broker_is_down:
            return
        self._carry_out(self.broker.handle(event, self.clock.now))
        self._carry_out(self.broker.tick(self.clock.now))
        self._settled()

    def _settled(self) -> None:
        self._send_waiting()
        invariants.check(self.broker)
        self._schedule_tick()

    def _schedule_tick(self) -> None:
        due = self.broker.next_deadline()
        if due is not None and (self._tick_at is None or due < self._tick_at):
            self._tick_at = due
            self.clock.at(due, partial(self._tick, due))

    def _tick(self, when: float) -> None:
        if when != self._tick_at:
            return  # something earlier came up since, and whoever looked then has asked again
        self._tick_at = None
        if self.broker_is_down:
            return
        self._carry_out(self.broker.tick(self.clock.now))
        self._settled()

    def _send_waiting(self) -> None:
        while self._waiting:
            waiting, self._waiting = self._waiting, {}
            for name in waiting:
                send = self.broker.pack(name, self.clock.now)
                if send is not None:
                    self._send(send)

    def _send(self, send: Send) -> None:
        connection = self.routes.get(send.route[1])
        if connection is None:
            self._carry_out(self.broker.handle(Unroutable(send.route), self.clock.now))
        else:
            connection.to_peer(send.frames)

    def _carry_out(self, actions: list[Action]) -> None:
        # Before anything is done: who was kept from speaking may be killed for it.
        heard = self.broker.state.counters["recovery_unheard"]
        if heard > self._unheard_here:
            self._unheard_here = heard
            assert any(peer.is_kept_from_speaking for peer in self.peers.values()), (
                f"the recovery window has ended without {heard} peers, and nothing kept them from speaking"
            )
        for action in actions:
            if isinstance(action, Deliver):
                self._waiting[action.name] = None
            elif isinstance(action, Send):
                self._send(action)
            elif isinstance(action, Note):
                self.notes.append(action)
            elif isinstance(action, Launch):
                self._launch(action)
            elif isinstance(action, Watch):
                if self.watch and action.host == HERE:
                    self._carry_out(self.broker.handle(Watched(action.name), self.clock.now))
                    watched = self.peers.get(action.name)
                    if watched is not None and not watched.alive:
                        self.process_ended(watched)
            elif isinstance(action, Kill):
                self._kill(action.launch)
            elif isinstance(action, KillPeer):
                self.peers[action.name].die()
            elif isinstance(action, Look):
                peer = self.peers.get(action.name)
                if peer is not None and peer.alive and peer.stopped:
                    self._carry_out(self.broker.handle(Stopped(action.name), self.clock.now))
            elif isinstance(action, Unlink) and self.memory is not None:
                self.memory.segments.unlink(action.owner)
            elif isinstance(action, Sweep) and self.memory is not None:
                self.memory.segments.sweep(action.living)
            elif isinstance(action, Exit):
                self.exited = True

    def _launch(self, launch: Launch) -> None:
        self.launched[launch.launch] = None

        def started() -> None:
            if launch.launch in self.launched:
                self.launched[launch.launch] = self.worker(launch=launch.launch, gpus=launch.gpus)

        self.clock.at(self.clock.now + self.launch_s, started)

    def _kill(self, launch: int) -> None:
        worker = self.launched.get(launch)
        if worker is not None:
            worker.die()
        elif self.launched.pop(launch, "gone") is None:
            self.clock.at(self.clock.now, lambda: self.event(LaunchEnded(launch, "signal SIGKILL", [])))

    def process_ended(self, peer: Peer) -> None:
        """The kernel tells: the scaler for its children, a pidfd for the others of this host, nobody for other hosts."""
        if (
            isinstance(peer, SimWorker)
            and peer.counts
            and (self.broker_is_down or self.broker.state.window is not None)
        ):
            self.states_lost |= set(peer.counts)
        if isinstance(peer, SimWorker) and self.launched.get(peer.launch) is peer:
            del self.launched[peer.launch]
            launch = peer.launch
            self.clock.at(self.clock.now, lambda: self.event(LaunchEnded(launch, "signal SIGKILL", ["last line"])))
        elif self.watch and peer.host == HERE:
            name = peer.link.name
            self.clock.at(self.clock.now, lambda: self.event(ProcessGone(name)))

    def terminate(self) -> None:
        self.event(Terminate("a test"))

    # Time.

    def run_until(self, done: Callable[[], bool], within_s: float = 120.0) -> None:
        """Let things happen until `done`; fails when it is not by then."""
        until = self.clock.now + within_s
        while not done():
            if not self.clock.step(until):
                raise AssertionError(f"not done within {within_s} virtual seconds; {self.broker!r}, {self.notes[-5:]}")

    def run_for(self, seconds: float) -> None:
        until = self.clock.now + seconds
        while self.clock.step(until):
            pass
        self.clock.now = until

    # Looking.

    @property
    def unheard(self) -> int:
        """How many peers had not said what they had to say when a recovery window ended."""
        return self._unheard_before + self.broker.state.counters["recovery_unheard"]

    def workers_of(self, replica: str) -> list[SimWorker]:
        return [
            worker
            for worker in self.peers.values()
            if isinstance(worker, SimWorker)
            and worker.alive
            and worker.assignment is not None
            and f"{worker.assignment.name}/{worker.assignment.replica}" == replica
        ]

    def starts(self) -> list[tuple[int, int]]:
        """(request, attempt) of every call that started anywhere, in order."""
        return [(request, attempt) for _, request, attempt in self.history]


__all__ = ["FAILED", "HERE", "OK", "RAISED", "Reply", "SimClient", "SimWorker", "World"]
