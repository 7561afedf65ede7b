"""When a replica that died is tried again: pure arithmetic, with the chance handed in (F7)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from random import Random

UNHEALTHY_AFTER: Final = 3  # deaths in a row: one may be chance, two a coincidence
STEADY_S: Final = 30.0  # HEALTHY for so long, its earlier deaths are forgiven
WORKED_S: Final = 1.0  # … or for so long, if it answered calls: whatever killed it, it is no failure to serve


def is_forgiven(healthy_s: float, answered: int) -> bool:
    """Whether a replica that dies now, HEALTHY for so long and with so many answers in this epoch, has a clean record."""
    return healthy_s >= STEADY_S or (healthy_s >= WORKED_S and answered > 0)


def backoff_s(deaths: int, first_s: float, at_most_s: float, random: Random) -> float:
    """Seconds to wait after this many deaths in a row: none after the first, then doubling, with up to 20 % of jitter so that
    replicas that died together do not come back together."""
    if deaths <= 1:
        return 0.0
    return min(at_most_s, first_s * 2.0 ** min(deaths - 2, 30)) * (1.0 + 0.2 * random.random())
