"""Where ranks go (A3, X2): idle workers first, all ranks or none, and a reason when there is no place."""

from __future__ import annotations

from forge_broker.core.placement import Idle, Need, Pending, Seat, place

HERE = "here"


def idle(name: str, host: str = HERE, *gpus: str) -> Idle:
    return Idle(name, host, gpus)


def test_idle_workers_come_before_launches() -> None:
    """X2: on this host, and on another one when it has as many seats."""
    assert place(Need(1, None, 0), [idle("w")], HERE, [], 5) == [Seat(HERE, (), "w")]
    assert place(Need(1, None, 0), [idle("w", "there")], HERE, [], 5) == [Seat("there", (), "w")]
    assert place(Need(2, None, 0), [idle("w")], HERE, [], 5) == [Seat(HERE, (), "w"), Seat(HERE, (), None)]


def test_launches_take_each_gpu_once() -> None:
    """A3."""
    seats = place(Need(2, None, 2), [], HERE, ["0", "1", "2", "3", "4"], 9)
    assert seats == [Seat(HERE, ("0", "1"), None), Seat(HERE, ("2", "3"), None)]


def test_a_worker_fits_only_with_exactly_the_gpus_of_a_rank() -> None:
    """A3: fewer are too few, more would be wasted, and seen by the rank."""
    found = place(Need(1, None, 1), [idle("a", HERE), idle("b", HERE, "0", "1"), idle("c", HERE, "2")], HERE, [], 0)
    assert found == [Seat(HERE, ("2",), "c")]


def test_hosts_means_so_many_ranks_on_each_of_them() -> None:
    """A3: rank order is host by host."""
    workers = [idle("a", "x"), idle("b", "y"), idle("c", "x"), idle("d", "y"), idle("e", "z")]
    seats = place(Need(2, 2, 0), workers, HERE, [], 0)
    assert isinstance(seats, list)
    assert [seat.host for seat in seats] == ["x", "x", "y", "y"]
    pending = place(Need(2, 3, 0), workers, HERE, [], 0)
    assert isinstance(pending, Pending)
    assert "2 ranks on each of 3 hosts; 2 have room" in pending.why


def test_no_place_has_a_reason_with_its_numbers() -> None:
    """A3."""
    pending = place(Need(4, None, 1), [idle("a", "x", "0")], HERE, ["5"], 2)
    assert isinstance(pending, Pending)
    for part in ("needs 4 workers with 1 GPU each", "1 GPUs", "2 processes", "max_workers", "forge worker"):
        assert part in pending.why
