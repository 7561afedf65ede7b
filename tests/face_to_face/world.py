"""Client, broker core and workers face to face in one process, under a virtual clock, over a network that loses what ZeroMQ loses.

The parties are the real ones: `Broker`, `ClientLink`, `WorkerLink`; what is simulated is sockets, processes and time. After every event the
broker's invariants are checked. Nothing here knows what a test is about:

    world = World()
    client = world.client()
    service = client.deploy(replicas=2)
    call = client.call(service, "echo", b"hello")
    world.run_until(lambda: call.done)

The network's faults are ZeroMQ's: a broken connection loses in silence what is in its pipes, and the new one has another routing id;
a half-open one swallows one direction until the heartbeats of ZMTP end it.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import msgpack

from forge_broker.core import invariants
from forge_broker.core.actions import Action, Deliver, Exit, Kill, KillPeer, Launch, Note, Send, Watch
from forge_broker.core.broker import Broker
from forge_broker.core.events import Event, LaunchEnded, ProcessGone, Received, Terminate, Unroutable, Watched
from forge_client.link import ClientLink, Extras
from forge_contract.config import BrokerConfig, EndpointOptions, ServiceConfig
from forge_contract.errors import ForgeError
from forge_contract.framing import encode
from forge_contract.messages import FAILED, HEARTBEAT, OK, RAISED
from forge_contract.peer_link import LinkState, PeerLink
from forge_worker.link import Assign, Drop, Run, Stop, WorkerLink

HERE = "this-host"
ADDRESS = 0  # the one address of the simulated broker, trusted


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
        self._last = {"to_broker": 0.0, "to_peer": 0.0}

    def to_broker(self, frames: list[Any]) -> None:
        if not self.up or self.swallow_to_broker:
            return
        copy = [bytes(frame) for frame in frames]
        self._deliver("to_broker", lambda: self.world.receive(self.routing_id, copy))

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

    def reconnect(self, after: float = 0.02) -> None:
        """The connection breaks; the new one has another routing id. What was in the pipes is lost, and nobody is told but the peer."""
        self.world.routes.pop(self.routing_id, None)
        self._generation += 1
        self.up = False
        self.world.faults["reconnect"] += 1

        def back() -> None:
            if self.peer.alive:
                self.routing_id = self.world.new_routing_id()
                self.world.routes[self.routing_id] = self
                self.up = True
                self.swallow_to_broker = self.swallow_to_peer = False
                self.peer.link.reconnected(self.world.clock.now)
                self.peer.flush()

        self.world.clock.at(self.world.clock.now + after, back)

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


class Peer:
    """A process with a link: a client or a worker."""

    link: PeerLink

    def __init__(self, world: World, host: str) -> None:
        self.world = world
        self.host = host
        self.alive = True
        self.paused = False
        self._held: list[list[Any]] = []
        self._wake_at: float | None = None
        self.pid = world.next_pid()
        self.connection = Connection(world, self)
        world.routes[self.connection.routing_id] = self.connection

    def identity(self) -> dict[str, Any]:
        return {"host": self.host, "hostname": self.host, "pid": self.pid, "pid_namespace": 1, "started": self.pid}

    def receive(self, frames: list[Any]) -> None:
        if not self.alive:
            return
        if self.paused:
            self._held.append(frames)
            return
        self.link.receive(frames, self.world.clock.now)
        self.after_receive()
        self.flush()

    def after_receive(self) -> None:
        """Carry out what came in."""

    def flush(self) -> None:
        """The end of a turn of its loop."""
        if not self.alive or self.paused:
            return
        now = self.world.clock.now
        for frames in self.link.flush(now):
            self.connection.to_broker(frames)
        due = self.link.next_deadline()
        if due is not None and (self._wake_at is None or due < self._wake_at):
            self._wake_at = due
            self.world.clock.at(due, self._wake)

    def _wake(self) -> None:
        self._wake_at = None
        self.flush()

    def beat(self) -> None:
        """Its heartbeat thread."""
        if not self.alive:
            return
        if not self.paused and self.link.incarnation and self.link.state is LinkState.OPEN:
            link = self.link
            self.connection.to_broker(
                encode(link.name, link.channel.epoch, link.incarnation, 0, 0, [[HEARTBEAT, {"oldest_s": 0.0}]])
            )
        self.world.clock.at(self.world.clock.now + self.world.config.heartbeat_s, self.beat)

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False
        held, self._held = self._held, []
        for frames in held:
            self.receive(frames)
        self.flush()

    def die(self) -> None:
        """SIGKILL."""
        if not self.alive:
            return
        self.alive = False
        self.connection.up = False
        self.world.routes.pop(self.connection.routing_id, None)
        self.world.process_ended(self)


class Reply:
    """What a caller sees of one call."""

    def __init__(self) -> None:
        self.replies = 0
        self.status: int | None = None
        self.payload: Any = None
        self.trusted: bool | None = None
        self.points: list[list[int]] | None = None
        self.sequence = 0

    @property
    def done(self) -> bool:
        return self.replies > 0

    @property
    def error(self) -> str | None:
        """The name of one of our errors, if that is the reply."""
        return msgpack.unpackb(self.payload)[0] if self.status == FAILED else None

    def take(self, status: int | None, payload: Any, trusted: bool) -> None:
        self.replies += 1
        self.status, self.payload, self.trusted = status, payload, trusted


class Answer:
    def __init__(self) -> None:
        self.done = False
        self.ok = False
        self.fields: dict[str, Any] = {}
        self.payload: Any = None

    @property
    def error(self) -> str | None:
        return None if self.ok or "error" not in self.fields else str(self.fields["error"][0])


class SimClient(Peer):
    """A client process; it is the listener of its own link."""

    def __init__(self, world: World, name: str, host: str = HERE, *, detached: bool = False) -> None:
        super().__init__(world, host)
        self.link: ClientLink = ClientLink(
            name, world.clock.now, hello=self.identity(), listener=self, detached=detached
        )
        self.notices: list[tuple[str, dict[str, Any]]] = []
        self.refusal: ForgeError | None = None
        self.lost_waiters: list[Any] = []
        self.beat()
        self.flush()

    def deploy(self, wait: bool = True, *, kind: str = "service", endpoints: Any = None, **config: Any) -> Any:
        """Deploy a class with these endpoints (name → options); the description, or the Answer when not waiting."""
        listed = [
            {
                "name": name,
                "router": options.pop("router", {"name": "RoundRobinRouter", "options": {}}),
                "options": options,
            }
            for name, options in ((name, dict(options)) for name, options in (endpoints or {"echo": {}}).items())
        ]
        for one in listed:
            one["options"] = EndpointOptions(**one["options"]).to_wire()
        spec = {
            "class_name": "Sim",
            "kind": kind,
            "target": {"ref": "sim:Sim"},
            "endpoints": listed,
            "config": ServiceConfig(**config).to_wire(),
        }
        answer = self.control("deploy", {"spec": spec}, b"init")
        if not wait:
            return answer
        self.world.run_until(lambda: answer.done)
        assert answer.ok, answer.fields
        return answer.fields

    def control(self, op: str, fields: dict[str, Any], payload: bytes = b"") -> Answer:
        answer = Answer()
        self.link.control(op, fields, payload, answer)
        self.flush()
        return answer

    def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        answer = self.control(op, fields)
        self.world.run_until(lambda: answer.done)
        assert answer.ok, answer.fields
        return answer.fields

    def call(
        self,
        service: dict[str, Any],
        endpoint: str = "echo",
        payload: bytes = b"x",
        *,
        flush: bool = True,
        session: str | None = None,
        timeout: float | None = None,
        priority: int = 0,
        rank: int | None = None,
        hints: dict[str, Any] | None = None,
    ) -> Reply:
        reply = Reply()
        deadline = None if timeout is None else self.world.clock.now + timeout
        order = session or (service["service"] if service["kind"] == "actor" else None)
        extras = Extras(deadline, session, priority, hints, rank)
        reply.sequence = self.link.submit(
            service["endpoints"][endpoint], payload, reply, None if extras == Extras() else extras, order
        )
        if flush:
            self.flush()
        return reply

    def fanout(self, service: dict[str, Any], endpoint: str = "echo", payload: bytes = b"x") -> Reply:
        reply = Reply()
        reply.sequence = self.link.fanout(service["endpoints"][endpoint], payload, reply)
        self.flush()
        return reply

    # Listener.

    def welcomed(self, fields: dict[str, Any]) -> None:
        pass

    def refused(self, error: ForgeError) -> None:
        self.refusal = error

    def lost(self, waiters: list[Any], controls: list[Any]) -> None:
        self.lost_waiters += waiters

    def results(self, trusted: bool, waiters: list[Any], statuses: list[int], payloads: list[Any]) -> None:
        for waiter, status, payload in zip(waiters, statuses, payloads, strict=True):
            if waiter is not None:
                waiter.take(status, payload, trusted)

    def parts(
        self, trusted: bool, waiter: Any, points: list[list[int]], statuses: list[int], payloads: list[Any]
    ) -> None:
        if waiter is not None:
            waiter.points = points
            waiter.take(None, list(zip(statuses, payloads, strict=True)), trusted)

    def answer(self, waiter: Any, ok: bool, fields: dict[str, Any], payload: Any) -> None:
        assert not waiter.done, "a control was answered twice"
        waiter.done, waiter.ok, waiter.fields, waiter.payload = True, ok, fields, payload

    def notice(self, topic: str, fields: dict[str, Any]) -> None:
        self.notices.append((topic, fields))


class SimWorker(Peer):
    """A worker process with a stand-in for the actor: `world.actor` says how long a call takes and what comes of it."""

    def __init__(
        self, world: World, name: str, *, launch: int = 0, gpus: tuple[str, ...] = (), host: str = HERE
    ) -> None:
        super().__init__(world, host)
        self.launch = launch
        self.link: WorkerLink = WorkerLink(
            name, world.clock.now, identity=self.identity(), gpus=gpus, labels={}, launch=launch
        )
        self.started: list[tuple[int, int, bytes, str | None]] = []  # (request, attempt, payload, session) in order
        self.assignment: Any = None
        self.begun: tuple[str, int] | None = None
        self._ended: dict[int, int] = {}
        self.beat()
        self.flush()

    def after_receive(self) -> None:
        for instruction in self.link.take():
            if isinstance(instruction, Assign):
                self.assignment = instruction.assignment
                self._load()
            elif isinstance(instruction, Run):
                self._run(instruction)
            elif isinstance(instruction, Drop):
                pass  # a thread: it runs to its end, and the broker does not wait for what comes of it
            elif isinstance(instruction, Stop):
                self._leave(instruction.reason)

    def _load(self) -> None:
        if self.assignment.rank == 0 and self.assignment.world > 1:
            self.link.master("127.0.0.1", 40_000 + self.pid)
        self._later(self.world.load_s, self._loaded)

    def _loaded(self) -> None:
        failure = self.world.load_failure
        if failure is not None:
            self.link.unready(None, failure)
            self._leave("could not start")
        else:
            self.link.ready()
        self.flush()

    def _run(self, run: Run) -> None:
        for request, attempt, payload, session in zip(run.ids, run.attempts, run.payloads, run.sessions, strict=True):
            self.started.append((request, attempt, bytes(payload), session))
            self.world.history.append((self.link.name, request, attempt))
            seconds, status, result = self.world.actor(self, run.method, bytes(payload))
            self._later(seconds, partial(self._finish, request, attempt, status, result))

    def _finish(self, request: int, attempt: int, status: int, payload: bytes) -> None:
        if self.link.running.get(request) == attempt:
            self.link.reply(request, attempt, status, payload)
            self.flush()

    def _later(self, seconds: float, do: Callable[[], None]) -> None:
        def then() -> None:
            if self.paused and self.alive:
                self._later(0.1, do)  # stopped: its clock stands still for it
            elif self.alive:
                do()

        self.world.clock.at(self.world.clock.now + seconds, then)

    def _leave(self, reason: str) -> None:
        self.link.bye(reason)
        self.flush()
        self.world.clock.at(self.world.clock.now + 0.05, self.die)


class World:
    """One broker and everything around it. `delay`: seconds an envelope travels."""

    def __init__(self, seed: int = 0, *, delay_s: float = 0.001, watch: bool = True, **config: Any) -> None:
        self.random = random.Random(seed)
        self.clock = Clock()
        self.config = BrokerConfig(**config)
        self.delay_s = delay_s
        self.watch = watch  # processes of this host are held by pidfds
        self.load_s = 0.1
        self.load_failure: bytes | None = None
        self.launch_s = 0.05
        self.faults: dict[str, int] = {"reconnect": 0, "half_open": 0}
        self.notes: list[Note] = []
        self.history: list[tuple[str, int, int]] = []  # (worker, request, attempt) as calls start
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
        self.broker = Broker(
            self.config,
            incarnation=7,
            host=HERE,
            trusted=[True],
            random=random.Random(seed + 1),
            unpickle=lambda code: None,
            now=self.clock.now,
        )

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
        self._carry_out(self.broker.handle(event, self.clock.now))
        self._carry_out(self.broker.tick(self.clock.now))
        self._send_waiting()
        invariants.check(self.broker)
        self._schedule_tick()

    def _schedule_tick(self) -> None:
        due = self.broker.next_deadline()
        if due is not None and (self._tick_at is None or due < self._tick_at):
            self._tick_at = due
            self.clock.at(due, self._tick)

    def _tick(self) -> None:
        self._tick_at = None
        self._carry_out(self.broker.tick(self.clock.now))
        self._send_waiting()
        invariants.check(self.broker)
        self._schedule_tick()

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
            elif isinstance(action, Kill):
                self._kill(action.launch)
            elif isinstance(action, KillPeer):
                self.peers[action.name].die()
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
        if isinstance(peer, SimWorker) and peer.launch:
            self.launched.pop(peer.launch, None)
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
