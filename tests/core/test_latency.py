"""Histograms of how long calls waited and ran, under a plain clock (X3)."""

from __future__ import annotations

import sys
from math import ceil

from hypothesis import given
from hypothesis import strategies as st

from forge_broker.core.latency import BOUNDS, SLOT_S, SLOTS, TOLD, Histogram, Latency, add, merged

STEP = 10**0.1 * 1.02  # a bucket's width, which is a tenth of a decade; its bounds are rounded

times = st.floats(0.0002, 900.0) | st.just(0.0)


def ended(latency: Latency, now: float, *calls: tuple[float, float], count: int = 1) -> None:
    for waited_s, ran_s in calls:
        add(latency, Latency(), count, waited_s, ran_s, now)


def run_of(*seconds: float) -> Histogram:
    latency = Latency()
    ended(latency, 0.0, *((0.0, one) for one in seconds))
    return latency.total()[1]


@given(st.lists(times, min_size=1, max_size=60), st.sampled_from([0.01, 0.5, 0.9, 0.99, 1.0]))
def test_a_quantile_is_within_a_bucket_of_the_exact_one(seconds: list[float], share: float) -> None:
    """X3: against the sorted times, the smallest that this share does not exceed."""
    exact = sorted(seconds)[ceil(share * len(seconds)) - 1]
    found = run_of(*seconds).quantile(share)
    assert exact / STEP <= found <= exact * STEP


def test_what_did_not_wait_at_all_waited_nothing_and_the_longest_is_the_last_bound() -> None:
    """X3: nearly all calls of a service that keeps up wait 0.0 s, and their median must not be half a bucket."""
    assert run_of().snapshot() == {"count": 0, "mean": 0.0, "p50": 0.0, "p90": 0.0, "p99": 0.0}
    assert run_of(0.0, 0.0, 5.0).quantile(0.5) == 0.0
    assert run_of(7200.0).quantile(0.5) == 1000.0
    assert run_of(7200.0).mean_s == 7200.0


def test_the_bounds_that_a_scrape_is_told_are_three_to_a_decade() -> None:
    assert [BOUNDS[at] for at in TOLD][:6] == [0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005]
    assert BOUNDS[TOLD[-1]] == BOUNDS[-1] == 1000.0
    assert list(BOUNDS) == sorted(set(BOUNDS))


def test_many_calls_that_share_their_times_are_one_addition() -> None:
    """X3, C2."""
    endpoint, replica, one_by_one = Latency(), Latency(), Latency()
    add(endpoint, replica, 100, 0.02, 0.3, 50.0)
    for _ in range(100):
        ended(one_by_one, 50.0, (0.02, 0.3))
    assert endpoint.total()[0].counts == replica.total()[0].counts == one_by_one.total()[0].counts
    assert endpoint.total()[1].counts == replica.total()[1].counts == one_by_one.total()[1].counts
    assert abs(endpoint.total()[1].sum_s - 30.0) < 1e-9


def test_the_window_is_the_last_minute_and_the_total_is_all() -> None:
    """X3: in slots of ten seconds, the running one and five before it."""
    latency = Latency()
    for second in range(0, 120, 10):
        ended(latency, float(second), (0.0, 1.0))
    wait, run = latency.recent(119.0)
    assert (wait.calls, run.calls) == (6, 6)
    assert latency.recent(125.0)[1].calls == 5
    assert latency.total()[1].calls == 12


@given(st.lists(st.tuples(st.floats(0.0, 40.0), st.integers(1, 5)), min_size=1, max_size=30), st.floats(0.0, 90.0))
def test_the_window_holds_what_its_slots_hold(additions: list[tuple[float, int]], later: float) -> None:
    """X3: also where nothing came for a while, against a plain list."""
    latency = Latency()
    now = 1000.0
    told: list[tuple[int, int]] = []
    for pause, count in additions:
        now += pause
        ended(latency, now, (0.0, 0.5), count=count)
        told.append((int(now / SLOT_S), count))
    now += later
    first = int(now / SLOT_S) - SLOTS + 1
    assert latency.recent(now)[1].calls == sum(count for slot, count in told if slot >= first)


def test_memory_is_constant_after_a_million_additions() -> None:
    """X3: whatever came, however fast, and for however long."""
    latency, other = Latency(), Latency()

    def some(count: int, start: float) -> None:
        for n in range(count):
            add(latency, other, 1, 0.0001 * (n % 977), 0.001 * (n % 1009), start + n * 0.01)

    some(20_000, 0.0)  # two hundred seconds: every slot of the window has been used
    before = sys.getallocatedblocks()
    some(1_000_000, 1000.0)
    # Counts past 256 are objects of their own, one for each bucket, and that is all.
    assert sys.getallocatedblocks() - before < 8 * len(BOUNDS)
    assert latency.total()[1].calls == 1_020_000


def test_histograms_of_several_endpoints_add_up() -> None:
    """X4: those of a service."""
    both = merged([run_of(0.1, 0.2), run_of(3.0), run_of()])
    assert both.calls == 3
    assert abs(both.sum_s - 3.3) < 1e-9
    assert tuple(both.counts) == run_of(0.1, 0.2, 3.0).counts
    assert merged([]).calls == 0
