"""Seeded storms (storm.py): whatever breaks, every call has exactly one reply. `make storm` runs as many as you like."""

from __future__ import annotations

import pytest

from tests.face_to_face.storm import CALLS, FAULT_EVERY, Storm


@pytest.mark.parametrize("seed", range(200))
def test_whatever_breaks_every_call_gets_exactly_one_reply(seed: int) -> None:
    """F1 to F5, F9, F10, S3, A5, W4: a storm that fails says its seed, and replays to the same event."""
    storm = Storm(seed).run()
    assert len(storm.calls) >= CALLS  # some are made several at a time


def test_a_storm_replays_to_the_same_event() -> None:
    """The seed is all there is: what ran where, and every fault."""
    first, second = Storm(7).run(), Storm(7).run()
    assert first.world.history == second.world.history
    assert first.world.faults == second.world.faults
    assert sum(first.world.faults.values()) >= CALLS // FAULT_EVERY // 2
