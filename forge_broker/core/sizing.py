"""What is remembered of deciding how many replicas a service has: the policy's state, and the last decisions, for `forge why-scale`.

How many it has is `Service.wanted`; `scaling` decides and writes here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, Final

from forge_contract.scaling import Decision, PolicyState, ScalingPolicy

DECISIONS_KEPT: Final = 100


class Decided:
    """A decision, or a run of equal ones not to do anything, of which the latest is shown."""

    __slots__ = ("count", "decision", "first", "last", "wanted")

    def __init__(self, decision: Decision, wanted: int, now: float) -> None:
        self.decision = decision
        self.wanted = wanted  # replicas, after it
        self.count = 1
        self.first = self.last = now

    def shown(self, now: float) -> dict[str, Any]:
        return {
            "rule": self.decision.rule,
            "delta": self.decision.delta,
            "wanted": self.wanted,
            "reason": self.decision.reason,
            "figures": dict(self.decision.figures),
            "count": self.count,
            "first_s": round(now - self.first, 3),  # seconds ago
            "last_s": round(now - self.last, 3),
        }


class Sizing:
    """`policy`: None for a service that only scales by hand."""

    __slots__ = ("_ended", "_looked_at", "decided", "policy", "state")

    def __init__(self, policy: ScalingPolicy | None, now: float) -> None:
        self.policy = policy
        self.state = PolicyState(seen_at=now)  # with nothing to do: a first sample is no more than a sample
        self.decided: deque[Decided] = deque(maxlen=DECISIONS_KEPT)
        self._ended: Mapping[int, int] = {}  # calls, by replica, when it was last looked
        self._looked_at = now

    def remember(self, decision: Decision, wanted: int, now: float) -> None:
        """Hours of doing nothing for the same reason are one entry: what was done before them is still there to be read."""
        latest = self.decided[-1] if self.decided else None
        same = latest is not None and not decision.delta and not latest.decision.delta
        if latest is None or not same or latest.decision.rule != decision.rule:
            self.decided.append(Decided(decision, wanted, now))
            return
        latest.decision = decision
        latest.count += 1
        latest.last = now

    def rate(self, ended: Mapping[int, int], now: float) -> float:
        """Calls/s since the last look, of which `ended` counts those that have ended so far by replica."""
        passed_s = now - self._looked_at
        count = sum(max(0, total - self._ended.get(key, 0)) for key, total in ended.items())
        if passed_s <= 0:
            return 0.0
        self._ended, self._looked_at = ended, now
        return count / passed_s
