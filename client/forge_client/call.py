"""The future of one call: what `route` and its like return, resolved by `client` when the reply is read.

A subclass of the loop's own future, so that `gather` and `wait` take it as it is, without a task around each call, and so
that a cancelled await reaches the broker without a callback on each call.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from forge_client.client import Client
    from forge_client.replies import Reader


class Call(asyncio.Future[Any]):
    """Cancelling it, as cancelling a task that awaits it does, cancels the call."""

    __slots__ = ("client", "reader", "replay", "seq")
    client: Client
    reader: Reader
    replay: Callable[
        [], None
    ]  # of a fan-out that is played to newcomers (A11): what is done when every replica has had it
    seq: int  # 0 before it was submitted

    def cancel(self, msg: Any | None = None) -> bool:
        """Whether it was cancelled by this; False when it was answered before."""
        cancelled = super().cancel(msg)
        if cancelled and self.seq:
            self.client.drop(self.seq)
        return cancelled
