"""A broker for the client's tests: it speaks the protocol, runs methods in its head, and does what a test tells it.

Pure, so that a link can be run against it under a virtual clock; `serve` puts it behind a ROUTER on the running loop
for tests of the whole client. Not a simulation of the real broker: no queues, no workers, one answer per call.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgpack
import zmq

from forge_contract import framing
from forge_contract.channel import Channel, Verdict
from forge_contract.errors import ForgeError
from forge_contract.framing import Envelope, Frame, Outbox, decode, weigh
from forge_contract.messages import (
    ANSWER,
    BROKER_NAME,
    BYE,
    CALLS,
    CANCEL,
    CONTROL,
    FAILED,
    FANOUT,
    HEARTBEAT,
    HELLO,
    NOTICE,
    OK,
    PARTS,
    PROBE,
    RAISED,
    REFUSE,
    RESULTS,
    WELCOME,
    WHO,
    spread,
)
from forge_contract.payload import decode_call, encode, encode_exception

Method = Callable[..., Any]


class Raised:
    """What a method returns to have the caller get this exception."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


class FakeBroker:
    """`methods`: endpoint name to a function that gives the result (raise a ForgeError for FAILED, another for RAISED).
    An endpoint or a control's op named in `silent` gets no answers. What came in is in `seen`: one tuple per call or control."""

    def __init__(self, *, trusted: bool = True, incarnation: int = 77) -> None:
        self.trusted = trusted
        self.incarnation = incarnation
        self.methods: dict[str, Method] = {}
        self.silent: set[str] = set()
        self.welcome: dict[str, Any] = {}
        self.controls: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {}
        self.refusal: list[Any] | None = None
        self.seen: list[tuple[Any, ...]] = []
        self.envelopes = 0
        self.heartbeats = 0
        self.hellos: list[dict[str, Any]] = []
        self.declared_payloads: list[Any] = []  # of the latest hello
        self.specs: list[dict[str, Any]] = []
        self.named: dict[str, dict[str, Any]] = {}
        self.replicas = 2
        self.peers: dict[str, Channel] = {}
        self.out: dict[str, Outbox] = {}
        self._endpoints: dict[int, str] = {}
        self._unsent: list[tuple[str, list[Frame]]] = []

    def take(self, frames: list[Frame], now: float) -> None:
        """One envelope from a client."""
        envelope = decode(frames)
        name = envelope.sender
        if not envelope.number:
            self._unnumbered(envelope, now)
            return
        channel = self.peers.get(name)
        if channel is None or channel.epoch != envelope.epoch:
            self._say(name, envelope.epoch, [[WHO]])
            return
        self.envelopes += 1
        channel.acknowledged(envelope.ack, now)
        if channel.accept(envelope.number, now) is Verdict.DELIVER:
            for message in envelope.body:
                self._handle(name, message, envelope)

    def sent(self, now: float) -> list[tuple[str, list[Frame]]]:
        """Envelopes to send: (peer, frames)."""
        ready, self._unsent = self._unsent, []
        for name, outbox in self.out.items():
            channel = self.peers.get(name)
            if len(outbox) and channel is not None:
                number = channel.next_number()
                frames = outbox.seal(BROKER_NAME, channel.epoch, self.incarnation, number, channel.received)
                channel.keep(frames, weigh(frames), now)
                ready.append((name, frames))
            elif channel is not None and channel.due(now) is not None:
                ready.append((name, self._frames(channel.epoch, [], channel.received)))
        return ready

    def _frames(self, epoch: int, body: list[Any], ack: int = 0) -> list[Frame]:
        return framing.encode(BROKER_NAME, epoch, self.incarnation, 0, ack, body)

    def _say(self, name: str, epoch: int, body: list[Any]) -> None:
        self._unsent.append((name, self._frames(epoch, body)))

    def forget(self, *, recovering: bool = False) -> None:
        """Become another broker: it knows nobody. `recovering`: and it asks everybody what there was."""
        self.incarnation += 1
        self.welcome["recovering"] = recovering
        self.peers.clear()
        self.out.clear()

    def _unnumbered(self, envelope: Envelope, now: float) -> None:
        for message in envelope.body:
            kind = message[0]
            if kind == HEARTBEAT:
                self.heartbeats += 1
            elif kind == HELLO:
                self.hellos.append(message[1])
                self.declared_payloads = envelope.payloads.take_all(message[2])
                if self.refusal is not None:
                    self._say(envelope.sender, envelope.epoch, [[REFUSE, *self.refusal]])
                    continue
                self.peers[envelope.sender] = Channel(envelope.epoch)
                self.out[envelope.sender] = Outbox()
                fields = {"client": 0x1A2B3C, "trusted": self.trusted, "heartbeat_s": 0.05, "orphan_grace_s": 0.3}
                self._say(envelope.sender, envelope.epoch, [[WELCOME, {**fields, **self.welcome}]])
            elif kind == PROBE:
                channel = self.peers.get(envelope.sender)
                if channel is None or channel.epoch != envelope.epoch or envelope.incarnation != self.incarnation:
                    self._say(envelope.sender, envelope.epoch, [[WHO]])
                else:
                    channel.owe_ack(now)

    def _handle(self, name: str, message: list[Any], envelope: Envelope) -> None:
        kind = message[0]
        outbox = self.out[name]
        if kind == CALLS:
            _, number, seqs, sizes, columns = message
            payloads = envelope.payloads.take_all(sizes)
            self._calls(outbox, number, seqs, payloads, columns)
        elif kind == FANOUT:
            _, number, seq, size, columns = message
            payload = envelope.payloads.take(size)
            endpoint = self._endpoints[number]
            self.seen.append(("fanout", endpoint, decode_call(payload, trusted=True), columns))
            if endpoint in self.silent:
                return
            parts = [self._run(endpoint, payload, {"replica": replica}) for replica in range(self.replicas)]
            points = [[replica, 0] for replica in range(self.replicas)]
            self.parts(outbox, seq, points, parts)
        elif kind == CANCEL:
            self.seen.append(("cancel", message[1]))
            for seq in message[1]:
                self.results(
                    outbox, [seq], [(FAILED, error_payload("CallCancelled", endpoint="x", why="by its caller"))]
                )
        elif kind == CONTROL:
            self._control(outbox, message, envelope)
        elif kind == BYE:
            self.seen.append(("bye", message[1]))

    def _calls(
        self, outbox: Outbox, number: int, seqs: list[int], payloads: list[Any], columns: dict[str, Any]
    ) -> None:
        endpoint = self._endpoints[number]
        answers = []
        answered = []
        for at, (seq, payload) in enumerate(zip(seqs, payloads, strict=True)):
            item = {key: spread(values, len(seqs))[at] for key, values in columns.items()}
            self.seen.append(("call", endpoint, decode_call(payload, trusted=True), item))
            if endpoint not in self.silent:
                answered.append(seq)
                answers.append(self._run(endpoint, payload, item))
        if answered:
            self.results(outbox, answered, answers)

    def _run(self, endpoint: str, payload: Any, item: dict[str, Any]) -> tuple[int, Any]:
        args, kwargs = decode_call(payload, trusted=True)
        method = self.methods.get(endpoint)
        try:
            if method is None:
                value: Any = args[0] if args else None
            else:
                value = method(item, *args, **kwargs)
        except ForgeError as error:
            return FAILED, msgpack.packb(error.to_wire())
        except Exception as error:
            return RAISED, encode_exception(error, trusted=True)
        if isinstance(value, Raised):
            return RAISED, encode_exception(value.error, trusted=True)
        return OK, encode(value, trusted=True)

    def results(self, outbox: Outbox, seqs: list[int], answers: list[tuple[int, Any]]) -> None:
        sizes = [outbox.attach(payload) for _, payload in answers]
        outbox.body.append([RESULTS, True, seqs, [status for status, _ in answers], sizes])

    def parts(self, outbox: Outbox, seq: int, points: list[list[int]], parts: list[tuple[int, Any]]) -> None:
        sizes = [outbox.attach(payload) for _, payload in parts]
        outbox.body.append([PARTS, True, seq, points, [status for status, _ in parts], sizes])

    def notice(self, topic: str, fields: dict[str, Any]) -> None:
        """To every client, with what is sent next."""
        for outbox in self.out.values():
            outbox.body.append([NOTICE, topic, fields])

    def _control(self, outbox: Outbox, message: list[Any], envelope: Envelope) -> None:
        _, number, op, fields, size = message
        payload = envelope.payloads.take(size) if size else b""
        self.seen.append((op, fields))
        if op in self.silent:
            return
        try:
            if op in self.controls:
                answer = self.controls[op](fields)
            elif op == "deploy":
                answer = self._deploy(fields["spec"], payload)
            elif op == "find":
                answer = self.named[fields["name"]]
            else:
                answer = {}
        except ForgeError as error:
            outbox.body.append([ANSWER, number, False, {"error": error.to_wire()}, 0])
        except Exception as error:
            raised = outbox.attach(encode_exception(error, trusted=True))
            outbox.body.append([ANSWER, number, False, {"trusted": True}, raised])
        else:
            outbox.body.append([ANSWER, number, True, answer, 0])

    def _deploy(self, spec: dict[str, Any], payload: Any) -> dict[str, Any]:
        service = len(self.specs) + 1
        self.specs.append(spec)
        config = spec["config"]
        ids = {}
        for at, one in enumerate(spec["endpoints"]):
            ids[one["name"]] = service * 100 + at
            self._endpoints[service * 100 + at] = one["name"]
        sizes = (
            {"procs": config["procs"]}
            if config["hosts"] is None
            else {"hosts": config["hosts"], "procs": config["procs"]}
        )
        name = spec["name"] or f"{spec['class_name']}-{service}"
        self.named[name] = {
            "service": service,
            "name": name,
            "kind": spec["kind"],
            "class_name": spec["class_name"],
            "endpoints": ids,
            "signatures": {one["name"]: one["signature"] for one in spec["endpoints"]},
            "options": {one["name"]: one["options"] for one in spec["endpoints"]},
            "replicas": list(range(config["num_replicas"] or 1)),
            "sizes": sizes,
            "return_first": config["return_first_rank_result"],
            "errors": config["errors"],
            "detached": spec["detached"],
            "state_epoch": 1,
            "metrics": {"service": {}, "replicas": {}},
        }
        return self.named[name]


def error_payload(code: str, **fields: Any) -> bytes:
    return bytes(msgpack.packb([code, fields]))


class Served:
    """A FakeBroker behind a ROUTER on the running loop."""

    def __init__(self, broker: FakeBroker, address: str) -> None:
        self.broker = broker
        self.address = address
        self._routes: dict[str, bytes] = {}
        self._changed = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self.open()

    def open(self) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        self._socket.set(zmq.LINGER, 0)
        self._socket.bind(self.address)
        self._fd = int(self._socket.get(zmq.FD))
        self._loop.add_reader(self._fd, self.turn)

    def close(self) -> None:
        """As a broker that dies: connections break."""
        if not self._socket.closed:
            self._loop.remove_reader(self._fd)
            self._socket.close(linger=0)

    def turn(self) -> None:
        """Drain, handle, send."""
        while not self._socket.closed:
            try:
                route, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            envelope = decode(frames)
            if not envelope.body or envelope.body[0][0] != HEARTBEAT:  # those have a connection of their own
                self._routes[envelope.sender] = route
            self.broker.take(frames, time.monotonic())
        for name, out in self.broker.sent(time.monotonic()):
            self._socket.send_multipart([self._routes[name], *out], zmq.NOBLOCK)
        self._changed.set()

    async def until(self, holds: Callable[[FakeBroker], object], bound_s: float = 5.0) -> None:
        """Wait until something is true of the broker."""
        async with asyncio.timeout(bound_s):
            while not holds(self.broker):
                self._changed.clear()
                await self._changed.wait()


@asynccontextmanager
async def serve(folder: Path, **options: Any) -> AsyncIterator[Served]:
    served = Served(FakeBroker(**options), f"ipc://{folder}/fake.sock")
    try:
        yield served
    finally:
        served.close()
