"""The table of goals in benchmarks/README.md: what its script writes for given figures."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModuleType]:
    """The script, with files of its own."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("table")
    page = tmp_path / "README.md"
    page.write_text(f"before\n{module.BEGIN}\nold\n{module.END}\nafter\n")
    monkeypatch.setattr(module, "PAGE", page)
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results.json")
    yield module
    for name in ("table", "arms", "scenario"):
        sys.modules.pop(name, None)


def figures(key: str, value: float, busy: float) -> dict[str, Any]:
    """What a script prints at its end."""
    return {"ratios": {key: value}, "busy_cores": busy}


def line_of(table: ModuleType, row: Any) -> str:
    """A row's line in the page."""
    lines = table.PAGE.read_text(encoding="utf-8").splitlines()
    (line,) = [line for line in lines if line.startswith(f"| {row.what} |")]
    return str(line)


def test_each_row_is_written_measured_or_not(table: ModuleType) -> None:
    """All rows are there once, the page around the table stays, and the old table goes."""
    table.write_page(table.kept())
    text = table.PAGE.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert all("not measured" in line_of(table, row) for row in table.ROWS)
    assert len({row.key for row in table.ROWS}) == len(table.ROWS)


def test_bad_runs_stay(table: ModuleType) -> None:
    """The last figure is held against the goal; the least and the greatest are shown too."""
    row = next(row for row in table.ROWS if not row.is_wall and not row.is_least)
    arm, _, key = row.key.partition("/")
    for value in (9.0, 0.5):
        table.keep(arm, ["x.py"], figures(key, value, 0.0))
    table.write_page(table.kept())
    line = line_of(table, row)
    assert "0.50 (2 runs: 0.50 to 9.00)" in line
    assert "met" in line
    table.keep(arm, ["x.py"], figures(key, 9.0, 0.0))
    table.write_page(table.kept())
    assert "**missed**" in line_of(table, row)


def test_wall_time_of_a_busy_machine_is_marked(table: ModuleType) -> None:
    """And processor time is not: other load hardly moves it."""
    for row in table.ROWS:
        arm, _, key = row.key.partition("/")
        table.keep(arm, ["x.py"], figures(key, 1.0, 1.5))
    table.write_page(table.kept())
    for row in table.ROWS:
        assert ("1.5 cores were busy" in line_of(table, row)) == row.is_wall


def test_the_page_has_the_table(table: ModuleType) -> None:
    """The README that is committed has a line for every row of the script."""
    text = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    assert table.BEGIN in text
    assert table.END in text
    assert [row.what for row in table.ROWS if f"| {row.what} |" not in text] == []
