"""Logs that machines read, and that do not grow for ever."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from fedslm.deployment.journal import JsonLines, TextLines, keep_small, last_lines


def test_a_record_is_one_json_line() -> None:
    """Message, level, logger, time and traceback; a line break in a message breaks no line."""
    try:
        raise ValueError("bad\nvalue")
    except ValueError as error:
        trouble = (ValueError, error, error.__traceback__)
    record = logging.LogRecord("fedslm.x", logging.ERROR, "f", 1, "two\nlines: %s", ("é",), trouble)
    line = JsonLines().format(record)
    assert "\n" not in line
    values = json.loads(line)
    assert (values["level"], values["logger"], values["message"]) == (
        "error",
        "fedslm.x",
        "two\nlines: é",
    )
    assert "ValueError" in values["traceback"]
    assert values["time"].endswith("+00:00")


def test_what_others_wrote_commands_no_terminal() -> None:
    """Escapes, C1 controls and marks of direction are shown, in JSON without loss, and break no line."""
    text = "a\nb\x1b[2J\x9b31m\u202e\u2028c\U000e0001"
    error = ValueError(text)
    record = logging.LogRecord("fedslm", logging.ERROR, "f", 1, text, (), (ValueError, error, None))
    line = JsonLines().format(record)
    assert line.isprintable()
    assert json.loads(line)["message"] == text
    lines = TextLines("%(levelname)s %(message)s").format(record).split("\n")
    assert lines[0] == "ERROR a b [2J 31m  c "
    assert all(each.isprintable() for each in lines)


def test_a_log_that_has_grown_is_cut(tmp_path: Path) -> None:
    """Its end moves aside, and whoever has it open goes on at its new beginning."""
    path = tmp_path / "x.log"
    with path.open("ab", buffering=0) as writer:
        for number in range(300):
            writer.write(f"line {number}\n".encode())
        keep_small(path, 1_000_000)
        assert path.stat().st_size > 2000
        keep_small(path, 1000)
        writer.write(b"after\n")
    assert path.read_bytes() == b"after\n"
    old = (tmp_path / "x.log.old").read_bytes()
    assert len(old) == 1000
    assert old.endswith(b"line 299\n")


@pytest.mark.parametrize("count", [1, 2, 50])
def test_the_last_lines(tmp_path: Path, count: int) -> None:
    """Bytes that are no text do not stop it."""
    path = tmp_path / "x.log"
    path.write_bytes(b"one\n\xff\xfe\nthree\n")
    assert last_lines(path, count) == ["one", "\ufffd\ufffd", "three"][-count:]


def test_no_log_is_no_trouble(tmp_path: Path) -> None:
    """A log that is not there is not cut."""
    keep_small(tmp_path / "none.log")
