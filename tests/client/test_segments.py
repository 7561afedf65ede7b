"""The pool and its readers: what is leased is not written to, what is not is used again (PROTOCOL.md §9.1)."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from forge_client import segments
from forge_client.segments import MAPPED_AT_MOST, SEGMENTS_AT_MOST, UNUSED_S, Pool, open_segments
from forge_contract.errors import SegmentLost
from forge_contract.segments import Handle, Terms, read_handle

PREFIX = "forge-0123456789abcdef"
OWNER = "c-0123456789abcdef"
MIB = 1 << 20


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pool(tmp_path: Path, clock: Clock) -> Iterator[Pool]:
    pool = Pool(Terms(PREFIX, 1000, 8 * MIB), OWNER, directory=str(tmp_path), clock=clock)
    yield pool
    pool.close()


def files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob(f"{PREFIX}-*"))


def read(payload: Any, directory: Path) -> list[Any]:
    return open_segments([read_handle(bytes(part)) for part in payload[1:]], str(directory))


def shared(pool: Pool, *parts: bytes) -> list[Any]:
    payload = pool.share([b"document", *parts])
    assert isinstance(payload, list)
    return payload


def test_buffers_go_into_one_segment_and_come_out_as_they_were(pool: Pool, tmp_path: Path) -> None:
    payload = shared(pool, b"a" * 5000, b"b" * 7001)
    assert payload[0] == b"document"
    assert [type(part) for part in payload[1:]] == [Handle, Handle]
    assert [bytes(view) for view in read(payload, tmp_path)] == [b"a" * 5000, b"b" * 7001]
    assert files(tmp_path) == [f"{PREFIX}-{OWNER}-1"]


def test_files_are_their_owners_alone_and_allocated_for_real(pool: Pool, tmp_path: Path) -> None:
    payload = shared(pool, bytes(MIB))
    status = (tmp_path / read_handle(payload[1]).name).stat()
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert status.st_blocks * 512 >= MIB


def test_small_buffers_stay_frames(pool: Pool, tmp_path: Path) -> None:
    for payload in (b"plain", [b"document only"], [b"document", b"x" * 999]):
        assert pool.share(payload) is payload
    assert files(tmp_path) == []


def test_a_segment_is_used_again_when_its_handles_are_collected(pool: Pool, tmp_path: Path) -> None:
    for value in (b"1", b"2", b"3"):
        payload = shared(pool, value * MIB)
        assert bytes(read(payload, tmp_path)[0][:1]) == value
        del payload
    assert len(files(tmp_path)) == 1


def test_a_segment_whose_handle_lives_is_not_used_again(pool: Pool, tmp_path: Path) -> None:
    """It may have to be sent again: to another attempt, or a broker's successor."""
    first = shared(pool, b"1" * MIB)
    shared(pool, b"2" * MIB)
    assert bytes(read(first, tmp_path)[0][:1]) == b"1"
    assert len(files(tmp_path)) == 2


def test_a_segment_that_is_looked_at_is_not_used_again(pool: Pool, tmp_path: Path) -> None:
    """A view survives later calls, whatever became of the call it came with."""
    payload = shared(pool, b"1" * MIB)
    (view,) = read(payload, tmp_path)
    part = view[7:9]
    del payload, view
    shared(pool, b"2" * MIB)
    assert bytes(part) == b"11"
    assert len(files(tmp_path)) == 2
    del part
    shared(pool, b"3" * MIB)
    shared(pool, b"4" * MIB)
    assert len(files(tmp_path)) == 2


def test_what_a_reader_writes_is_its_own(pool: Pool, tmp_path: Path) -> None:
    """A retry sees unspoilt input; and what the next payload in this segment is, the reader's old pages do not hide."""
    payload = shared(pool, b"1" * MIB)
    (view,) = read(payload, tmp_path)
    view[:] = b"x" * MIB
    (again,) = read(payload, tmp_path)
    assert bytes(again) == b"1" * MIB
    del view, again, payload
    payload = shared(pool, b"2" * MIB)
    assert len(files(tmp_path)) == 1
    assert bytes(read(payload, tmp_path)[0]) == b"2" * MIB


def test_a_mapping_that_nobody_wrote_to_serves_again(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    payload = shared(pool, b"1" * MIB)
    assert bytes(read(payload, tmp_path)[0][:1]) == b"1"
    del payload

    def no(path: str) -> Any:
        raise AssertionError(f"{path} was mapped anew")

    monkeypatch.setattr(segments, "_map", no)
    payload = shared(pool, b"2" * MIB)
    assert bytes(read(payload, tmp_path)[0]) == b"2" * MIB


def test_a_lessee_that_was_killed_looks_no_more(pool: Pool, tmp_path: Path) -> None:
    payload = shared(pool, b"1" * MIB)
    program = (
        "import sys, os; from forge_client.segments import open_segments; from forge_contract.segments import Place\n"
        "view = open_segments([Place(sys.argv[2], 1, 64, 9)], sys.argv[1]); print('looks', flush=True); sys.stdin.read()"
    )
    name = read_handle(payload[1]).name
    reader = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path), name], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert reader.stdin is not None
    assert reader.stdout is not None
    with reader.stdin, reader.stdout:
        assert reader.stdout.readline() == b"looks\n"
        del payload
        other = shared(pool, b"2" * MIB)
        assert len(files(tmp_path)) == 2
        reader.send_signal(signal.SIGKILL)
        reader.wait(10)
    shared(pool, b"3" * MIB)
    assert len(files(tmp_path)) == 2
    del other


def test_a_full_place_falls_back_to_frames_and_is_not_asked_again_at_once(
    pool: Pool, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def full(*_: int) -> None:
        asked.append(1)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    payload: list[Any] = [b"document", bytes(MIB)]
    assert pool.share(payload) is payload
    assert pool.share(payload) is payload
    assert (len(asked), pool.refused, pool.bytes, files(tmp_path)) == (1, 2, 0, [])
    clock.now += 10
    monkeypatch.undo()
    assert pool.share(payload) is not payload


def test_half_of_what_is_free_is_left_to_others(pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "_free_bytes", lambda _: 3 * MIB)
    payload: list[Any] = [b"document", bytes(2 * MIB)]
    assert pool.share(payload) is payload
    assert (pool.refused, pool.bytes, files(tmp_path)) == (1, 0, [])


def test_the_limit_holds_and_what_is_unused_makes_room(pool: Pool, tmp_path: Path) -> None:
    held = [shared(pool, bytes(MIB)) for _ in range(7)]
    assert pool.bytes <= 8 * MIB
    payload: list[Any] = [b"document", bytes(MIB)]
    assert pool.share(payload) is payload
    assert pool.refused == 1
    held.clear()
    assert len(shared(pool, bytes(3 * MIB))) == 2  # none of that size is there; some of those unused are dropped
    assert pool.bytes <= 8 * MIB


def test_one_process_has_so_many_segments_at_most(pool: Pool, tmp_path: Path) -> None:
    held = [pool.share([b"document", bytes(2000)]) for _ in range(SEGMENTS_AT_MOST + 1)]
    assert len(files(tmp_path)) == SEGMENTS_AT_MOST
    assert pool.refused == 1
    del held


def test_who_keeps_very_many_gets_memory_of_its_own(pool: Pool, tmp_path: Path) -> None:
    """A view costs a descriptor, and a process has not many."""
    payload = shared(pool, b"1" * MIB)
    views = [read(payload, tmp_path)[0] for _ in range(MAPPED_AT_MOST)]
    (one_more,) = read(payload, tmp_path)
    views.clear()
    del payload
    shared(pool, b"2" * MIB)
    assert bytes(one_more) == b"1" * MIB
    assert len(files(tmp_path)) == 1


def test_what_is_long_unused_is_given_back(pool: Pool, tmp_path: Path, clock: Clock) -> None:
    shared(pool, bytes(MIB))
    shared(pool, bytes(2 * MIB))
    assert len(files(tmp_path)) == 2
    clock.now += UNUSED_S + 1
    shared(pool, bytes(3 * MIB))  # only now it is known to be unused
    clock.now += UNUSED_S + 1
    shared(pool, bytes(4 * MIB))
    assert len(files(tmp_path)) == 2


def test_a_segment_that_vanished_is_lost_for_that_payload_only(pool: Pool, tmp_path: Path) -> None:
    payload = shared(pool, b"1" * MIB)
    name = read_handle(payload[1]).name
    (tmp_path / name).unlink()
    with pytest.raises(SegmentLost, match=name):
        read(payload, tmp_path)
    del payload
    payload = shared(pool, b"2" * MIB)  # the one that was removed is not used again
    assert read_handle(payload[1]).name != name
    assert bytes(read(payload, tmp_path)[0][:1]) == b"2"


def test_an_old_handle_does_not_read_what_came_later(pool: Pool, tmp_path: Path) -> None:
    payload = shared(pool, b"1" * MIB)
    old = [b"document", bytes(payload[1])]
    del payload
    shared(pool, b"2" * MIB)
    with pytest.raises(SegmentLost, match="used it again"):
        read(old, tmp_path)


def test_a_file_that_is_none_of_ours_is_not_followed(pool: Pool, tmp_path: Path) -> None:
    payload = shared(pool, b"1" * MIB)
    path = tmp_path / read_handle(payload[1]).name
    path.unlink()
    path.symlink_to("/etc/hostname")
    with pytest.raises(SegmentLost):
        read(payload, tmp_path)
    path.unlink()
    path.write_bytes(b"")
    with pytest.raises(SegmentLost):
        read(payload, tmp_path)
    path.write_bytes((1).to_bytes(8, "little") + bytes(80))
    with pytest.raises(SegmentLost, match="shorter"):
        read(payload, tmp_path)


def test_closing_removes_all_files_and_leaves_views_alone(pool: Pool, tmp_path: Path) -> None:
    payload = shared(pool, b"1" * MIB)
    (view,) = read(payload, tmp_path)
    pool.close()
    assert files(tmp_path) == []
    assert bytes(view[:1]) == b"1"
    after: list[Any] = [b"document", bytes(MIB)]
    assert pool.share(after) is after


def test_after_the_goodbye_nothing_is_shared_and_what_was_stays(pool: Pool, tmp_path: Path) -> None:
    """A thread may end later than its worker took leave; who would remove what it makes?"""
    payload = shared(pool, b"1" * MIB)
    pool.freeze()
    after: list[Any] = [b"document", bytes(MIB)]
    assert pool.share(after) is after
    assert bytes(read(payload, tmp_path)[0]) == b"1" * MIB
    assert len(files(tmp_path)) == 1


def test_a_file_that_the_broker_removes_at_the_same_moment_is_no_error_at_closing(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leases = [shared(pool, b"1" * MIB), shared(pool, b"2" * MIB)]
    unlink = os.unlink

    def late(path: str) -> None:  # the broker's sweep comes between whatever was asked before and this
        unlink(path)
        unlink(path)

    monkeypatch.setattr(os, "unlink", late)
    pool.close()
    assert files(tmp_path) == []
    del leases


def test_a_forked_child_leaves_its_parents_segments_alone(pool: Pool, tmp_path: Path) -> None:
    payload = shared(pool, b"1" * MIB)
    (view,) = read(payload, tmp_path)
    child = os.fork()
    if not child:  # pragma: no cover - the child's lines are not seen
        plain: list[Any] = [b"document", bytes(MIB)]
        unharmed = pool.share(plain) is plain
        pool.close()
        os._exit(0 if unharmed and bytes(view[:1]) == b"1" else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert len(files(tmp_path)) == 1
    assert bytes(read(payload, tmp_path)[0][:1]) == b"1"


def test_nobody_elses_resource_tracker_hears_of_segments(pool: Pool, tmp_path: Path) -> None:
    """Python's unlinks at its process's end what others still use."""
    program = (
        "import sys; from forge_client.segments import Pool; from forge_contract.segments import Terms\n"
        f"pool = Pool(Terms({PREFIX!r}, 1, 1 << 20), 'w-0123456789abcdef', directory=sys.argv[1])\n"
        "payload = pool.share([b'document', b'x' * 5000]); assert 'multiprocessing' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, timeout=30)
    assert files(tmp_path) == [f"{PREFIX}-w-0123456789abcdef-1"]
