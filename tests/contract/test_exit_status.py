"""How a process ended, in words that people can look up."""

from __future__ import annotations

import pytest

from forge_contract.exit_status import how_it_ended


@pytest.mark.parametrize(
    ("code", "words"),
    [(0, "exit code 0"), (3, "exit code 3"), (-9, "signal SIGKILL"), (-11, "signal SIGSEGV"), (-40, "signal 40")],
)
def test_a_signal_is_called_by_its_name_if_it_has_one(code: int, words: str) -> None:
    """F1."""
    assert how_it_ended(code) == words
