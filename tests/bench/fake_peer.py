"""A peer that needs nothing installed, for `test_against_peers`: it answers in its own process, or misbehaves as told.

Told by the environment, since the measurement gives it the same arguments as any peer. PEER_BEHAVIOUR: `well`, `no batches`,
`bad tensor`, `dies`, `hangs`. PEER_LEAVES names a file: then it starts a process that outlives it, and writes its pid there.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from bench.peers.load import BATCH, BATCH_NOOP, KINDS, TENSOR, Call, run, size_told

BEHAVIOUR = os.environ.get("PEER_BEHAVIOUR", "well")


async def echo(value: Any) -> Any:
    await asyncio.sleep(0)
    return value


async def batch(_: Any) -> Any:
    await asyncio.sleep(0)
    return size_told(BATCH // 2)


async def another(value: Any) -> Any:
    return value + 1


@contextlib.asynccontextmanager
async def serving(kind: str) -> AsyncIterator[Call]:
    if BEHAVIOUR == "dies":
        sys.exit("ERROR: no such device")
    if BEHAVIOUR == "hangs":
        await asyncio.Event().wait()
    if kind == TENSOR and BEHAVIOUR == "bad tensor":
        yield another
    else:
        yield batch if kind == BATCH_NOOP else echo


if __name__ == "__main__":
    if leaves := os.environ.get("PEER_LEAVES"):
        left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
        Path(leaves).write_text(str(left.pid), encoding="utf-8")
    run(serving, "numpy", kinds=KINDS[:2] if BEHAVIOUR == "no batches" else KINDS)
