"""The future of one call, and how it is noticed that nobody waits for it any more.

The future is the loop's own and no subclass: asyncio steps a task that awaits one in C, and asks a subclass for everything by name, which
costs 0.5 µs a call. So there is nothing to override; a cancelled call is told by a callback. The loop never has to run it for an
answered one: whoever reads the answer takes it off before. Nor does the callback know which call it is of, as that would be an
object for each; the few calls that are cancelled are looked up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from forge_client.replies import Reader

Call = asyncio.Future[Any]
# What the link keeps of an unanswered call: to be resolved, as that reader reads the reply.
Waiter = tuple[Call, "Reader"]

# Numbers of answered calls that may stay; at this surplus they are forgotten, and the unanswered ones looked at again.
SURPLUS: Final = 1024


class GivenUp:
    """Tells `drop` the sequence numbers of calls that are cancelled. `unanswered` is the link's (sequence to waiter, in rising order).

    What a call costs here is its callback, put on and taken off: 0.1 µs.
    """

    def __init__(self, unanswered: dict[int, Waiter | None], drop: Callable[[int], None]) -> None:
        self._unanswered = unanswered
        self._drop = drop
        # By the id of the future, as it must not keep a result alive. An id is good again for a later call, so what is
        # found is compared; later calls are entered later, and the last entry counts.
        self._numbers: dict[int, int] = {}
        self._looked_at = 0  # calls up to this number

    def done(self, call: Call) -> None:
        """The callback."""
        if call.cancelled():
            number = self._number(call)
            if number is not None:
                self._drop(number)

    def _number(self, call: Call) -> int | None:
        """None for a call that was never submitted, or has been answered. Looks at each call once, however many are cancelled."""
        unanswered, numbers = self._unanswered, self._numbers
        if len(numbers) > SURPLUS + 2 * len(unanswered):
            numbers.clear()
            self._looked_at = 0
        before = self._looked_at
        for number in reversed(unanswered):
            if number <= before:
                break
            self._looked_at = max(self._looked_at, number)
            waiter = unanswered[number]
            if waiter is not None:
                numbers[id(waiter[0])] = number
        found = numbers.pop(id(call), 0)
        waiter = unanswered.get(found)
        return found if waiter is not None and waiter[0] is call else None
