"""Calls that nobody will try again, because they kept killing their replicas (F4), with their arguments and story: for people to look at,
mend and call again. Bounded in number and in bytes; the oldest goes first.
"""

from __future__ import annotations

from typing import NamedTuple

from forge_contract.framing import Payload


class DeadLetter(NamedTuple):
    id: str  # of the request, as people see it
    service: str
    endpoint: str
    attempts: int
    died_at: float  # seconds on the broker's clock
    why: str  # the last death
    payload: Payload  # the arguments
    trusted: bool  # their stamp
    size: int  # bytes
    story: list[str]


class DeadLetters:
    def __init__(self, at_most: int, at_most_bytes: int) -> None:
        self._at_most = at_most
        self._at_most_bytes = at_most_bytes
        self._letters: dict[str, DeadLetter] = {}
        self._bytes = 0
        self.forgotten = 0  # for want of room

    def __len__(self) -> int:
        return len(self._letters)

    def add(self, letter: DeadLetter) -> None:
        self.drop(letter.id)
        self._letters[letter.id] = letter
        self._bytes += letter.size
        while self._letters and (len(self._letters) > self._at_most or self._bytes > self._at_most_bytes):
            self.drop(next(iter(self._letters)))
            self.forgotten += 1

    def get(self, id: str) -> DeadLetter | None:
        return self._letters.get(id)

    def newest_first(self) -> list[DeadLetter]:
        return list(reversed(self._letters.values()))

    def drop(self, id: str) -> bool:
        letter = self._letters.pop(id, None)
        if letter is None:
            return False
        self._bytes -= letter.size
        return True
