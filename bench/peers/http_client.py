"""What the two HTTP peers share: the server as a process of its own, and a client that is as lean as HTTP allows.

The client is an asyncio protocol around httptools, whose parser is C (llhttp): one kept-alive connection for each call
that is outstanding, one write for each request. A client with sessions, header objects and timeouts would be fairer to its
users and less fair to the servers: on two cores, what it takes they do not get.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any, Final

import httptools
import numpy as np
from numpy.typing import NDArray

from bench.peers.load import PAYLOAD, TENSOR, Call
from bench.ports import free_port

HOST: Final = "127.0.0.1"
UP_S: Final = 40.0
LOOK_S: Final = 0.1
END_S: Final = 2.0
BYTES: Final = "application/octet-stream"


@contextlib.asynccontextmanager
async def serving(module: str, kind: str) -> AsyncIterator[Call]:
    """`python -m MODULE serve KIND PORT`, which takes and gives bytes at /KIND."""
    port = free_port()
    server = subprocess.Popen(  # noqa: ASYNC220 - nothing else runs on this loop yet
        [sys.executable, "-m", module, "serve", kind, str(port)], stdout=sys.stderr, process_group=0
    )
    client = Client(port)
    try:
        call = client.caller(f"/{kind}")

        async def tensor(array: NDArray[np.float32]) -> NDArray[np.float32]:
            return np.frombuffer(await call(array.data.cast("B")), dtype=np.float32)

        async with asyncio.timeout(UP_S):
            await _until_up(server, call)
        yield tensor if kind == TENSOR else call
    finally:
        client.close()
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(END_S)
        with contextlib.suppress(ProcessLookupError):  # its workers are in its group, and may outlive it
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


class Client:
    """Connections to one port; those without a call wait to be used again."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._idle: list[Connection] = []
        self._all: list[Connection] = []

    def caller(self, path: str) -> Call:
        head = (
            f"POST {path} HTTP/1.1\r\nHost: {HOST}:{self._port}\r\nContent-Type: {BYTES}\r\nContent-Length: ".encode()
        )

        async def call(body: bytes | memoryview) -> bytes:
            connection = self._idle.pop() if self._idle else await self._connect()
            answer = await connection.ask(b"%b%d\r\n\r\n" % (head, len(body)), body)
            self._idle.append(connection)
            return answer

        return call

    async def _connect(self) -> Connection:
        _, connection = await asyncio.get_running_loop().create_connection(Connection, HOST, self._port)
        self._all.append(connection)
        return connection

    def close(self) -> None:
        for connection in self._all:
            connection.close()


class Connection(asyncio.Protocol):
    """One request at a time. Raises ConnectionError when the server hangs up, RuntimeError for a status other than 200."""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._parser = httptools.HttpResponseParser(self)
        self._parts: list[bytes] = []
        self._answer: asyncio.Future[bytes] | None = None

    def ask(self, head: bytes, body: bytes | memoryview) -> asyncio.Future[bytes]:
        if self._transport.is_closing():
            raise ConnectionResetError("the server has closed a connection that was kept")
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.writelines((head, body))
        return self._answer

    def close(self) -> None:
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, part: bytes) -> None:
        self._parts.append(part)

    def on_message_complete(self) -> None:
        answer, self._answer = self._answer, None
        body = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._parts = []
        if answer is None or answer.done():
            return  # the caller has given up
        if (status := self._parser.get_status_code()) == 200:
            answer.set_result(body)
        else:
            answer.set_exception(RuntimeError(f"HTTP {status}: {body[:200].decode(errors='replace')}"))

    def connection_lost(self, error: Exception | None) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ConnectionResetError("the server hung up"))


async def _until_up(server: subprocess.Popen[bytes], call: Call) -> None:
    while True:
        try:
            await call(PAYLOAD)
        except (OSError, RuntimeError) as error:  # nobody listens yet, or it listens and has no worker yet
            if server.poll() is not None:
                raise RuntimeError(f"the server ended with {server.returncode}") from error
            await asyncio.sleep(LOOK_S)
        else:
            return
