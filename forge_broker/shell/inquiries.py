"""How other threads learn what the broker is like: they ask, the loop answers between two turns. Nobody but the loop touches the core.

One answer serves all who ask for the same thing meanwhile, so that however many there are, the loop works for one. It wakes by the same
socket as for signals.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any


class LoopSilent(Exception):
    """The loop has not answered in time, or has ended."""


class Inquiries:
    """`wake`: a socket whose other end the loop watches; non-blocking."""

    def __init__(self, wake: socket.socket) -> None:
        self._wake = wake
        self._lock = threading.Lock()
        self._open: dict[str, Future[Any]] = {}
        self._over = False

    def ask(self, what: str, timeout_s: float) -> Any:
        """Any thread: the loop's answer. Raises LoopSilent, or what answering raised."""
        with self._lock:
            if self._over:
                raise LoopSilent("the broker has ended")
            answer = self._open.get(what)
            if answer is None:
                answer = self._open[what] = Future()
                self._ring()
        try:
            return answer.result(timeout_s)
        except TimeoutError:
            raise LoopSilent(f"the broker's loop has not answered for {timeout_s:g} s") from None

    def answer(self, answers: Mapping[str, Callable[[], Any]]) -> None:
        """The loop, when it was woken: what was asked for, once each. An error is the asker's: it must not end the broker."""
        if not self._open:  # as whenever a signal woke it
            return
        with self._lock:
            asked, self._open = self._open, {}
        for what, answer in asked.items():
            try:
                answer.set_result(answers[what]())
            except Exception as error:
                answer.set_exception(error)

    def close(self) -> None:
        """The loop has ended: who waits is told so."""
        with self._lock:
            self._over = True
            for answer in self._open.values():
                answer.set_exception(LoopSilent("the broker has ended"))
            self._open = {}

    def _ring(self) -> None:
        try:
            self._wake.send(b"?")
        except BlockingIOError:
            return  # full of bells that it has not heard yet: it will look
