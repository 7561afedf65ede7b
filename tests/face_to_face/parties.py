"""Clients and workers of the simulation: the real links, with stand-ins for sockets, processes and the actor."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import msgpack

from forge_client.link import ClientLink, Declared
from forge_client.outgoing import Extras
from forge_client.segments import Pool
from forge_contract.config import EndpointOptions, ServiceConfig
from forge_contract.errors import ForgeError, OutcomeUnknown, SegmentLost
from forge_contract.framing import Payload, encode
from forge_contract.messages import FAILED, HEARTBEAT, OK, RETURNED, UNTOUCHED
from forge_contract.peer_link import LinkState, PeerLink
from forge_contract.segments import Terms
from forge_worker.link import Assign, Drop, Forget, Import, Recall, Replay, Run, Stop, Welcomed, WorkerLink
from tests.face_to_face.memory import large
from tests.face_to_face.network import Connection

if TYPE_CHECKING:
    from tests.face_to_face.world import World

HERE = "this-host"


class Peer:
    """A process with a link: a client or a worker."""

    link: PeerLink

    def __init__(self, world: World, host: str) -> None:
        self.world = world
        self.host = host
        self.alive = True
        self.paused = False  # it does nothing, and says nothing
        self.stopped = False  # because its process is in state T
        self.reconnected_meanwhile = False  # while it was paused
        self._held: list[list[Any]] = []
        self._wake_at: float | None = None
        self.pid = world.next_pid()
        self.pool: Pool | None = None  # where it shares memory
        self.connection = Connection(world, self)
        world.routes[self.connection.routing_id] = self.connection

    @property
    def is_kept_from_speaking(self) -> bool:
        """By something that outlasts a recovery window."""
        return self.alive and (self.paused or self.connection.hindered(self.world.clock.now))

    def identity(self) -> dict[str, Any]:
        memory = self.world.memory
        sees = {"shared_memory": memory.segments.id} if memory is not None and self.host == HERE else {}
        return {
            "host": self.host,
            "hostname": self.host,
            "pid": self.pid,
            "pid_namespace": 1,
            "started": self.pid,
            **sees,
        }

    def join_memory(self, terms: Terms | None) -> None:
        """It was welcomed, on these terms."""
        if self.pool is None and terms is not None and self.world.memory is not None:
            self.pool = self.world.memory.pool(self.link.name, terms, lambda: self.world.clock.now)

    def outcome(self, status: int, payload: Any) -> tuple[int, bytes]:
        """This status and what the payload stands for; FAILED and the error, where that is gone."""
        memory = self.world.memory
        try:
            return status, bytes(payload) if memory is None else memory.read(payload)
        except SegmentLost as error:
            return FAILED, msgpack.packb(error.to_wire())

    def receive(self, frames: list[Any]) -> None:
        if not self.alive:
            return
        if self.paused:
            self._held.append(frames)
            return
        self.link.receive(frames, self.world.clock.now)
        self.after_receive()
        self.flush()

    def disconnected(self) -> None:
        """Its socket's monitor says that the connection broke."""

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
            self.world.clock.at(due, partial(self._wake, due))

    def _wake(self, when: float) -> None:
        if when != self._wake_at:
            return
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

    def pause(self, *, stopped: bool = True) -> None:
        """SIGSTOP. Not `stopped`: a C call that holds the GIL, so that the process runs and not even its heartbeat is heard."""
        self.paused, self.stopped = True, stopped

    def resume(self) -> None:
        self.paused = self.stopped = False
        self.connection.used_again(self.world.clock.now)
        held, self._held = self._held, []
        if self.reconnected_meanwhile:
            self.reconnected_meanwhile = False
            self.disconnected()
            self.link.reconnected(self.world.clock.now)
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
        self.replay: tuple[int, bytes] | None = None  # of a fan-out that newcomers are to have

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
        self.op = ""
        self.asked: dict[str, Any] = {}
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
        self.was_lost = False  # by a broker, or by its successor: too late for the recovery window
        self.deeds: dict[int, dict[str, Any]] = {}  # by service: of those that end with this client
        self.sessions: dict[str, list[Any]] = {}  # as a hello declares them
        self.replays: dict[
            int, bytes
        ] = {}  # endpoint → arguments of its last successful fan-out, for those that are replayed
        self.beat()
        self.flush()

    @property
    def is_kept_from_speaking(self) -> bool:
        """A dead one still has calls that others tell of."""
        return not self.alive or super().is_kept_from_speaking

    def disconnected(self) -> None:
        self.link.disconnected(self.world.clock.now)

    def deploy(
        self, wait: bool = True, *, kind: str = "service", endpoints: Any = None, exports: bool = False, **config: Any
    ) -> Any:
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
            "exports": exports,
        }
        answer = self.control("deploy", {"spec": spec}, b"init")
        if not wait:
            return answer
        self.world.run_until(lambda: answer.done)
        assert answer.ok, answer.fields
        return answer.fields

    def control(self, op: str, fields: dict[str, Any], payload: bytes = b"") -> Answer:
        answer = Answer()
        answer.op, answer.asked = op, fields
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
        buffered: bool = False,
        shape: int = 0,
        key: str | None = None,
        weight: float | None = None,
    ) -> Reply:
        """`buffered`: the payload is a large value. Shape, key and weight are what a batch goes by."""
        reply = Reply()
        deadline = None if timeout is None else self.world.clock.now + timeout
        order = service["service"] if service["kind"] == "actor" else None
        extras = Extras(deadline, priority, hints, rank, key, weight)
        reply.sequence = self.link.submit(
            service["endpoints"][endpoint],
            large(payload, self.pool) if buffered else payload,
            reply,
            None if extras == Extras() else extras,
            order,
            shape,
            session,
        )
        if flush:
            self.flush()
        return reply

    def fanout(
        self, service: dict[str, Any], endpoint: str = "echo", payload: bytes = b"x", *, buffered: bool = False
    ) -> Reply:
        reply = Reply()
        sent = large(payload, self.pool) if buffered else payload
        reply.sequence = self.link.fanout(service["endpoints"][endpoint], sent, reply)
        if service["options"][endpoint]["replay_last"]:
            reply.replay = service["endpoints"][endpoint], payload
        self.flush()
        return reply

    # Listener.

    def welcomed(self, fields: dict[str, Any]) -> None:
        self.join_memory(self.link.segments)

    def refused(self, error: ForgeError) -> None:
        self.refusal = error

    def lost(self, waiters: list[Any], controls: list[Any]) -> None:
        self.lost_waiters += waiters
        self.was_lost = True

    def unsure(self, waiters: list[Any]) -> None:
        for waiter in waiters:
            waiter.take(FAILED, msgpack.packb(OutcomeUnknown(why="the broker died while it ran").to_wire()), False)

    def declares(self) -> Declared | None:
        if not self.deeds and not self.sessions:
            return None
        payloads: list[Payload] = [b"init"] * len(self.deeds)
        payloads += self.replays.values()
        return Declared([*self.deeds.values()], [*self.sessions.values()], payloads, list(self.replays))

    def results(self, trusted: bool, waiters: list[Any], statuses: list[int], payloads: list[Any]) -> None:
        for waiter, status, payload in zip(waiters, statuses, payloads, strict=True):
            if waiter is not None:
                waiter.take(*self.outcome(status, payload), trusted)

    def parts(
        self, trusted: bool, waiter: Any, points: list[list[int]], statuses: list[int], payloads: list[Any]
    ) -> None:
        if waiter is not None:
            waiter.points = points
            if waiter.replay is not None and set(statuses) == {OK}:
                endpoint, arguments = waiter.replay
                self.replays.pop(endpoint, None)
                self.replays[endpoint] = arguments
            waiter.take(None, list(map(self.outcome, statuses, payloads)), trusted)

    def answer(self, waiter: Any, ok: bool, fields: dict[str, Any], payload: Any) -> None:
        assert not waiter.done, "a control was answered twice"
        waiter.done, waiter.ok, waiter.fields, waiter.payload = True, ok, fields, payload
        asked = waiter.asked
        if waiter.op == "open_session" and ok:
            self.sessions[asked["session"]] = [asked["service"], asked["session"], asked.get("hints") or {}, True]
        elif waiter.op == "close_session":
            self.sessions.pop(asked["session"], None)
        elif waiter.op == "stop":
            self.deeds.pop(asked["service"], None)
        elif waiter.op == "deploy" and ok and not fields.get("detached"):
            self.deeds[fields["service"]] = {
                "service": fields["service"],
                "name": fields["name"],
                "spec": asked["spec"],
                "endpoints": [fields["endpoints"][one["name"]] for one in asked["spec"]["endpoints"]],
                "owner": self.link.client,
                "trusted": self.link.trusted,
            }

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
        self.counts: dict[str, int] = {}  # the state of each session: how many calls of it have ended
        self._queues: dict[str, deque[partial[None]]] = {}  # calls of a session with state run one by one
        self.running = 0
        self._waiting: deque[partial[None]] = deque()  # those that may not run beside them
        self._played = 0
        self._ready = False
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
            elif isinstance(instruction, Recall):
                self._give_back(RETURNED)
                self.flush()
            elif isinstance(instruction, Replay):
                self.world.replays.append((self.link.name, bytes(instruction.payload)))
                self._played += 1
                if self._ready:
                    self.link.ready(self._played)
            elif isinstance(instruction, Import):
                self.counts[instruction.session] = int(bytes(instruction.payload))
            elif isinstance(instruction, Forget):
                for session in instruction.sessions:
                    self.counts.pop(session, None)
            elif isinstance(instruction, Welcomed):
                self.join_memory(self.link.segments)
                for session, count in self.counts.items() if instruction.recovering else ():
                    self.link.states(session, b"%d" % count)
            elif isinstance(instruction, Stop):
                self._stop(instruction)

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
            self._ready = True
            self.link.ready(self._played)
        self.flush()

    def _run(self, run: Run) -> None:
        for request, attempt, payload, session in zip(run.ids, run.attempts, run.payloads, run.sessions, strict=True):
            start = partial(self._start, request, attempt, run.method, payload, session)
            if session is None or not self.assignment.checkpoint_every:
                start()
            elif session in self._queues:
                self._queues[session].append(start)
            else:
                self._queues[session] = deque()
                start()

    def _start(self, request: int, attempt: int, method: int, arguments: Any, session: str | None) -> None:
        if self.running >= self.assignment.concurrency:
            self._waiting.append(partial(self._start, request, attempt, method, arguments, session))
            return
        self.running += 1
        status, payload = self.outcome(OK, arguments)
        if status != OK:
            self._later(0.0, partial(self._finish, request, attempt, b"", status, payload, session, False))
            return
        self.started.append((request, attempt, payload, session))
        self.world.history.append((self.link.name, request, attempt))
        seconds, status, result = self.world.actor(self, method, payload)
        buffered = isinstance(arguments, list)
        self._later(seconds, partial(self._finish, request, attempt, payload, status, result, session, buffered))

    def _finish(
        self,
        request: int,
        attempt: int,
        arguments: bytes,
        status: int,
        payload: bytes,
        session: str | None,
        buffered: bool,
    ) -> None:
        """`buffered`: what comes of it is as large as what it was called with."""
        self.running -= 1
        if self._waiting:
            self._waiting.popleft()()
        if session is not None:
            self.world.ended[session, arguments] += 1
        queue = self._queues.get(session) if session is not None else None
        if (
            session is not None and queue is not None and status == OK
        ):  # else its arguments are gone, and it has not run
            self.counts[session] = self.counts.get(session, 0) + 1
            payload = b"%d" % self.counts[session]
            self.link.states(session, payload)
        if self.link.running.get(request) == attempt:
            self.link.reply(request, attempt, status, large(payload, self.pool) if buffered else payload)
            self.flush()
        if queue:
            queue.popleft()()
        elif session is not None and queue is not None:
            del self._queues[session]

    def _stop(self, stop: Stop) -> None:
        """What runs ends within the grace, what has not begun is given back."""
        for queue in self._queues.values():
            self._waiting += queue
            queue.clear()
        self._give_back(UNTOUCHED)
        self.flush()
        until = self.world.clock.now + stop.grace_s

        def look() -> None:
            if self.link.running and self.world.clock.now < until:
                self._later(0.02, look)
            else:
                self._leave(stop.reason)

        look()

    def _give_back(self, status: int) -> None:
        """What waits; those of sessions have an order, and stay with a worker that stays."""
        waiting, self._waiting = self._waiting, deque()
        for start in waiting:
            request, attempt, _, _, session = start.args
            if status == RETURNED and session is not None:
                self._waiting.append(start)
            elif self.link.running.get(request) == attempt:
                self.link.reply(request, attempt, status, b"")

    def _later(self, seconds: float, do: Callable[[], None]) -> None:
        def then() -> None:
            if self.paused and self.alive:
                self._later(0.1, do)  # stopped: its clock stands still for it
            elif self.alive:
                do()

        self.world.clock.at(self.world.clock.now + seconds, then)

    def _leave(self, reason: str) -> None:
        if self.pool is not None:
            self.pool.freeze()
        self.link.bye(reason)
        self.flush()
        self.world.clock.at(self.world.clock.now + 0.05, self.die)
