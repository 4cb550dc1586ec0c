"""Log formats for people and for machines, and a size limit for log files."""

from __future__ import annotations

import json
import logging
import sys
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedslm.errors import printable

_MOST_BYTES, _KEPT_BYTES = 10 << 20, 1 << 20
_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class TextLines(logging.Formatter):
    """One line for each record, and a traceback if any; text from outside cannot break a line."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  (logging's name)
        """Writes a record's line."""
        record.message = printable(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:  # noqa: N802
        """Writes a traceback."""
        return "\n".join(map(printable, super().formatException(ei).splitlines()))


class JsonLines(logging.Formatter):
    """One JSON object for each record: time (UTC), level, logger, message, and a traceback if any."""

    def format(self, record: logging.LogRecord) -> str:
        """Writes a record."""
        values = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            values["traceback"] = self.formatException(record.exc_info)
        return "".join(map(_escaped, json.dumps(values, ensure_ascii=False)))


def _escaped(character: str) -> str:
    """A character of a JSON text in a form that a terminal displays safely."""
    return character if character.isprintable() else json.dumps(character)[1:-1]


def log_to_stderr(form: str) -> None:
    """Sends this program's log, and Flower's warnings, to standard error.

    Args:
        form: text, json, or auto: text on a terminal and json elsewhere (a journal, a file).
    """
    is_text = form == "text" or (form == "auto" and sys.stderr.isatty())
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(TextLines(_TEXT) if is_text else JsonLines())
    for name, level in (("fedslm", logging.INFO), ("flwr", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)


def keep_small(path: Path, most_bytes: int = _MOST_BYTES) -> None:
    """Truncates a log that has grown: its last mebibyte moves to PATH.old, and the file is emptied.

    Processes that append to it can continue: it stays the same file. Lines that are written at the
    moment of the truncation may be lost; a log is not a ledger.
    """
    with suppress(OSError):
        if path.stat().st_size <= most_bytes:
            return
        with path.open("r+b") as file:
            file.seek(-min(_KEPT_BYTES, most_bytes), 2)
            path.with_name(f"{path.name}.old").write_bytes(file.read())
            file.truncate(0)


def last_lines(path: Path, count: int) -> list[str]:
    """The last lines of a log, which may contain any bytes."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _KEPT_BYTES))
        return file.read().decode(errors="replace").splitlines()[-count:]
