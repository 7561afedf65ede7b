"""Exit codes, and which error leads to which. The codes are documented in `forge --help` and docs/cli.md.

69 is sysexits' EX_UNAVAILABLE, which the worker uses too: scripts can tell "start a broker first" from "your call was wrong".
"""

from __future__ import annotations

from typing import IO, Any, Final

import click

EXIT_NO_BROKER: Final = 69
EXIT_INTERRUPTED: Final = 130


class Failure(click.ClickException):
    """It was tried and failed. `trace`: where the user's code raised, shown above the message."""

    exit_code = 1

    def __init__(self, message: str, trace: str = "") -> None:
        super().__init__(message)
        self._trace = trace

    def show(self, file: IO[Any] | None = None) -> None:
        if self._trace:
            click.echo(self._trace.rstrip(), file=file, err=True)
        super().show(file)


class Misused(Failure):
    """What was asked for cannot be: an argument, an option, a setting."""

    exit_code = 2


class NoBroker(Failure):
    exit_code = EXIT_NO_BROKER


def failure_of(error: Exception) -> Failure | None:
    """What to tell about an error; None for one that is no business of the user: a mistake of ours, or click's own."""
    from forge_contract.errors import (
        AddressInUse,
        BrokerLost,
        BrokerUnreachable,
        ConfigError,
        ForgeError,
        RemoteTraceback,
        VersionMismatch,
    )

    if isinstance(error, (BrokerUnreachable, BrokerLost, VersionMismatch)):
        return NoBroker(str(error))
    if isinstance(error, (ConfigError, AddressInUse)):
        return Misused(str(error))
    trace = error.__cause__.traceback if isinstance(error.__cause__, RemoteTraceback) else ""
    if trace or isinstance(error, ForgeError):
        # Notes say what the error itself does not know: which rank it was, what became of a dead letter.
        return Failure("\n".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])]), trace)
    return None
