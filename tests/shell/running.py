"""A real broker process for a test, and a hand-made peer that speaks to it through a plain socket."""

from __future__ import annotations

import json
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import zmq

from forge_contract.framing import Envelope, decode, encode
from forge_contract.messages import HELLO, WELCOME

BOUND_S = 15.0


class BrokerProcess:
    """`python -m forge_broker --serve …`, until `close`."""

    def __init__(self, **settings: Any) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "forge_broker", "--serve", json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        readable, _, _ = select.select([self.process.stdout], [], [], BOUND_S)
        assert readable, "the broker said nothing"
        self.said: dict[str, Any] = json.loads(self.process.stdout.readline() or b"{}")

    @property
    def address(self) -> str:
        return str(self.said["addresses"][0])

    def wait(self) -> int:
        return self.process.wait(BOUND_S)

    def close(self) -> str:
        """End it; what it wrote to stderr."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            _, errors = self.process.communicate(timeout=BOUND_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        return errors.decode()

    def __enter__(self) -> BrokerProcess:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class RawPeer:
    """A DEALER that sends what it is told, and reads envelopes with a bound."""

    def __init__(self, address: str, name: str = "c-00000000000000aa") -> None:
        self.name = name
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.connect(address)

    def hello_fields(self, **fields: Any) -> dict[str, Any]:
        return {
            "role": "client",
            "host": "elsewhere",
            "hostname": "elsewhere",
            "pid": 1,
            "pid_namespace": 0,
            "started": 0,
            "client": 0,
            **fields,
        }

    def send(self, number: int, body: list[Any], *, epoch: int = 1, incarnation: int = 0, ack: int = 0) -> None:
        self.socket.send_multipart(encode(self.name, epoch, incarnation, number, ack, body))

    def receive(self) -> Envelope:
        until = time.monotonic() + BOUND_S
        assert self.socket.poll(int((until - time.monotonic()) * 1000)), "nothing came"
        return decode(self.socket.recv_multipart())

    def greet(self, **fields: Any) -> dict[str, Any]:
        self.send(0, [[HELLO, self.hello_fields(**fields), []]])
        envelope = self.receive()
        assert envelope.body[0][0] == WELCOME, envelope.body
        return dict(envelope.body[0][1])

    def close(self) -> None:
        self.socket.close()
        self._context.term()

    def __enter__(self) -> RawPeer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def private_address(directory: Path) -> str:
    directory.chmod(0o700)
    return f"ipc://{directory}/broker.sock"
