"""A scaling policy that says what a test wants it to, in the contract's tests and the core's."""

from __future__ import annotations

from typing import Any

from forge_contract.scaling import ScalingPolicy


class Says(ScalingPolicy):
    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def decide(self, *_: Any) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer
