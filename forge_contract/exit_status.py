"""How a process ended, in words: for whoever started it, and is read by people (the scaler, a worker's supervisor, a program with an
embedded broker)."""

from __future__ import annotations

import signal


def how_it_ended(code: int) -> str:
    """`exit code 3`, `signal SIGSEGV`; `code` as `subprocess` has it: a signal is negative."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"  # a real-time one has no name
