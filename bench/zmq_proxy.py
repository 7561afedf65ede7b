"""The yardstick: libzmq's own `zmq.proxy`, one message per call, between one client and echoing workers.

What a broker in C passes that decides nothing: no queue, no ledger, no deadline, no session. There are two clients of it. `Awaited` is
what a program needs that awaits its calls, as ours do: a future for each, on the loop. `Client` keeps a window of messages outstanding on
a plain socket and never asks which call it is that was answered: no program could be written on it, but nothing on this way is faster.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import zmq

# Plain ints: pyzmq's enums cost a microsecond a message.
_NOW = int(zmq.DONTWAIT)
_EVENTS, _IN = int(zmq.EVENTS), int(zmq.POLLIN)
_NUMBER = 8  # bytes before the payload


def _proxy(front: str, back: str) -> None:
    context = zmq.Context()
    frontend, backend = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
    for socket, address in ((frontend, front), (backend, back)):
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.bind(address)
    zmq.proxy(frontend, backend)


def _worker(back: str) -> None:
    socket = zmq.Context().socket(zmq.DEALER)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.connect(back)
    while True:
        socket.send_multipart(socket.recv_multipart())


@contextlib.contextmanager
def running(workers: int) -> Iterator[str]:
    """A proxy and its workers, each a process; the address for clients."""
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as directory:
        front, back = (f"ipc://{Path(directory) / name}" for name in ("front", "back"))
        processes = [spawn.Process(target=_proxy, args=(front, back), daemon=True)]
        processes += [spawn.Process(target=_worker, args=(back,), daemon=True) for _ in range(workers)]
        for process in processes:
            process.start()
        try:
            yield front
        finally:
            for process in processes:
                process.kill()
                process.join()


def _connect(context: zmq.Context[zmq.Socket[bytes]], address: str, workers: int) -> zmq.Socket[bytes]:
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.connect(address)
    # The proxy hands messages out in turn, so this many replies mean that every worker is there.
    for _ in range(workers * 4):
        socket.send(b"hello")
    for _ in range(workers * 4):
        socket.recv()
    return socket


class Awaited:
    """Calls that are awaited: a message and a future each. To be made on the loop it is used on."""

    def __init__(self, address: str, workers: int) -> None:
        self._context = zmq.Context()
        self._socket = _connect(self._context, address, workers)
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[bytes, asyncio.Future[bytes]] = {}
        self._sent = 0
        self._looking = False
        self._descriptor = int(self._socket.getsockopt(zmq.FD))
        self._loop.add_reader(self._descriptor, self._receive)

    def call(self, payload: bytes) -> asyncio.Future[bytes]:
        self._sent += 1
        number = self._sent.to_bytes(_NUMBER, "little")
        self._socket.send(number + payload, _NOW)
        future = self._waiting[number] = self._loop.create_future()
        if not self._looking:  # the descriptor is edge-triggered: to send may have taken the edge
            self._looking = True
            self._loop.call_soon(self._receive)
        return future

    def _receive(self) -> None:
        self._looking = False
        receive, waiting = self._socket.recv, self._waiting
        while int(self._socket.getsockopt(_EVENTS)) & _IN:
            with contextlib.suppress(zmq.Again):  # until there is none
                while True:
                    message = receive(_NOW)
                    future = waiting.pop(message[:_NUMBER])
                    if not future.done():
                        future.set_result(message[_NUMBER:])

    def close(self) -> None:
        self._loop.remove_reader(self._descriptor)
        self._socket.close(linger=0)
        self._context.term()


class Client:
    """A window of messages, and nobody who awaits one of them."""

    def __init__(self, address: str, workers: int) -> None:
        self._context = zmq.Context()
        self._socket = _connect(self._context, address, workers)

    def rate(self, payload: bytes, outstanding: int, seconds: float) -> float:
        """Calls/s in a closed loop."""
        send, receive = self._socket.send, self._socket.recv
        for _ in range(outstanding):
            send(payload)
        calls = 0
        began = time.perf_counter()
        until = began + seconds
        while time.perf_counter() < until:
            for _ in range(64):
                receive()
                send(payload)
            calls += 64
        elapsed = time.perf_counter() - began
        for _ in range(outstanding):
            receive()
        return calls / elapsed

    def latencies_ms(self, payload: bytes, calls: int) -> list[float]:
        """Round trips one after another."""
        found = []
        for _ in range(calls):
            began = time.perf_counter()
            self._socket.send(payload)
            self._socket.recv()
            found.append((time.perf_counter() - began) * 1e3)
        return found

    def median_ms(self, payload: bytes, calls: int) -> float:
        return statistics.median(self.latencies_ms(payload, calls))

    def close(self) -> None:
        self._socket.close(linger=0)
        self._context.term()
