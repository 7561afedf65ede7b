"""A sign of life that does not depend on the loop: a thread with a socket of its own (design F1, W9).

A user's function that holds the loop for a minute must not look like a dead process, so the beat has its own thread;
sockets belong to one thread, so it has its own DEALER. What the beat says is the owner's, asked in this thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Final

import zmq

from forge_client.dealer import dealer_socket

Frame = Any

MAX_MESSAGE_BYTES: Final = 1 << 20  # nobody has anything to say to this socket


class Heartbeat:
    """Sends what `beat()` returns every `heartbeat_s` to the broker at `address`; None sends nothing this time."""

    def __init__(self, address: str, beat: Callable[[], list[Frame] | None]) -> None:
        self._address = address
        self._beat = beat
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, heartbeat_s: float) -> None:
        """The first beat is sent at once. A second start does nothing: one thread serves all epochs of a link."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, args=(heartbeat_s,), name="forge-heartbeat", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Ends the thread and waits for it, which takes no longer than one `beat()`."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self, heartbeat_s: float) -> None:
        socket = dealer_socket(self._address, MAX_MESSAGE_BYTES)
        # Unlike messages, beats are worthless later: with nobody connected they are dropped, not kept.
        socket.set(zmq.IMMEDIATE, 1)
        socket.set(zmq.SNDHWM, 2)
        socket.set(zmq.RCVHWM, 2)
        try:
            socket.connect(self._address)
            while not self._over.is_set():
                self._send(socket, self._beat())
                self._over.wait(heartbeat_s)
        finally:
            socket.close(linger=0)

    def _send(self, socket: zmq.Socket[bytes], frames: list[Frame] | None) -> None:
        if frames is None:
            return
        try:
            socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            return  # not connected: the silence says so
