"""How much a row of the table is measured, and what comes back: the words that `targets`, `through_the_broker` and `core_alone` share."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

Figures = dict[str, list[float]]  # by name, the value of each run


class NotHere(Exception):
    """What this row needs is not in this checkout, or not on this machine."""


class Effort(NamedTuple):
    """`scale`: of counts (calls that wait, sessions, replicas); 1.0 is what is promised."""

    runs: int = 5
    seconds: float = 1.0  # of each closed loop
    scale: float = 1.0

    def of(self, count: int) -> int:
        return max(1, int(count * self.scale))


Measure = Callable[[Effort], Figures]
