"""One end of a reliable link over a transport that loses (PROTOCOL.md §4): numbers, acknowledgements, what is kept
to be sent again. The broker has one per peer, a client and a worker one each.

A channel decides nothing about hellos or routes: those are its owner's. It is told the time and says when it wants to
be asked again; it never sends, it returns frames.
"""

from __future__ import annotations

import enum
from collections import deque
from typing import Final

from forge_contract.framing import Frame

ACK_AFTER_S: Final = 0.1  # a debt of this age is paid by an empty envelope; shorter ones ride on what is sent anyway
PROBE_AFTER_S: Final = 1.0  # many round trips on any network we serve, few enough for a caller to bear
PROBE_AT_MOST_S: Final = 5.0


class Verdict(enum.Enum):
    """What to do with an envelope that came in."""

    DELIVER = "deliver"
    DUPLICATE = "duplicate"
    GAP = "gap"


class Due(enum.Enum):
    """What the owner should send now."""

    ACK = "ack"
    PROBE = "probe"


class Channel:
    """Numbers from 1 in both directions; what is sent is kept until acknowledged."""

    __slots__ = ("_ack_due", "_interval_s", "_kept", "_probe_due", "epoch", "kept_bytes", "probing", "received", "sent")

    def __init__(self, epoch: int = 1) -> None:
        self.epoch = epoch
        self.sent = 0
        self.received = 0
        self.kept_bytes = 0
        self.probing = False
        self._kept: deque[tuple[int, list[Frame], int]] = deque()
        self._ack_due: float | None = None
        self._probe_due: float | None = None
        self._interval_s = PROBE_AFTER_S

    def __repr__(self) -> str:
        return (
            f"<Channel epoch {self.epoch} sent {self.sent} received {self.received} "
            f"kept {len(self._kept)} ({self.kept_bytes} B)>"
        )

    @property
    def acked(self) -> int:
        """The highest number that the other side is known to have, with all before it."""
        return self._kept[0][0] - 1 if self._kept else self.sent

    def next_number(self) -> int:
        """The number of the envelope about to be sealed. It carries our ack, so nothing is owed after it."""
        self.sent += 1
        self._ack_due = None
        return self.sent

    def keep(self, frames: list[Frame], size: int, now: float) -> None:
        """Remember the envelope just numbered, until it is acknowledged."""
        self._kept.append((self.sent, frames, size))
        self.kept_bytes += size
        if self._probe_due is None:
            self._probe_due = now + self._interval_s

    def acknowledged(self, ack: int, now: float) -> None:
        """The other side has everything up to `ack`."""
        kept = self._kept
        if not kept or kept[0][0] > ack:
            return
        while kept and kept[0][0] <= ack:
            self.kept_bytes -= kept.popleft()[2]
        self.probing = False
        self._interval_s = PROBE_AFTER_S
        self._probe_due = now + PROBE_AFTER_S if kept else None

    def accept(self, number: int, now: float) -> Verdict:
        """Judge a numbered envelope. Only DELIVER may be looked into; the others owe an ack at once."""
        if number == self.received + 1:
            self.received = number
            if self._ack_due is None:
                self._ack_due = now + ACK_AFTER_S
            return Verdict.DELIVER
        self._ack_due = now
        return Verdict.DUPLICATE if number <= self.received else Verdict.GAP

    def owe_ack(self, now: float) -> None:
        """Somebody asked (a probe): answer at the next look."""
        self._ack_due = now

    def due(self, now: float) -> Due | None:
        """What to send now, if anything. A probe carries our ack as well, so it pays both debts."""
        if self._probe_due is not None and self._probe_due <= now:
            self._interval_s = min(2 * self._interval_s, PROBE_AT_MOST_S)
            self._probe_due = now + self._interval_s
            self._ack_due = None
            self.probing = True
            return Due.PROBE
        if self._ack_due is not None and self._ack_due <= now:
            self._ack_due = None
            return Due.ACK
        return None

    def next_deadline(self) -> float | None:
        if self._ack_due is None:
            return self._probe_due
        return self._ack_due if self._probe_due is None else min(self._ack_due, self._probe_due)

    def kept_after(self, ack: int) -> list[list[Frame]]:
        """What must be sent again to one that has everything up to `ack`, in order."""
        return [frames for number, frames, _ in self._kept if number > ack]
