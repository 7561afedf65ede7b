"""A module that knows in which process it was imported. And one of its users."""

from __future__ import annotations

import os
import random

from forge_client import ForgeActor, endpoint

IMPORTED_IN = os.getpid()


class Where(ForgeActor):
    @endpoint
    async def pid(self) -> int:
        return os.getpid()

    @endpoint
    async def seen(self) -> tuple[int, float]:
        """Where the module was imported, and a random number."""
        return IMPORTED_IN, random.random()
