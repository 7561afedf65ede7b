"""A TCP proxy on loopback that breaks connections in the ways networks do.

`chaos` puts it between a broker and those of its peers that come by TCP. It has no opinion on what it carries. TCP never loses
single bytes of a connection that lives, so neither does this: a black hole keeps what was sent until it is healed, as
retransmission would, and a connection that is given up is given up whole.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import Final, Literal

Direction = Literal["up", "down"]  # to the target, and back

CHUNK_BYTES: Final = 64 << 10
RESET_AT_CLOSE: Final = struct.pack(
    "ii", 1, 0
)  # SO_LINGER of 0 s: closing sends RST and forgets what was in the buffers


class FaultProxy:
    """`target_port`: on 127.0.0.1, like ourselves. To be used on the loop it was started on."""

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._server: asyncio.Server | None = None
        self._connections: set[_Connection] = set()
        self._open: dict[Direction, asyncio.Event] = {"up": asyncio.Event(), "down": asyncio.Event()}
        self._delay_s = 0.0
        self.heal()

    def __repr__(self) -> str:
        closed = [direction for direction, event in self._open.items() if not event.is_set()]
        return f"<FaultProxy to {self._target_port}, {len(self._connections)} connections, closed: {closed or 'none'}>"

    def __len__(self) -> int:
        """Connections at the moment, half-open ones included."""
        return len(self._connections)

    async def start(self) -> int:
        """Listen; returns the port."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=CHUNK_BYTES)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def close(self) -> None:
        """Stop listening and end every connection."""
        if self._server is not None:
            self._server.close()
        tasks = [task for connection in self._connections for task in connection.tasks]
        self.reset()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # The faults. Each says how many connections it met.

    def reset(self) -> int:
        """Both ends get RST; what was under way is gone. New connections are carried as before."""
        met = list(self._connections)
        for connection in met:
            connection.abort()
        return len(met)

    def half_open(self) -> int:
        """The target gets RST; the peer hears nothing, and what it says goes nowhere."""
        met = [connection for connection in self._connections if not connection.half_open]
        for connection in met:
            connection.half_open = True
            connection.up.transport.abort()
        return len(met)

    def black_hole(self, direction: Direction) -> int:
        """Nothing arrives in this direction until `heal`, on new connections neither; the other one works."""
        self._open[direction].clear()
        return len(self._connections)

    def delay(self, seconds: float) -> int:
        """Everything arrives this much later, until `heal`."""
        self._delay_s = seconds
        return len(self._connections)

    def heal(self) -> None:
        """Black holes and delays are over. Half-open connections stay so: their ends find out, or do not."""
        self._delay_s = 0.0
        for event in self._open.values():
            event.set()

    # Carrying.

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        _reset_at_close(writer)
        try:
            target_reader, target_writer = await asyncio.open_connection(
                "127.0.0.1", self._target_port, limit=CHUNK_BYTES
            )
        except OSError:
            writer.transport.abort()  # nobody listens there just now, and so the peer is told
            return
        _reset_at_close(target_writer)
        connection = _Connection(writer, target_writer)
        self._connections.add(connection)
        connection.tasks = [
            asyncio.create_task(self._pump(connection, "up", reader, target_writer)),
            asyncio.create_task(self._pump(connection, "down", target_reader, writer)),
        ]
        await asyncio.wait(connection.tasks)
        self._connections.discard(connection)
        connection.abort()

    async def _pump(
        self,
        connection: _Connection,
        direction: Direction,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        while data := await _read(reader):
            if self._delay_s:
                await asyncio.sleep(self._delay_s)
            await self._open[direction].wait()
            if connection.half_open:
                continue  # read, so that the peer can go on saying it, and forgotten
            try:
                writer.write(data)
                await writer.drain()
            except OSError:
                if not connection.half_open:  # which began while we wrote
                    break
        if not connection.half_open:
            # One side closed: the other learns it. A half-close is nothing that ZeroMQ does.
            connection.abort()


class _Connection:
    """`down`: to the peer that connected; `up`: to the target."""

    def __init__(self, down: asyncio.StreamWriter, up: asyncio.StreamWriter) -> None:
        self.down = down
        self.up = up
        self.half_open = False
        self.tasks: list[asyncio.Task[None]] = []

    def abort(self) -> None:
        self.down.transport.abort()
        self.up.transport.abort()


async def _read(reader: asyncio.StreamReader) -> bytes:
    """Empty at the end, whether the other side closed in order or not: to us that is the same."""
    try:
        return await reader.read(CHUNK_BYTES)
    except OSError:
        return b""


def _reset_at_close(writer: asyncio.StreamWriter) -> None:
    held: socket.socket = writer.get_extra_info("socket")
    held.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_AT_CLOSE)
