"""Many clients with one call outstanding each: connections spread over processes, so that no sender has two calls to send together.

    python -m bench.many_clients forge ipc:///run/user/1000/broker.sock 8     # one process, 8 connections; a rate for each line it reads

The same loop for Forge broker and for `zmq.proxy`: a call, its answer, the next. Behind `zmq.proxy` there are two kinds of client, as in
`zmq_proxy`: one that awaits a future for each call, and a bare socket. `Crowd` starts the processes and has them run at the same time.
"""

from __future__ import annotations

import asyncio
import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import zmq

from bench.closed_loop import PAYLOAD, REPLICAS, Call
from bench.zmq_proxy import Awaited

READY: Final = "ready"
FORGE: Final = "forge"
PROXY: Final = "proxy"
BARE: Final = "bare"


class Crowd:
    """`processes` programs with `connections` each, to one address. `end` them."""

    def __init__(self, kind: str, address: str, processes: int, connections: int) -> None:
        command = [sys.executable, "-m", __name__, kind, address, str(connections)]
        self._programs = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for _ in range(processes)
        ]
        for line in self._lines():
            if line != READY:
                raise RuntimeError(f"a client said {line!r}")

    def rate(self, seconds: float) -> float:
        """Calls/s of all together."""
        for program in self._programs:
            assert program.stdin is not None
            program.stdin.write(f"{seconds}\n")
            program.stdin.flush()
        return sum(map(float, self._lines()))

    def _lines(self) -> list[str]:
        lines = []
        for program in self._programs:
            assert program.stdout is not None
            line = program.stdout.readline().strip()
            if not line:
                raise RuntimeError(f"a client ended with {program.wait()}")
            lines.append(line)
        return lines

    def end(self) -> None:
        for program in self._programs:
            assert program.stdin is not None
            assert program.stdout is not None
            program.stdin.close()
        for program in self._programs:
            try:
                program.wait(10.0)
            except subprocess.TimeoutExpired:
                program.kill()
                program.wait()
            assert program.stdout is not None
            program.stdout.close()


async def forge(address: str, connections: int) -> None:
    from forge_client import connect, get_service, shutdown

    routes: list[Call] = []
    for _ in range(connections):
        await connect(address)
        routes.append((await get_service("Echo")).echo.route)  # bound to the latest connection
    await rates(routes)
    await shutdown()


async def proxy(address: str, connections: int) -> None:
    clients = [Awaited(address, REPLICAS) for _ in range(connections)]
    await rates([client.call for client in clients])
    for client in clients:
        client.close()


async def rates(calls: Sequence[Call]) -> None:
    """A rate for each line: one caller for each of these."""

    async def caller(call: Call, until: float) -> int:
        count = 0
        while time.perf_counter() < until:
            await call(PAYLOAD)
            count += 1
        return count

    print(READY, flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        began = time.perf_counter()
        counts = await asyncio.gather(*(caller(call, began + float(line)) for call in calls))
        print(sum(counts) / (time.perf_counter() - began), flush=True)


def bare(address: str, connections: int) -> None:
    context = zmq.Context()
    sockets = [context.socket(zmq.DEALER) for _ in range(connections)]
    poller = zmq.Poller()
    for socket in sockets:
        socket.connect(address)
        poller.register(socket, zmq.POLLIN)
        socket.send(PAYLOAD)
    for socket in sockets:
        socket.recv()
    print(READY, flush=True)
    while line := sys.stdin.readline():
        calls = 0
        began = time.perf_counter()
        until = began + float(line)
        for socket in sockets:
            socket.send(PAYLOAD)
        while time.perf_counter() < until:
            for socket, _ in poller.poll():
                socket.recv()
                socket.send(PAYLOAD)
                calls += 1
        for socket in sockets:
            socket.recv()
        print(calls / (time.perf_counter() - began), flush=True)
    context.destroy(linger=0)


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's, where it is installed."""
    if importlib.util.find_spec("uvloop") is None:
        return None
    import uvloop

    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


def main(arguments: Sequence[str]) -> Any:
    kind, address, connections = arguments
    if kind == BARE:
        return bare(address, int(connections))
    clients = {FORGE: forge, PROXY: proxy}[kind]
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(clients(address, int(connections)))


if __name__ == "__main__":
    main(sys.argv[1:])
