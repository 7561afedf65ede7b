"""Calling what a class may define for us: `setup`, `teardown`, `health`, `export_session`, `import_session`.

Each may be async or plain; plain ones run on the loop's thread, where they may block for as long as the author thinks
right: the heartbeat has a thread of its own.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from typing import Any


async def call_hook(method: Callable[..., Any], *args: Any) -> Any:
    """What the method returns, awaited where it is awaitable. Raises what it raises, SystemExit too."""
    result = method(*args)
    return await result if inspect.isawaitable(result) else result


async def call_optional(instance: object, name: str) -> None:
    """Call a method that a class may leave out."""
    method = getattr(instance, name, None)
    if method is not None:
        await call_hook(method)


def is_our_cancel(error: BaseException) -> bool:
    """Whether `error` is the running task being cancelled, and not a hook's own CancelledError (of a task it awaits)."""
    task = asyncio.current_task()
    return isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling() > 0
