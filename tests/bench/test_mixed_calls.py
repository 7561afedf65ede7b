"""`bench/mixed_calls.py`: every load is measured both ways, and nothing it starts is left."""

from __future__ import annotations

import pytest

from bench import mixed_calls


async def test_each_load_is_measured_with_calls_sent_ahead_and_without(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORGE_GPUS", "none")
    monkeypatch.setattr(mixed_calls, "LOADS", ((1, 1),))
    monkeypatch.setattr(mixed_calls, "CALLERS", 4)
    monkeypatch.setattr(mixed_calls, "WAIT_S", 0.01)
    monkeypatch.setattr(mixed_calls, "PAUSE_S", 0.01)
    await mixed_calls.measure(1, 0.1)
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split()[:2] == ["waiting", "holding"]
    assert [row[:27].split() for row in rows] == [["1", "1", "not", "ahead"], ["1", "1", "ahead"]]
    for row in rows:
        rate, median, late, longest = (float(cell.replace(",", "")) for cell in row.split()[-4:])
        assert rate > 0
        assert 0 < median <= late <= longest
