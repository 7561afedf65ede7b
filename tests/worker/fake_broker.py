"""A broker of a few lines for one worker: a real ROUTER and the contract's framing and channel, driven by the test.

It answers hello and probes by itself; everything else is said by the test, step by step, and every wait has a bound.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import zmq

from forge_contract.channel import Channel, Verdict
from forge_contract.framing import Envelope, Outbox, Payload, decode, encode, weigh
from forge_contract.messages import (
    ASSIGN,
    BROKER_NAME,
    BYE,
    DISPATCH,
    DROP,
    HEARTBEAT,
    HELLO,
    IMPORT,
    PROBE,
    READY,
    REFUSE,
    REPLAY,
    REPLIES,
    STATES,
    STOP,
    UNREADY,
    WARM,
    WELCOME,
    WHO,
    request_id,
    sequence_of,
    spread,
)
from forge_contract.payload import decode as decode_value
from forge_contract.payload import decode_exception, encode_call
from forge_contract.payload import encode as encode_value

HERE = Path(__file__).parent
BOUND_S = 20.0


class FakeBroker:
    """`said` holds the worker's messages that no `expect` has taken yet, each with its payloads."""

    def __init__(self, address: str, incarnation: int = 77, refuse: list[Any] | None = None, **welcome: Any) -> None:
        self.address = address
        self.incarnation = incarnation
        self.welcome = {"trusted": True, "heartbeat_s": 0.05, "orphan_grace_s": 5.0, **welcome}
        self.refuse = refuse
        self.hellos: list[dict[str, Any]] = []
        self.held: list[list[Payload]] = []  # what each hello carried
        self.beats: list[dict[str, Any]] = []
        self.said: list[tuple[list[Any], list[Payload]]] = []
        self.envelopes = 0
        self._identity = b""
        self._channel: Channel | None = None
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        self._socket.set(zmq.ROUTER_MANDATORY, 1)
        self._socket.bind(address)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close(linger=0)

    # What the broker says.

    def send(self, *messages: list[Any], payloads: tuple[Payload, ...] = ()) -> None:
        assert self._channel is not None
        outbox = Outbox()
        outbox.body.extend(messages)
        for payload in payloads:
            outbox.attach(payload)
        now = time.monotonic()
        channel = self._channel
        frames = outbox.seal(BROKER_NAME, channel.epoch, self.incarnation, channel.next_number(), channel.received)
        channel.keep(frames, weigh(frames), now)
        self._socket.send_multipart([self._identity, *frames])

    def assign(self, actor: str | dict[str, Any], *endpoints: Any, args: tuple[Any, ...] = (), **fields: Any) -> None:
        target = {"ref": f"sample_actors:{actor}"} if isinstance(actor, str) else actor
        defaults = assignment_fields(target, endpoints)
        payload = encode_call(args, {}, trusted=True, where="test")
        size = len(payload) if isinstance(payload, bytes) else -len(payload)
        self.send([ASSIGN, {**defaults, **fields}, size], payloads=(payload,))

    def warm(self, actor: str | dict[str, Any], **fields: Any) -> None:
        target = {"ref": f"sample_actors:{actor}"} if isinstance(actor, str) else actor
        named = {"name", "class_name", "gpus", "target", "path", "cwd", "trusted"}
        wanted = {name: value for name, value in assignment_fields(target, ()).items() if name in named}
        self.send([WARM, {**wanted, **fields}])

    def call(self, method: int, *calls: tuple[int, tuple[Any, ...]], epoch: int = 1, **columns: Any) -> None:
        """Dispatch `(sequence, args)`, all in one message, as attempts 1 of client 1."""
        packed: list[Payload] = [encode_call(args, {}, trusted=True, where="test") for _, args in calls]
        sizes = [len(one) if isinstance(one, bytes) else -len(one) for one in packed]
        ids = [request_id(1, sequence) for sequence, _ in calls]
        self.send([DISPATCH, epoch, method, True, ids, 1, sizes, columns], payloads=tuple(packed))

    def drop(self, *sequences: int) -> None:
        self.send([DROP, [request_id(1, sequence) for sequence in sequences]])

    def stop(self, grace_s: float = 2.0, *, replace: bool = True) -> None:
        self.send([STOP, "stopped by the test", grace_s, replace])

    def replay(self, method: int, *args: Any) -> None:
        self._with_payload([REPLAY, method, True], encode_call(args, {}, trusted=True, where="test"))

    def import_state(self, session: str, state: Any) -> None:
        self._with_payload([IMPORT, session, True], encode_value(state, trusted=True))

    def _with_payload(self, message: list[Any], payload: Payload) -> None:
        size = len(payload) if isinstance(payload, bytes) else -len(payload)
        self.send([*message, size], payloads=(payload,))

    def ask_who(self) -> None:
        assert self._channel is not None
        self._socket.send_multipart(
            [self._identity, *encode(BROKER_NAME, self._channel.epoch, self.incarnation, 0, 0, [[WHO]])]
        )

    # What the worker says.

    def expect(self, kind: int, bound_s: float = BOUND_S) -> tuple[list[Any], list[Payload]]:
        """The next message of this kind; those before it stay in `said`."""
        self.until(lambda: any(message[0] == kind for message, _ in self.said), f"message {kind}", bound_s)
        at = next(at for at, (message, _) in enumerate(self.said) if message[0] == kind)
        return self.said.pop(at)

    def replies(self, count: int, bound_s: float = BOUND_S) -> dict[int, tuple[int, Any]]:
        """`count` replies: sequence -> (status, value or exception or [code, fields])."""
        found: dict[int, tuple[int, Any]] = {}
        deadline = time.monotonic() + bound_s
        while len(found) < count:
            message, payloads = self.expect(REPLIES, deadline - time.monotonic())
            ids, statuses = message[2], message[4]
            for request, status, payload in zip(ids, spread(statuses, len(ids)), payloads, strict=True):
                found[sequence_of(request)] = (status, read_reply(status, payload))
        return found

    def state(self, bound_s: float = BOUND_S) -> tuple[str, Any]:
        """The next checkpoint: its session, its state."""
        (_, (session,), _), (payload,) = self.expect(STATES, bound_s)
        return session, decode_value(payload, trusted=True)

    def until(self, holds: Callable[[], bool], what: str, bound_s: float = BOUND_S) -> None:
        deadline = time.monotonic() + bound_s
        while not holds():
            left = deadline - time.monotonic()
            assert left > 0, f"no {what} within {bound_s} s; the worker said {self.said}"
            if self._socket.poll(int(min(left, 0.5) * 1000) + 1):
                self._take()

    def _take(self) -> None:
        identity, *frames = self._socket.recv_multipart()
        envelope = decode(frames)
        now = time.monotonic()
        if envelope.number:
            if self._channel is None or envelope.incarnation != self.incarnation:
                self._reply_to(identity, envelope, [[WHO]])
                return
            self._identity = identity
            self._channel.acknowledged(envelope.ack, now)
            if self._channel.accept(envelope.number, now) is Verdict.DELIVER:
                self.envelopes += 1
                for message in envelope.body:
                    self._hear(message, envelope)
            return
        for message in envelope.body:
            if message[0] == HELLO:
                self._identity = identity
                self.hellos.append(message[1])
                self.held.append(envelope.payloads.take_all(message[2]))
                self._channel = Channel(envelope.epoch)
                answer = [WELCOME, self.welcome] if self.refuse is None else [REFUSE, *self.refuse]
                self._reply_to(identity, envelope, [answer])
            elif message[0] == HEARTBEAT:
                self.beats.append(message[1])
            elif message[0] == PROBE:
                known = self._channel is not None and envelope.incarnation == self.incarnation
                self._reply_to(identity, envelope, [] if known else [[WHO]])

    def _reply_to(self, identity: bytes, envelope: Envelope, body: list[list[Any]]) -> None:
        ack = self._channel.received if self._channel is not None else 0
        self._socket.send_multipart([identity, *encode(BROKER_NAME, envelope.epoch, self.incarnation, 0, ack, body)])

    def _hear(self, message: list[Any], envelope: Envelope) -> None:
        sizes: list[int] = []
        if message[0] == REPLIES:
            sizes = message[5]
        elif message[0] == STATES:
            sizes = message[2]
        elif message[0] == UNREADY and message[2]:
            sizes = [message[2]]
        self.said.append((message, envelope.payloads.take_all(sizes)))


def read_reply(status: int, payload: Payload) -> Any:
    if status == 1:
        return decode_exception(payload, trusted=True)
    return decode_value(payload, trusted=True) if payload else None


def assignment_fields(target: dict[str, Any], endpoints: tuple[Any, ...]) -> dict[str, Any]:
    """Those of rank 0 of 1. An endpoint is its name, or `(name, options)`."""
    named = [(one, {}) if isinstance(one, str) else one for one in endpoints]
    return {
        "service": 1,
        "name": "sample",
        "class_name": str(target.get("ref", "Sample")).rpartition(":")[2],
        "replica": 0,
        "epoch": 1,
        "rank": 0,
        "world": 1,
        "local_rank": 0,
        "local_world": 1,
        "gpus": [],
        "target": target,
        "path": [str(HERE)],
        "cwd": str(HERE),
        "trusted": True,
        "endpoints": [{"name": name, "options": options} for name, options in named],
        "concurrency": 10,
        "serial": False,
        "max_payload_bytes": 1 << 20,
        "checkpoint_every": 0,
        "health_poll_rate": 0.01,
        "fatal_errors": [],
        "kept_reply_bytes": 1 << 20,
        "deed": {"service": 1, "name": "sample"},
    }


class Child:
    """A real worker process of the test's. Leaving the block ends it, by its pid."""

    def __init__(self, broker: FakeBroker | str, *arguments: str, **popen: Any) -> None:
        address = broker if isinstance(broker, str) else broker.address
        self.process = subprocess.Popen(
            [sys.executable, "-m", "forge_worker", "--child", "--broker", address, *arguments], **popen
        )

    def __enter__(self) -> subprocess.Popen[bytes]:
        return self.process

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(timeout=10)
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()


def start(broker: FakeBroker, actor: str | dict[str, Any], *endpoints: Any, **fields: Any) -> None:
    """Greet the worker, assign it, and wait until it is READY."""
    broker.until(lambda: bool(broker.hellos), "hello")
    broker.assign(actor, *endpoints, **fields)
    broker.expect(READY)


def goodbye(broker: FakeBroker, process: subprocess.Popen[bytes], bound_s: float = BOUND_S, code: int = 0) -> str:
    """The reason of the worker's BYE; and it has exited by itself, with this code."""
    (_, reason), _ = broker.expect(BYE, bound_s)
    deadline = time.monotonic() + bound_s

    def ended() -> bool:
        return process.poll() is not None

    while not ended():
        assert time.monotonic() < deadline, "the worker said BYE and stays"
        broker.until(ended, "end of the process", max(0.01, deadline - time.monotonic()))
    assert process.returncode == code
    return str(reason)
