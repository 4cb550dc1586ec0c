"""Tests of the table of methods: the page in docs is the one that the program prints."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from fedslm.aggregation.compatibility import CONFLICTS
from fedslm.aggregation.methods import METHODS
from fedslm.cli import app

PAGE = Path(__file__).parents[2] / "docs" / "aggregation.md"


def test_the_page_is_generated() -> None:
    """docs/aggregation.md is what `fedslm methods --markdown` prints, to the letter."""
    printed = CliRunner().invoke(app, ["methods", "--markdown"])
    assert printed.exit_code == 0
    assert printed.stdout == PAGE.read_text(encoding="utf-8")


def test_json_has_every_row() -> None:
    """Every method and every refused combination is there for programs."""
    printed = CliRunner().invoke(app, ["methods", "--json"])
    values = json.loads(printed.stdout)
    assert [row["name"] for row in values["methods"]] == list(METHODS)
    assert len(values["conflicts"]) == len(CONFLICTS)
    flexlora = next(row for row in values["methods"] if row["name"] == "flexlora")
    assert flexlora["valid"]["record"]
    assert not flexlora["valid"]["robust rules"]


def test_people_get_both_tables() -> None:
    """The plain command names each method and says what is refused."""
    printed = CliRunner().invoke(app, ["methods"])
    assert printed.exit_code == 0
    assert all(name in printed.stdout for name in METHODS)
    assert "alternative" in printed.stdout
