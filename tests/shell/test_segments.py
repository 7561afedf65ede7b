"""What the broker does in /dev/shm: it clears up after the dead, and reads for those who cannot (PROTOCOL.md §9.1)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from forge_broker.shell.segments import Segments
from forge_client.segments import Pool
from forge_contract.segments import VANISHED, Terms

CLIENT = "c-0123456789abcdef"
WORKER = "w-0123456789abcdef"
ADDRESS = "ipc:///run/here/broker.sock"


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def pool(segments: Segments, owner: str, directory: Path) -> Pool:
    return Pool(Terms(segments.prefix, 1, 1 << 24), owner, directory=str(directory))


def test_a_peers_files_are_removed_and_nobody_elses(tmp_path: Path) -> None:
    segments = Segments(ADDRESS, str(tmp_path))
    held = [pool(segments, owner, tmp_path).share([b"", bytes(5000)]) for owner in (CLIENT, WORKER)]
    segments.unlink(CLIENT)
    assert names(tmp_path) == [segments.prefix, f"{segments.prefix}-{WORKER}-1"]
    segments.sweep({WORKER})
    assert names(tmp_path) == [segments.prefix, f"{segments.prefix}-{WORKER}-1"]
    segments.close()
    assert names(tmp_path) == []
    del held


def test_a_successor_at_the_same_address_knows_the_files(tmp_path: Path) -> None:
    first = Segments(ADDRESS, str(tmp_path))
    again = Segments(ADDRESS, str(tmp_path))
    other = Segments("ipc:///run/there/broker.sock", str(tmp_path))
    assert first.prefix == again.prefix != other.prefix
    for one in (first, again, other):
        one.close()


def test_a_handle_is_read_for_who_cannot_follow_it(tmp_path: Path) -> None:
    segments = Segments(ADDRESS, str(tmp_path))
    owner = pool(segments, WORKER, tmp_path)
    payload = owner.share([b"document", b"a" * 5000, b"b" * 100])
    assert [bytes(segments.read(part)) for part in payload[1:]] == [b"a" * 5000, b"b" * 100]
    old = bytes(payload[1])
    del payload
    owner.share([b"document", b"c" * 5100])
    assert segments.read(old) is VANISHED  # of an earlier generation
    owner.close()
    assert segments.read(old) is VANISHED
    assert segments.read(b"\xc1forge nonsense") is VANISHED
    segments.close()


LEAVE_SOMETHING = """
import sys
from forge_broker.shell.segments import Segments
from forge_client.segments import Pool
from forge_contract.segments import Terms
segments = Segments("ipc:///run/dead/broker.sock", sys.argv[1])
pool = Pool(Terms(segments.prefix, 1, 1 << 24), "c-00000000000000aa", directory=sys.argv[1])
held = pool.share([b"", bytes(5000)])
print("there", flush=True)
sys.stdin.read()
"""


def test_what_a_circle_left_that_was_killed_together_is_cleared_by_the_next_broker(tmp_path: Path) -> None:
    """As long as anybody of it lives, it is not: results may be unread, and its broker may come back."""
    circle = subprocess.Popen(
        [sys.executable, "-c", LEAVE_SOMETHING, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert circle.stdin is not None
    assert circle.stdout is not None
    with circle.stdin, circle.stdout:
        assert circle.stdout.readline() == b"there\n"
        left = names(tmp_path)
        assert len(left) == 2
        Segments(ADDRESS, str(tmp_path)).close()
        assert names(tmp_path) == left
        circle.kill()
        circle.wait(10)
    assert names(tmp_path) == left
    Segments(ADDRESS, str(tmp_path)).close()
    assert names(tmp_path) == []


def test_what_came_after_its_broker_had_cleared_away_is_cleared_by_the_next(tmp_path: Path) -> None:
    late = tmp_path / "forge-00000000000000aa-c-00000000000000aa-1"
    not_ours = tmp_path / "forge-notes-c-1"
    late.touch()
    not_ours.touch()
    Segments(ADDRESS, str(tmp_path)).close()
    assert names(tmp_path) == [not_ours.name]


def test_where_there_is_no_shared_memory_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="missing"):
        Segments(ADDRESS, str(tmp_path / "missing"))
