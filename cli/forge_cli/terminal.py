"""How we talk to a terminal, and to what is none: colours, boxes and spinners are for people, plain lines for programs.

What a command was asked for goes to stdout; spinners go to stderr, so that a pipe never sees one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status

SPINNER_AFTER_S: Final = 0.3  # what is quicker needs no spinner, nor the import that brings it
PLAIN_COLUMNS: Final = 300  # a pipe has no width: nothing is wrapped or cut for it


def stdout_console() -> Console:
    from rich.console import Console

    # Names and error texts come from users: brackets in them are no markup.
    return Console(
        markup=False,
        emoji=False,
        highlight=False,
        width=None if sys.stdout.isatty() else PLAIN_COLUMNS,
        soft_wrap=False,
    )


@contextmanager
def spinner(text: str) -> Iterator[None]:
    """While something takes long, say on the terminal what. To be used on a running loop."""
    if not sys.stderr.isatty():
        yield
        return
    import asyncio

    shown: list[Status] = []

    def show() -> None:
        from rich.console import Console

        status = Console(stderr=True, markup=False, emoji=False, highlight=False).status(text)
        status.start()
        shown.append(status)

    timer = asyncio.get_running_loop().call_later(SPINNER_AFTER_S, show)
    try:
        yield
    finally:
        timer.cancel()
        for status in shown:
            status.stop()


def write_json(value: Any, indent: int | None = 2) -> None:
    """JSON to stdout, in UTF-8 whatever the locale."""
    import json

    import click

    text = json.dumps(value, indent=indent, ensure_ascii=False)
    # A lone surrogate, as file names may hold, is no UTF-8; its escape is good JSON.
    click.echo(text.encode("utf-8", "backslashreplace"))
