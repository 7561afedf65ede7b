"""Where a worker prints to: whoever reads its output may be gone, and that must not become an exception in user code.

A broker reads its workers' stdout and stderr through pipes; when it dies, the next `print` of an actor would raise
BrokenPipeError in the middle of a call. Here the first such write turns the descriptor into /dev/null, for Python and
for C alike.
"""

from __future__ import annotations

import faulthandler
import io
import os
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class Lasting(io.RawIOBase):
    """A descriptor to write to for ever."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._fd

    def isatty(self) -> bool:
        return os.isatty(self._fd)

    def write(self, data: ReadableBuffer, /) -> int:
        try:
            return os.write(self._fd, data)
        except OSError:
            # EPIPE: nobody reads; EIO: the terminal is gone; ENOSPC: so is the disk. None is the user's business.
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._fd)
            os.close(null)
            return memoryview(data).nbytes


def make_output_last() -> None:
    """Replace sys.stdout and sys.stderr by line-buffered streams that outlive their reader; crashes show on stderr."""
    sys.stdout = _lasting(sys.stdout, 1)
    sys.stderr = _lasting(sys.stderr, 2)
    faulthandler.enable(sys.stderr)


def _lasting(stream: TextIO | None, fd: int) -> TextIO:
    if stream is not None:
        stream.flush()
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return io.TextIOWrapper(
        io.BufferedWriter(Lasting(fd)), encoding=encoding, errors="backslashreplace", line_buffering=True
    )
