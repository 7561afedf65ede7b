"""The socket under a link: one DEALER on the running loop, for client and worker alike (PROTOCOL.md §1).

It moves frames and knows nothing about them but which are large: `forge_client.link` and `forge_worker.link` judge
what they mean, the program above decides when a turn is over. Plain pyzmq on a file descriptor, not zmq.asyncio: that
makes a future for each message and costs several times more (design W9).

libzmq's descriptor is edge-triggered and speaks of *something happened*, not of readable: after each send and each
drain that was cut short we have to look again ourselves, or sleep on a message that is already here.
"""

from __future__ import annotations

import asyncio
import socket as sockets
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

import zmq
from zmq import zmq_poll
from zmq.backend import Socket as BareSocket
from zmq.utils.monitor import recv_monitor_message

from forge_contract.addresses import SEND_BUFFER_BYTES

Frame = Any  # bytes, or a memoryview of what zmq holds (forge_contract.framing)

# From here on libzmq is given our buffer, and keeps it alive, instead of a copy. It is pyzmq's own threshold: below,
# the bookkeeping of a shared buffer costs more than copying it.
LARGE_BYTES: Final = 64 << 10
# Envelopes taken in one turn. A flood must not keep the loop from its other work; the next turn takes what is left.
ENVELOPES_A_TURN: Final = 100

# Plain ints: an operation on pyzmq's flag enums costs as much as the call it is made for.
_NOBLOCK: Final = int(zmq.NOBLOCK)
_MORE: Final = int(zmq.NOBLOCK | zmq.SNDMORE)
_POLLIN: Final = int(zmq.POLLIN)
# What pyzmq's `send` ends in. It looks for options of two kinds of socket that we have not first, for two thirds of its time.
_send: Final = BareSocket.send
_MONITORED: Final = zmq.EVENT_CONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED


def dealer_socket(address: str, max_message_bytes: int) -> zmq.Socket[bytes]:
    """A DEALER with the options of the protocol, connecting to `address`. It belongs to the calling thread.

    `Context.instance()` makes a new context after a fork, so a child never touches its parent's sockets.
    """
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    socket.set(zmq.SNDHWM, 0)  # credit bounds what is under way; a mark would drop
    socket.set(zmq.RCVHWM, 0)
    socket.set(zmq.LINGER, 0)
    socket.set(zmq.MAXMSGSIZE, max_message_bytes)
    socket.set(zmq.HEARTBEAT_IVL, 1000)
    socket.set(zmq.HEARTBEAT_TIMEOUT, 5000)
    socket.set(zmq.RECONNECT_IVL, 20)
    socket.set(zmq.RECONNECT_IVL_MAX, 500)
    return socket


def widen(descriptor: int) -> None:
    """Give a connection over ipc its SEND_BUFFER_BYTES. libzmq has an option for it, and heeds it for TCP only; TCP is left alone, as its
    buffers grow by themselves until somebody sets them. `descriptor`: libzmq's, which may have closed it by now."""
    with suppress(OSError):
        stream = sockets.socket(fileno=descriptor)
        try:
            if stream.family == sockets.AF_UNIX:
                stream.setsockopt(sockets.SOL_SOCKET, sockets.SO_SNDBUF, SEND_BUFFER_BYTES // 2)  # Linux doubles it
        finally:
            stream.detach()


class Dealer:
    """One connection of this process to a broker, on the running event loop (asyncio's or uvloop's).

    `receive(frames)` is called for every envelope: its first frame is bytes, further ones are memoryviews of what
    zmq received, uncopied. `turn()` follows once the socket is empty, or after `ENVELOPES_A_TURN`. `reconnected()` is
    called when a connection was made anew (everything in the old one's pipes is lost), `disconnected()` when it broke;
    the socket connects again by itself, for ever.

    Raises zmq.ZMQError when `address` is none that zmq understands.
    """

    def __init__(
        self,
        address: str,
        *,
        receive: Callable[[list[Frame]], None],
        turn: Callable[[], None],
        reconnected: Callable[[], None],
        disconnected: Callable[[], None],
        max_message_bytes: int,
    ) -> None:
        self.address = address
        self._loop = asyncio.get_running_loop()
        self._receive = receive
        self._turn = turn
        self._reconnected = reconnected
        self._disconnected = disconnected
        self._connections = 0
        self._drain_due = False
        self._socket = dealer_socket(address, max_message_bytes)
        self._look = [(self._socket, _POLLIN)]
        # Before connecting, or the first handshake may be over unseen and a later one be taken for the first.
        self._monitor: zmq.Socket[bytes] = self._socket.get_monitor_socket(_MONITORED)
        self._fd = int(self._socket.get(zmq.FD))
        self._monitor_fd = int(self._monitor.get(zmq.FD))
        try:
            self._socket.connect(address)
        except zmq.ZMQError:
            self._close_sockets(0.0)
            raise
        self._loop.add_reader(self._fd, self._drain)
        self._loop.add_reader(self._monitor_fd, self._watch)
        self._drain_soon()
        self._loop.call_soon(self._watch)

    def __repr__(self) -> str:
        state = "closed" if self.closed else "open"
        return f"<Dealer {self.address} {state}, connected {self._connections} times>"

    @property
    def closed(self) -> bool:
        return bool(self._socket.closed)

    def send(self, frames: list[Frame]) -> None:
        """Hand one envelope to the socket. Never blocks: what cannot go yet waits in zmq. Large frames are not copied
        and must not change until their envelope is acknowledged. A closed dealer drops it: its link knows why."""
        socket = self._socket
        if socket.closed:
            return
        last = len(frames) - 1
        for at, frame in enumerate(frames):
            _send(socket, frame, _NOBLOCK if at == last else _MORE, len(frame) < LARGE_BYTES)
        if zmq_poll(self._look, 0):
            self._drain_soon()  # sending has swallowed the edge

    def close(self, linger_s: float = 0.0) -> None:
        """No callback comes after this. What was sent goes on for up to `linger_s`, in zmq's own thread."""
        if self.closed:
            return
        self._loop.remove_reader(self._fd)
        self._loop.remove_reader(self._monitor_fd)
        self._close_sockets(linger_s)

    def _close_sockets(self, linger_s: float) -> None:
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=int(linger_s * 1000))

    def _drain_soon(self) -> None:
        if not self._drain_due:
            self._drain_due = True
            self._loop.call_soon(self._drain_again)

    def _drain_again(self) -> None:
        self._drain_due = False
        if not self.closed:
            self._drain()

    def _drain(self) -> None:
        socket = self._socket
        receive, recv = self._receive, socket.recv
        drained = False
        try:
            for _ in range(ENVELOPES_A_TURN):
                try:
                    frame = recv(_NOBLOCK, copy=False)
                except zmq.Again:
                    drained = True
                    break
                # A zmq frame knows whether more follow; asking the socket for it costs as much as receiving.
                frames: list[Frame] = [frame.bytes]
                while frame.more:
                    frame = recv(_NOBLOCK, copy=False)
                    frames.append(frame.buffer)
                receive(frames)
                if self.closed:
                    return
                # An exception to learn it costs twice as much, and asking for the option is looking it up in an enum.
                if not zmq_poll(self._look, 0):
                    drained = True
                    break
        finally:
            # Also when `receive` raised, which the loop reports: the rest must not wait for an edge that has passed.
            if not drained and not self.closed:
                self._drain_soon()
        self._turn()

    def _watch(self) -> None:
        """Read the monitor until it is empty; its descriptor is edge-triggered too."""
        while not self._monitor.closed:
            try:
                said = recv_monitor_message(self._monitor, zmq.NOBLOCK)
            except zmq.Again:
                return
            event = said["event"]
            if event == zmq.EVENT_CONNECTED:
                widen(said["value"])
            elif event == zmq.EVENT_DISCONNECTED:
                self._disconnected()
            elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._connections += 1
                if self._connections > 1:
                    self._reconnected()
