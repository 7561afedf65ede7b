"""A module that starts a thread when it is imported, as some do to prefetch. And one of its users."""

from __future__ import annotations

import os
import threading

from forge_client import ForgeActor, endpoint

threading.Thread(target=threading.Event().wait, name="prefetch", daemon=True).start()


class Threaded(ForgeActor):
    @endpoint
    async def pid(self) -> int:
        return os.getpid()
