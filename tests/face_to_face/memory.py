"""Shared memory of the simulated machine (PROTOCOL.md §9.1): the real segments of real peers, in a directory instead of /dev/shm, so that
leases, generations and what is removed when are not played but happen. Only processes are simulated: who dies stops using its pool.

A large value is a payload with a buffer, which its sender shares if the broker said so. A reader spoils what it was given: the next
attempt has to find it as it was sent.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

from forge_broker.shell.segments import Segments
from forge_client.segments import Pool, open_segments
from forge_contract.framing import Payload
from forge_contract.segments import Terms, is_handle, read_handle

DOCUMENT: Final = b"\x90"
"""Stands before the one buffer of a large value; nobody here reads it."""

SHARED_FROM: Final = 1
"""`shared_memory_from` for simulations: every large value."""


class Memory:
    """What all peers on the broker's host see. A broker that comes back finds it as the last one left it."""

    def __init__(self) -> None:
        self.directory = tempfile.mkdtemp(prefix="simulated-shm-")
        self.segments = Segments("ipc:///simulated", self.directory)
        self._pools: list[Pool] = []

    def pool(self, name: str, terms: Terms, now: Callable[[], float]) -> Pool:
        """For the peer with this name, which was welcomed with these terms."""
        made = Pool(terms, name, directory=self.directory, clock=now)
        self._pools.append(made)
        return made

    def read(self, payload: Any) -> bytes:
        """What it stands for. Raises SegmentLost."""
        if not isinstance(payload, list):
            return bytes(payload)
        (buffer,) = payload[1:]
        if not is_handle(buffer):
            return bytes(buffer)
        (view,) = open_segments([read_handle(buffer)], self.directory)
        found = bytes(view)
        view[:] = b"\xff" * len(view)
        return found

    def left_by(self, dead: Iterable[str]) -> list[str]:
        """Files whose owners are no more."""
        gone = tuple(f"{self.segments.prefix}-{name}-" for name in dead)
        return sorted(path.name for path in Path(self.directory).iterdir() if path.name.startswith(gone))

    def close(self) -> None:
        for pool in self._pools:
            pool.close()
        self.segments.close()
        shutil.rmtree(self.directory)


def large(value: bytes, pool: Pool | None) -> Payload:
    """It as a payload with a buffer, in shared memory where there is a pool."""
    payload: Payload = [DOCUMENT, value]
    return payload if pool is None else pool.share(payload)
