"""A broker of pyzmq as one writes it after reading the guide: one message per call, in the manner of Majordomo.

Clients and workers each on a ROUTER of the broker, queued calls in a deque, the worker with the most credit first. Kinder
than the guide's own: a worker may hold `CREDIT` calls, sockets are drained before the next poll, large frames are not
copied, and the client gives futures. It keeps no ledger and notices no death.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import AsyncIterator
from typing import Final

import numpy as np
import zmq
from numpy.typing import NDArray

from bench.peers.load import NOOP, REPLICAS, TENSOR, Call, run

CREDIT: Final = 64  # calls that a worker may hold
LARGE_BYTES: Final = 65536  # from here on libzmq is spared the copy; below, a copy is cheaper than keeping the object
READY: Final = b"\x01"
BOUND_S: Final = 20.0


def broker(clients_at: str, workers_at: str) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    clients, workers = (_router(context, address) for address in (clients_at, workers_at))
    waiting: deque[tuple[bytes, bytes, zmq.Frame]] = deque()
    credit: dict[bytes, int] = {}
    poller = zmq.Poller()
    poller.register(clients, zmq.POLLIN)
    poller.register(workers, zmq.POLLIN)
    while True:
        for socket, _ in poller.poll():
            with contextlib.suppress(zmq.Again):
                while True:
                    peer, *rest = socket.recv_multipart(zmq.NOBLOCK, copy=False)
                    if socket is clients:
                        number, body = rest
                        waiting.append((peer.bytes, number.bytes, body))
                    elif len(rest) == 1:
                        credit[peer.bytes] = CREDIT
                    else:
                        client, number, body = rest
                        credit[peer.bytes] += 1
                        _send(clients, client.bytes, number.bytes, body)
        while waiting and credit:
            worker = max(credit, key=credit.__getitem__)
            if credit[worker] == 0:
                break
            credit[worker] -= 1
            _send(workers, worker, *waiting.popleft())


def worker(workers_at: str) -> None:
    socket = zmq.Context().socket(zmq.DEALER)
    socket.connect(workers_at)
    socket.send(READY)
    while True:
        client, number, body = socket.recv_multipart(copy=False)
        _send(socket, client.bytes, number.bytes, body)  # the work: to answer with what was sent


def _router(context: zmq.Context[zmq.Socket[bytes]], address: str) -> zmq.Socket[bytes]:
    socket = context.socket(zmq.ROUTER)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.bind(address)
    return socket


def _send(socket: zmq.Socket[bytes], *frames: bytes | zmq.Frame) -> None:
    socket.send_multipart(frames, copy=len(frames[-1]) < LARGE_BYTES)


class Client:
    """Futures over one DEALER, whose descriptor the loop watches."""

    def __init__(self, address: str) -> None:
        self._loop = asyncio.get_running_loop()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.connect(address)
        self._waiting: dict[bytes, asyncio.Future[zmq.Frame]] = {}
        self._numbers = itertools.count()
        self._looks = False
        self._loop.add_reader(self._socket.fileno(), self._receive)

    def call(self, payload: bytes | memoryview) -> asyncio.Future[zmq.Frame]:
        number = next(self._numbers).to_bytes(8, "big")
        future = self._waiting[number] = self._loop.create_future()
        self._socket.send_multipart((number, payload), copy=len(payload) < LARGE_BYTES)
        if not self._looks:  # the descriptor is edge-triggered, and sending may have taken the edge
            self._looks = True
            self._loop.call_soon(self._receive)
        return future

    def _receive(self) -> None:
        self._looks = False
        with contextlib.suppress(zmq.Again):
            while True:
                number, body = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
                self._waiting.pop(number.bytes).set_result(body)

    async def noop(self, payload: bytes) -> bytes:
        return (await self.call(payload)).bytes

    async def tensor(self, array: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.frombuffer((await self.call(array.data.cast("B"))).buffer, dtype=np.float32)

    def close(self) -> None:
        self._loop.remove_reader(self._socket.fileno())
        self._context.destroy(linger=0)


@contextlib.asynccontextmanager
async def serving(kind: str) -> AsyncIterator[Call]:
    program = [sys.executable, "-m", "bench.peers.majordomo"]
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as ending:
        addresses = [f"ipc://{directory}/{name}" for name in ("clients", "workers")]
        for arguments in (["broker", *addresses], *[["worker", addresses[1]]] * REPLICAS):
            # Nothing else runs on this loop yet that starting a process could hold up.
            process = ending.enter_context(subprocess.Popen([*program, *arguments]))  # noqa: ASYNC220
            ending.callback(process.kill)
        client = Client(addresses[0])
        try:
            async with asyncio.timeout(BOUND_S):
                await client.noop(b"")
            yield client.noop if kind == NOOP else client.tensor
        finally:
            client.close()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["broker", clients_at, workers_at]:
            broker(clients_at, workers_at)
        case ["worker", workers_at]:
            worker(workers_at)
        case _:
            run(serving, "pyzmq", "uvloop", kinds=(NOOP, TENSOR))
