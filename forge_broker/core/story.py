"""What happened out of the ordinary, and why: a bounded ring, searched by `forge explain` (C5).

The ordinary path writes nothing here: a living call's own timestamps tell its story, and of an ordinary call that is over
nothing is known any more.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple


class Entry(NamedTuple):
    when: float  # seconds on the broker's clock
    subject: str  # "1a2b3c-17", "gen/1", a session id, a worker's name
    text: str


class Story:
    def __init__(self, entries: int) -> None:
        self._entries: deque[Entry] = deque(maxlen=entries)

    def tell(self, now: float, subject: str, text: str) -> None:
        self._entries.append(Entry(now, subject, text))

    def of(self, subject: str) -> list[Entry]:
        return [entry for entry in self._entries if entry.subject == subject]

    def __len__(self) -> int:
        return len(self._entries)
