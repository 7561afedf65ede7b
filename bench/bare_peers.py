"""The broker's core with hand-made peers, for measurements: envelopes written number by number, and nothing in between.

No socket, no loop, no link of client or worker: what is timed is `Broker.handle` and `Broker.pack`, as `forge_broker/shell/serve.py` calls
them. A peer makes its envelopes ahead of time and hands them in later (`said`), so that making them is not measured.
`core_alone` says what; the tests have peers of their own (`tests/core/peers.py`), which check what they hear.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Final

from forge_broker.core.actions import Action, Deliver, Launch, Send
from forge_broker.core.broker import Broker
from forge_broker.core.events import Received, Route
from forge_broker.core.state import State
from forge_contract.config import BrokerConfig, EndpointOptions, ServiceConfig
from forge_contract.framing import Envelope, decode, encode
from forge_contract.messages import (
    ANSWER,
    ASSIGN,
    CALLS,
    CONTROL,
    DISPATCH,
    HELLO,
    OK,
    READY,
    REPLIES,
    RESULTS,
    WELCOME,
)

INCARNATION: Final = 1
HOST: Final = "here"
PAYLOAD: Final = b"x" * 64


class Core:
    """One broker core, its clock, and who hears what it sends."""

    def __init__(self, **config: Any) -> None:
        self.now = 1000.0
        self.broker = Broker(
            State(
                BrokerConfig(gpus=(), **config),
                incarnation=INCARNATION,
                host=HOST,
                trusted=(True,),
                random=random.Random(1),
                unpickle=lambda code: code,
                now=self.now,
            )
        )
        self.peers: dict[Route, Peer] = {}
        self.launches: list[Launch] = []
        self._names = 0

    def route(self) -> Route:
        self._names += 1
        return (0, self._names.to_bytes(4))

    def handle(self, frames: list[Any], route: Route) -> list[Action]:
        return self.broker.handle(Received(route, frames), self.now)

    def carry(self, actions: Sequence[Action]) -> None:
        """What the broker wants sent, to who is to hear it."""
        for action in actions:
            send = self.broker.pack(action.name, self.now) if isinstance(action, Deliver) else action
            if isinstance(send, Send):
                self.peers[send.route].hear(send.frames)
            elif isinstance(action, Launch):
                self.launches.append(action)

    def tick(self) -> None:
        self.carry(self.broker.tick(self.now))


class Peer:
    """A process as the broker sees it: who it is, and what it says, in order."""

    role = ""

    def __init__(self, core: Core, **hello: Any) -> None:
        self.core = core
        self.route = core.route()
        core.peers[self.route] = self
        self.name = f"{self.role[0]}-{self.route[1].hex()}"
        self.sent = 0
        self.received = 0
        self.acks = 0  # bare ones: what answers a probe
        fields = {"host": HOST, "hostname": HOST, "pid": 1, "pid_namespace": 1, "started": 1}
        message = [HELLO, {**fields, "role": self.role, **hello}, []]
        self.say_frames(encode(self.name, 1, 0, 0, 0, [message]))

    def said(self, *messages: list[Any], packed: bytes = b"") -> list[Any]:
        """The frames of its next envelope, to be handed to the core in this order."""
        self.sent += 1
        return encode(self.name, 1, INCARNATION, self.sent, self.received, list(messages), packed)

    def unnumbered(self, message: list[Any]) -> list[Any]:
        return encode(self.name, 1, INCARNATION, 0, self.received, [message])

    def say_frames(self, frames: list[Any]) -> None:
        self.core.carry(self.core.handle(frames, self.route))

    def say(self, *messages: list[Any], packed: bytes = b"") -> None:
        self.say_frames(self.said(*messages, packed=packed))

    def hear(self, frames: list[Any]) -> None:
        envelope = decode(frames)
        self.received = envelope.number or self.received
        self.acks += not envelope.number and not envelope.body
        self.took(envelope)

    def took(self, envelope: Envelope) -> None:
        """For those who want to know what they hear."""


class BareClient(Peer):
    role = "client"

    def __init__(self, core: Core) -> None:
        self.id = 0
        self.sequence = 0
        self.controls = 0
        self.answers: dict[int, tuple[bool, Any]] = {}
        self.results = 0
        super().__init__(core, client=0)

    def took(self, envelope: Envelope) -> None:
        for message in envelope.body:
            if message[0] == WELCOME:
                self.id = message[1]["client"]
            elif message[0] == ANSWER:
                self.answers[message[1]] = (message[2], message[3])
            elif message[0] == RESULTS:
                self.results += len(message[2])

    def control(self, op: str, **fields: Any) -> list[Any]:
        self.controls += 1
        return [CONTROL, self.controls, op, fields, 0]

    def ask(self, op: str, **fields: Any) -> Any:
        """One operation and its answer. Raises RuntimeError when it is refused."""
        self.say(self.control(op, **fields))
        ok, answer = self.answers.pop(self.controls)
        if not ok:
            raise RuntimeError(f"{op} was refused: {answer}")
        return answer

    def calls(self, endpoint: int, count: int, **columns: Any) -> list[Any]:
        """An envelope of so many calls, with `PAYLOAD` each."""
        first = self.sequence + 1
        self.sequence += count
        message = [CALLS, endpoint, list(range(first, first + count)), [len(PAYLOAD)] * count, columns]
        return self.said(message, packed=PAYLOAD * count)

    def deploy(self, replicas: int, router: str, **config: Any) -> tuple[int, list[BareWorker]]:
        """A service whose replicas are all HEALTHY: its one endpoint, and its workers by replica."""
        spec = {
            "kind": "service",
            "class_name": "Echo",
            "target": {"ref": "bench.closed_loop:Echo"},
            "path": [],
            "cwd": None,
            "exports": False,
            "config": ServiceConfig(num_replicas=replicas, **config).to_wire(),
            "endpoints": [
                {
                    "name": "echo",
                    "router": {"name": router, "options": {}},
                    "options": EndpointOptions().to_wire(),
                    "signature": None,
                }
            ],
        }
        self.say(self.control("deploy", spec=spec))
        core = self.core
        workers = []
        while core.launches:  # so many at once as the broker starts
            workers.append(BareWorker(core, launch=core.launches.pop(0).launch))
        for worker in workers:
            worker.say([READY, 0])
        service = core.broker.state.names["Echo"]
        if len(service.pool) != replicas:
            raise RuntimeError(f"{service!r} instead of {replicas} replicas")
        return service.endpoints[0].id, workers


class BareWorker(Peer):
    role = "worker"

    def __init__(self, core: Core, launch: int) -> None:
        self.epoch = 0
        self.held: list[int] = []  # request ids, not replied to
        super().__init__(core, gpus=[], launch=launch)

    def took(self, envelope: Envelope) -> None:
        for message in envelope.body:
            if message[0] == ASSIGN:
                self.epoch = message[1]["epoch"]
            elif message[0] == DISPATCH:
                self.held += message[4]

    def replies(self) -> list[Any]:
        """An envelope that answers all it holds."""
        ids, self.held = self.held, []
        message = [REPLIES, self.epoch, ids, 1, OK, [len(PAYLOAD)] * len(ids)]
        return self.said(message, packed=PAYLOAD * len(ids))
