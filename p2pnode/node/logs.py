"""Log lines on standard error: one JSON object each for machines, or short lines for people.

Extra fields given with `extra={...}` appear in both forms. Peers' bytes never reach a log unescaped: a terminal escape
sequence in a model's name must not reach the owner's terminal.
"""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, Final, TextIO

from p2pnode.errors import ConfigError

LEVELS: Final = ("debug", "info", "warning", "error")
LINE_CHARACTERS_MAX: Final = 8192
_STANDARD_FIELDS: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """One JSON object per record: time (ISO 8601, UTC), level, logger, text, extra fields, and error with its traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """Give the line."""
        data: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "text": record.getMessage(),
            **_extra(record),
        }
        if record.exc_info:
            data["error"] = self.formatException(record.exc_info)
        return json.dumps(data, default=str)[:LINE_CHARACTERS_MAX]


class PlainFormatter(logging.Formatter):
    """Time, level, text, extra fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Give the line, with control characters escaped."""
        time = datetime.fromtimestamp(record.created).astimezone().strftime("%H:%M:%S")
        extra = "".join(f" {name}={value}" for name, value in _extra(record).items())
        line = f"{time} {record.levelname.lower():7} {_printable(record.getMessage() + extra)}"
        if record.exc_info:
            line += "\n" + "\n".join(_printable(part) for part in self.formatException(record.exc_info).splitlines())
        return line[:LINE_CHARACTERS_MAX]


def configure_logs(level: str = "info", *, as_json: bool = False, stream: TextIO | None = None) -> logging.Handler:
    """Send p2pnode's log lines to a stream (standard error). Calling it again replaces the former choice. Raises ConfigError."""
    if level not in LEVELS:
        raise ConfigError(f"log level {level!r} is not one of {', '.join(LEVELS)}")
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if as_json else PlainFormatter())
    logger = logging.getLogger("p2pnode")
    for former in list(logger.handlers):
        logger.removeHandler(former)
    logger.addHandler(handler)
    logger.setLevel(level.upper())
    logger.propagate = False
    return handler


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    return {name: value for name, value in vars(record).items() if name not in _STANDARD_FIELDS}


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else character.encode("unicode_escape").decode() for character in text)
