"""A module that takes as long to import as torch does, in a worker: as long as SLOW_IMPORT_S says. And one of its users."""

from __future__ import annotations

import os
import time

from forge_client import ForgeActor, endpoint

until = time.monotonic() + float(os.environ.get("SLOW_IMPORT_S", "0"))
while time.monotonic() < until:
    sum(range(1000))


class Slow(ForgeActor):
    @endpoint
    async def pid(self) -> int:
        return os.getpid()
