"""The actor's own opinion of itself: `health()`, asked again and again while it serves (design F1).

`runtime` starts it after READY and acts on its verdict. A `health()` that never returns gives none: whether a process
hangs is for `hang_timeout_s` to say.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Final

from forge_worker.hooks import call_hook, is_our_cancel
from forge_worker.outcomes import trimmed

log = logging.getLogger("forge_worker")

IN_A_ROW: Final = 3  # one failure is a hiccup; a restart costs more than two more looks


async def until_unhealthy(health: Callable[[], Any], poll_s: float) -> BaseException | None:
    """Call `health` every `poll_s` seconds, never twice at once, until it has failed three times in a row.

    It fails by raising, or by returning False; nothing else that it returns is a complaint.
    Returns what it raised the last time, None when it returned.
    """
    failures = 0
    while True:
        await asyncio.sleep(poll_s)
        raised: BaseException | None = None
        try:
            healthy = await call_hook(health) is not False
        except BaseException as error:
            if is_our_cancel(error):
                raise
            raised, healthy = trimmed(error), False
        failures = 0 if healthy else failures + 1
        if failures:
            log.warning("health() failed, %d of %d in a row", failures, IN_A_ROW, exc_info=raised)
        if failures == IN_A_ROW:
            return raised
