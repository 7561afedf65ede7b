"""The core's notes as log lines on stderr, through structlog: coloured on a terminal, JSON otherwise.

structlog is imported with the first line that is really written: an embedded broker, which is silent as long as nothing is wrong,
starts without it.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

from forge_broker.core.actions import Note

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


class Log:
    def __init__(self, level: str) -> None:
        self._level = LEVELS[level]
        self._logger: Any = None

    def write(self, note: Note) -> None:
        if LEVELS[note.level] < self._level:
            return
        if self._logger is None:
            self._logger = _make_logger(self._level)
        getattr(self._logger, note.level)(note.event, **note.fields)


def _make_logger(level: int) -> Any:
    import structlog

    terminal = sys.stderr.isatty()
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=not terminal),
            structlog.processors.format_exc_info,
            structlog.dev.ConsoleRenderer() if terminal else structlog.processors.JSONRenderer(default=str),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
    )
    return structlog.get_logger()
