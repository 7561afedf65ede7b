"""What a worker asks of the machine and the process it is: where its ranks may meet, its memory, its standard input, how
late its loop runs."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import time
from pathlib import Path


def choose_master(broker: str) -> tuple[str, int]:
    """An address of this machine and a port that is free now, for the ranks to meet (A7).

    The other ranks may be on other machines: the address from which this one reaches the broker is one that machines of
    the cluster know. Somebody may take the port before torch does; then `setup` fails and the replica is started again.
    """
    addr = "127.0.0.1"
    if broker.startswith("tcp://"):
        host, _, port = broker.removeprefix("tcp://").rpartition(":")
        family, kind, _, _, target = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)  # sends nothing; the kernel picks the route
            addr = probe.getsockname()[0]
    with socket.create_server((addr, 0), family=socket.AF_INET6 if ":" in addr else socket.AF_INET) as server:
        return addr, int(server.getsockname()[1])


def resident_bytes() -> int:
    """Memory of this process; where there is no /proc, the most it ever had."""
    try:
        return int(Path("/proc/self/statm").read_bytes().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def take_stdin(owned: bool) -> int | None:
    """Move the supervisor's pipe out of the way: an actor that reads stdin must not read that."""
    if not owned:
        return None
    owner = os.dup(0)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.set_blocking(owner, False)
    return owner


class LoopLag:
    """How late the loop comes to what it is given, as another thread sees it: the heartbeat's."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._last_s = 0.0
        self._asked: float | None = None  # monotonic; the loop has not answered yet

    def seen(self, now: float) -> float | None:
        """Seconds the loop took for the last question, or has taken for one that is still open. Asks the next one. None:
        the loop is closed."""
        if self._asked is not None:
            return now - self._asked
        self._asked = now
        try:
            self._loop.call_soon_threadsafe(self._answer)
        except RuntimeError:
            return None
        return self._last_s

    def _answer(self) -> None:
        if self._asked is not None:
            self._last_s = time.monotonic() - self._asked
            self._asked = None
