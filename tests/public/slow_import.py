"""A module that takes as long to import as torch does, in a worker: as long as SLOW_IMPORT_S says. And one of its users."""

from __future__ import annotations

import os
import random
import sys
import time

from forge_client import ForgeActor, endpoint

until = time.monotonic() + float(os.environ.get("SLOW_IMPORT_S", "0"))
while time.monotonic() < until:
    random.random()

IMPORTED_IN = os.getpid()


class Slow(ForgeActor):
    @endpoint
    async def pid(self) -> int:
        return os.getpid()

    @endpoint
    async def seen(self) -> tuple[int, float, str]:
        """Where the module was imported, a random number, and where Python is."""
        return IMPORTED_IN, random.random(), sys.executable
