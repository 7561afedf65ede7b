"""Numbers, acknowledgements and what is kept, under a virtual clock (W4)."""

from __future__ import annotations

import itertools
import random

from forge_contract.channel import ACK_AFTER_S, PROBE_AFTER_S, PROBE_AT_MOST_S, Channel, Due, Verdict


def send(channel: Channel, now: float = 0.0, size: int = 1) -> int:
    number = channel.next_number()
    channel.keep([number], size, now)
    return number


def test_only_the_next_number_is_delivered() -> None:
    """W4: go back n."""
    channel = Channel()
    assert [channel.accept(number, 0.0) for number in (1, 3, 1, 2)] == [
        Verdict.DELIVER,
        Verdict.GAP,
        Verdict.DUPLICATE,
        Verdict.DELIVER,
    ]
    assert channel.received == 2


def test_a_debt_rides_on_what_is_sent_and_is_paid_by_itself_when_nothing_is() -> None:
    """PROTOCOL.md §4.2."""
    channel = Channel()
    channel.accept(1, 5.0)
    assert channel.next_deadline() == 5.0 + ACK_AFTER_S
    assert channel.due(5.05) is None
    assert channel.due(5.1) is Due.ACK
    assert channel.next_deadline() is None
    channel.accept(2, 6.0)
    send(channel, 6.0)
    assert channel.due(6.2) is None


def test_a_duplicate_and_a_gap_owe_an_ack_at_once() -> None:
    """PROTOCOL.md §4.1."""
    channel = Channel()
    channel.accept(5, 1.0)
    assert channel.due(1.0) is Due.ACK
    channel.accept(0, 2.0)
    assert channel.due(2.0) is Due.ACK


def test_what_is_acknowledged_is_forgotten_and_the_rest_is_kept_in_order() -> None:
    """W4: bounded in bytes by who looks at `kept_bytes`."""
    channel = Channel()
    for _ in range(5):
        send(channel, size=10)
    channel.acknowledged(2, 0.5)
    assert channel.kept_bytes == 30
    assert channel.kept_after(3) == [[4], [5]]
    channel.acknowledged(1, 0.5)
    channel.acknowledged(99, 0.5)
    assert channel.kept_bytes == 0
    assert channel.next_deadline() is None


def test_probes_come_ever_more_slowly_until_something_is_acknowledged() -> None:
    """PROTOCOL.md §4.3."""
    channel = Channel()
    send(channel)
    send(channel)
    times = []
    for _ in range(6):
        due = channel.next_deadline()
        assert due is not None
        assert channel.due(due) is Due.PROBE
        times.append(due)
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert times[0] == PROBE_AFTER_S
    assert gaps == [2.0, 4.0, 5.0, 5.0, 5.0]
    assert max(gaps) == PROBE_AT_MOST_S
    assert channel.probing
    channel.acknowledged(1, 50.0)
    assert channel.next_deadline() == 50.0 + PROBE_AFTER_S


def test_everything_arrives_once_and_in_order_over_a_line_that_loses_and_repeats() -> None:
    """W4."""
    for seed in range(20):
        chance, now = random.Random(seed), 0.0
        ours, theirs = Channel(), Channel()
        delivered: list[int] = []
        for _ in range(400):
            now += 0.3
            line = [[send(ours, now)]] if ours.sent < 30 else []
            due = ours.due(now)
            if due is Due.PROBE and chance.random() < 0.7:
                line += ours.kept_after(theirs.received)
                ours.acknowledged(theirs.received, now)
            for (number,) in line:
                for _ in range(chance.choice([0, 1, 1, 2])):
                    if theirs.accept(number, now) is Verdict.DELIVER:
                        delivered.append(number)
        assert delivered == list(range(1, 31)), seed
