"""A broker's core with hand-made peers: they write envelopes as PROTOCOL.md says, number by number, so that a test can also
say what no well-behaved peer would.

The whole conversation of real links over a faulty network is `tests/face_to_face`'s business. Here every event is followed by
`invariants.check`, and everything the broker wants done is kept in `Bench.actions`.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import msgpack

from forge_broker.core import invariants
from forge_broker.core.actions import Action, Deliver, Kill, Launch, Send, Watch
from forge_broker.core.broker import Broker
from forge_broker.core.events import Event, LaunchEnded, ProcessGone, Received, Route, Watched
from forge_broker.core.services import Service
from forge_broker.core.state import State
from forge_contract.config import BrokerConfig, EndpointOptions, ServiceConfig
from forge_contract.errors import ForgeError, from_wire
from forge_contract.framing import Envelope, decode, encode
from forge_contract.messages import (
    ANSWER,
    ASSIGN,
    CALLS,
    CANCEL,
    CONTROL,
    DISPATCH,
    FAILED,
    FANOUT,
    HELLO,
    IMPORT,
    OK,
    PARTS,
    READY,
    REPLAY,
    REPLIES,
    RESULTS,
    STATES,
    WELCOME,
    column,
    request_id,
)

HERE = "this-host"
INCARNATION = 77
TRUSTED, UNTRUSTED = 0, 1  # the bench's two addresses


class Bench:
    """One broker, its clock, its peers."""

    def __init__(self, unpickle: Any = None, *, recovering: bool = False, segments: Any = None, **config: Any) -> None:
        self.now = 1000.0
        self.broker = Broker(
            State(
                BrokerConfig(**config),
                incarnation=INCARNATION,
                host=HERE,
                trusted=(True, False),
                random=random.Random(1),
                unpickle=unpickle or (lambda code: code),
                now=self.now,
                segments=segments,
                recovering=recovering,
            )
        )
        self.state = self.broker.state
        self.actions: list[Action] = []
        self.peers: dict[Route, Peer] = {}
        self.names = 0
        self._turn: list[Action] | None = None

    def handle(self, event: Event) -> list[Action]:
        return self._done(self.broker.handle(event, self.now))

    @contextlib.contextmanager
    def one_turn(self) -> Iterator[None]:
        """What comes meanwhile comes in one turn of the broker's loop: it packs its envelopes at the end."""
        turn = self._turn = []
        yield
        self._turn = None
        self._done(turn)

    def advance(self, seconds: float) -> None:
        """Let time pass, looking whenever the broker asked to be called."""
        until = self.now + seconds
        while (due := self.broker.next_deadline()) is not None and due <= until:
            self.now = max(self.now, due)
            self._done(self.broker.tick(self.now))
        self.now = until

    def _done(self, actions: list[Action]) -> list[Action]:
        invariants.check(self.broker)
        self.actions += actions
        for action in actions:
            if isinstance(action, Deliver) and self._turn is not None:
                self._turn.append(action)
            elif isinstance(action, Deliver):
                packed = self.broker.pack(action.name, self.now)
                if packed is not None:
                    self._carry(packed)
            elif isinstance(action, Send):
                self._carry(action)
            elif isinstance(action, Watch) and action.host == HERE:
                self.handle(Watched(action.name))
        invariants.check(self.broker)
        return actions

    def _carry(self, send: Send) -> None:
        if send.route in self.peers:
            self.peers[send.route].hear(send.frames)

    def of(self, kind: type) -> list[Any]:
        """Take out the actions of one kind that have not been looked at."""
        found = [action for action in self.actions if isinstance(action, kind)]
        self.actions = [action for action in self.actions if not isinstance(action, kind)]
        return found

    def client(self, address: int = TRUSTED, *, holdings: list[bytes] | None = None, **hello: Any) -> ClientPeer:
        peer = ClientPeer(self, address, {"role": "client", "client": 0, **hello})
        peer.holdings = holdings or []
        peer.hello()
        return peer

    def worker(
        self,
        address: int = TRUSTED,
        *,
        gpus: tuple[str, ...] = (),
        launch: int = 0,
        holdings: list[bytes] | None = None,
        **hello: Any,
    ) -> WorkerPeer:
        peer = WorkerPeer(self, address, {"role": "worker", "gpus": list(gpus), "launch": launch, **hello})
        peer.holdings = holdings or []
        peer.replica_epoch = (hello.get("holds") or {}).get("epoch", 0)
        peer.hello()
        return peer

    def handle_gone(self, peer: Peer) -> None:
        """The kernel says that the process of a watched peer has ended."""
        self.handle(ProcessGone(peer.name))

    def launched(self) -> list[WorkerPeer]:
        """A worker for every launch that was wanted since the last look, in order."""
        return [self.worker(gpus=launch.gpus, launch=launch.launch) for launch in self.of(Launch)]

    def end_killed(self) -> None:
        """The kernel obeys: every process that was to be killed has ended."""
        for launch in {kill.launch for kill in self.of(Kill)}:
            self.handle(LaunchEnded(launch, "signal SIGKILL", []))

    def service(self, name: str = "Echo") -> Service:
        return self.state.names[name]

    def serving(self, replicas: int = 1, *, kind: str = "service", procs: int = 1, **options: Any) -> Serving:
        """A service whose replicas are all HEALTHY, with the client that deployed it."""
        client = self.client()
        client.deploy(kind=kind, num_replicas=replicas, procs=procs, **options)
        workers = self.launched()
        for worker in workers:
            worker.ready()
        return Serving(self, client, workers)


class Serving:
    def __init__(self, bench: Bench, client: ClientPeer, workers: list[WorkerPeer]) -> None:
        self.bench = bench
        self.client = client
        self.workers = workers
        self.service = bench.service()
        self.endpoint = self.service.endpoints[0].id

    def __iter__(self) -> Any:
        return iter((self.bench, self.client, self.workers, self.endpoint))


class Peer:
    def __init__(self, bench: Bench, address: int, hello: dict[str, Any]) -> None:
        bench.names += 1
        self.bench = bench
        self.name = f"{hello['role'][0]}-{bench.names:016x}"
        self.fields = {"host": HERE, "hostname": "h", "pid": 7, "pid_namespace": 1, "started": 5, **hello}
        if bench.state.segments is not None:
            self.fields.setdefault("shared_memory", bench.state.segments.id)
        self.holdings: list[bytes] = []  # payloads of `holds` or `declares`
        self.epoch = 1
        self.sent = 0
        self.received = 0
        self.welcome: dict[str, Any] = {}
        self.heard: list[tuple[list[Any], list[Any]]] = []  # messages with their payloads
        self.envelopes: list[Envelope] = []
        self.connect(address)

    def connect(self, address: int = TRUSTED) -> None:
        """A new connection, with another routing id."""
        self.bench.names += 1
        self.route: Route = (address, str(self.bench.names).encode())
        self.bench.peers[self.route] = self

    def hello(self) -> None:
        sizes = [len(payload) for payload in self.holdings]
        envelope = [HELLO, self.fields, sizes]
        self.send(encode(self.name, self.epoch, 0, 0, 0, [envelope], b"".join(self.holdings)))

    def whisper(self, *messages: list[Any], incarnation: int = INCARNATION, epoch: int | None = None) -> None:
        """An unnumbered envelope."""
        epoch = self.epoch if epoch is None else epoch
        self.send(encode(self.name, epoch, incarnation, 0, self.received, list(messages)))

    def say(self, *messages: list[Any], packed: bytes = b"", large: tuple[bytes, ...] = (), skip: int = 0) -> None:
        """The next numbered envelope; `skip`: how many before it got lost."""
        self.sent += 1 + skip
        self.send(encode(self.name, self.epoch, INCARNATION, self.sent, self.received, list(messages), packed, large))

    def send(self, frames: list[Any]) -> None:
        self.bench.handle(Received(self.route, frames))

    def hear(self, frames: list[Any]) -> None:
        envelope = decode(frames)
        self.envelopes.append(envelope)
        if envelope.number:
            if envelope.number != self.received + 1:
                return
            self.received = envelope.number
        for message in envelope.body:
            kind = message[0]
            sizes = {RESULTS: 4, PARTS: 5, DISPATCH: 6, ANSWER: 4, ASSIGN: 2, REPLAY: 3, IMPORT: 3}.get(kind)
            named = [] if sizes is None else message[sizes]
            payloads = envelope.payloads.take_all(named if isinstance(named, list) else [named])
            if kind == WELCOME:
                self.welcome = message[1]
            self.heard.append((message, payloads))
            self.took(message, payloads)
        envelope.payloads.close()

    def took(self, message: list[Any], payloads: list[Any]) -> None:
        """For those who keep books of what they hear."""

    def of(self, kind: int) -> list[list[Any]]:
        """Take out the messages of one kind."""
        found = [message for message, _ in self.heard if message[0] == kind]
        self.heard = [one for one in self.heard if one[0][0] != kind]
        return found


class ClientPeer(Peer):
    def __init__(self, bench: Bench, address: int, hello: dict[str, Any]) -> None:
        super().__init__(bench, address, hello)
        self.sequence = 0
        self.controls = 0
        self.honest = True  # uses no id twice, so that a second reply to one would be the broker's fault
        self.results: dict[int, tuple[int, bytes]] = {}
        self.parts: dict[int, dict[tuple[int, int], tuple[int, bytes]]] = {}
        self.answers: dict[int, Any] = {}  # fields, or the error

    @property
    def id(self) -> int:
        return int(self.welcome["client"])

    def took(self, message: list[Any], payloads: list[Any]) -> None:
        if message[0] == RESULTS:
            statuses = message[3] if isinstance(message[3], list) else [message[3]] * len(message[2])
            for sequence, status, payload in zip(message[2], statuses, payloads, strict=True):
                assert sequence not in self.results or not self.honest, "two replies to one request"
                self.results[sequence] = (status, payload)
        elif message[0] == PARTS:
            assert message[2] not in self.parts or not self.honest, "two replies to one request"
            parts = zip(map(tuple, message[3]), message[4], payloads, strict=True)
            self.parts[message[2]] = {point: (status, payload) for point, status, payload in parts}
        elif message[0] == ANSWER:
            _, number, ok, fields, size = message
            self.answers[number] = fields if ok else (payloads[0] if size else from_wire(fields["error"]))

    def control(self, op: str, payload: bytes = b"", **fields: Any) -> int:
        self.controls += 1
        self.say([CONTROL, self.controls, op, fields, len(payload)], packed=payload)
        return self.controls

    def ask(self, op: str, **fields: Any) -> Any:
        return self.answers[self.control(op, **fields)]

    def deploy(self, payload: bytes = b"init", **options: Any) -> int:
        return self.control("deploy", payload, spec=spec(**options))

    def call(self, endpoint: int, *payloads: bytes, **columns: Any) -> list[int]:
        sequences = [self.sequence + 1 + at for at in range(len(payloads))]
        self.sequence += len(payloads)
        sizes = [len(payload) for payload in payloads]
        self.say([CALLS, endpoint, sequences, sizes, columns], packed=b"".join(payloads))
        return sequences

    def fanout(self, endpoint: int, payload: bytes = b"x", **columns: Any) -> int:
        self.sequence += 1
        self.say([FANOUT, endpoint, self.sequence, len(payload), columns], packed=payload)
        return self.sequence

    def cancel(self, *sequences: int) -> None:
        self.say([CANCEL, list(sequences)])

    def error(self, sequence: int) -> ForgeError:
        status, payload = self.results[sequence]
        assert status == FAILED, (status, payload)
        return from_wire(msgpack.unpackb(payload, strict_map_key=False))

    def ids(self, sequences: list[int]) -> list[int]:
        return [request_id(self.id, sequence) for sequence in sequences]


class WorkerPeer(Peer):
    def __init__(self, bench: Bench, address: int, hello: dict[str, Any]) -> None:
        super().__init__(bench, address, hello)
        self.calls: list[tuple[int, int, bytes]] = []  # (request id, attempt, payload), not replied to
        self.seen: list[bytes] = []  # every payload dispatched, in order
        self.batches: list[list[bytes]] = []  # of those, what came as batches
        self.replica_epoch = 0

    def took(self, message: list[Any], payloads: list[Any]) -> None:
        if message[0] == ASSIGN:
            self.replica_epoch = message[1]["epoch"]
        elif message[0] == DISPATCH:
            attempts = message[5] if isinstance(message[5], list) else [message[5]] * len(message[4])
            self.calls += zip(message[4], attempts, payloads, strict=True)
            self.seen += payloads
            at = 0
            for count in message[7].get("batches", []):
                self.batches.append(payloads[at : at + count])
                at += count

    def ready(self, played: int = 0) -> None:
        self.say([READY, played])

    def states(self, **states: bytes) -> None:
        """Checkpoints of these sessions."""
        sizes = [len(state) for state in states.values()]
        self.say([STATES, list(states), sizes], packed=b"".join(states.values()))

    def reply(
        self, count: int | None = None, *, status: int = OK, payload: bytes | None = None, cost: int | None = None
    ) -> None:
        """Answer the oldest `count` calls it holds (None: all), echoing unless a payload is given. `cost`: ns each, None leaves it out."""
        now, self.calls = (self.calls, []) if count is None else (self.calls[:count], self.calls[count:])
        if not now:
            return
        values = [one[2] if payload is None else payload for one in now]
        ids, attempts = [one[0] for one in now], [one[1] for one in now]
        sizes = [len(value) for value in values]
        told = [] if cost is None else [cost]
        self.say([REPLIES, self.replica_epoch, ids, column(attempts), status, sizes, *told], packed=b"".join(values))

    @property
    def launch(self) -> int:
        return int(self.fields["launch"])

    def die(self) -> None:
        """Its process ends, and the kernel says so."""
        self.bench.handle(LaunchEnded(self.launch, "exit code 1", ["last words"]))


def spec(
    *,
    kind: str = "service",
    endpoints: tuple[str, ...] = ("predict",),
    routers: dict[str, Any] | None = None,
    target: dict[str, Any] | None = None,
    class_name: str = "Echo",
    endpoint_options: dict[str, Any] | None = None,
    own_options: dict[str, dict[str, Any]] | None = None,
    exports: bool = False,
    **config: Any,
) -> dict[str, Any]:
    """What a client sends with `deploy` (PROTOCOL.md §7.1)."""
    return {
        "kind": kind,
        "class_name": class_name,
        "target": target or {"ref": "module:Echo"},
        "path": [],
        "cwd": None,
        "exports": exports,
        "config": ServiceConfig(**config).to_wire(),
        "endpoints": [
            {
                "name": name,
                "router": (routers or {}).get(name) or {"name": "RoundRobinRouter", "options": {}},
                "options": EndpointOptions(**(endpoint_options or {}), **(own_options or {}).get(name, {})).to_wire(),
                "signature": None,
            }
            for name in endpoints
        ],
    }


def built_in(name: str, **options: Any) -> dict[str, Any]:
    return {"name": name, "options": options}
