"""The yardstick: libzmq's own `zmq.proxy`, one message per call, between one client and echoing workers.

What a broker in C passes that decides nothing: no queue, no ledger, no deadline, no session. The client keeps a window of messages
outstanding on a plain socket, without futures, which favours the yardstick.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import zmq


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


class Client:
    def __init__(self, address: str, workers: int) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.connect(address)
        # The proxy hands messages out in turn, so this many replies mean that every worker is there.
        for _ in range(workers * 4):
            self._socket.send(b"hello")
        for _ in range(workers * 4):
            self._socket.recv()

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
