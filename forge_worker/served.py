"""The sessions a worker has served and was not told to forget, and when: what a broker without memory asks for (PROTOCOL.md §5, `holds`).
No I/O.

Nobody asks but such a broker, so uses are laid by as they come, a list for each dispatch, and entered some thousands at a time. To look
a session up among many between two bursts of calls is to wait for memory, 0.19 µs; in a row it is 0.06 µs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

LAID_BY: Final = 8192  # uses, at most: entering them takes half a millisecond


class Served:
    """Of two workers that hold a session one is a zombie that was taken for dead, and the later one is right: hence the times."""

    def __init__(self) -> None:
        self._used: dict[str, float] = {}
        self._laid_by: list[tuple[list[str | None], float]] = []
        self._uses = 0

    def __repr__(self) -> str:
        return f"<Served {len(self._used)} sessions, {self._uses} uses to enter>"

    def used(self, sessions: list[str | None], now: float) -> None:
        """By calls or an import; None is a call of no session."""
        self._laid_by.append((sessions, now))
        self._uses += len(sessions)
        if self._uses > LAID_BY:
            self._enter()

    def _enter(self) -> None:
        for sessions, when in self._laid_by:
            self._used.update(dict.fromkeys(filter(None, sessions), when))
        self._laid_by = []
        self._uses = 0

    def forget(self, sessions: Iterable[str]) -> None:
        self._enter()
        for one in sessions:
            self._used.pop(one, None)

    def ages(self, now: float) -> list[list[Any]]:
        """`[id, seconds since its last use]` of each."""
        self._enter()
        return [[one, max(0.0, now - when)] for one, when in sorted(self._used.items())]
