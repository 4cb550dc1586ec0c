"""Tests of templates: no line swallows the next, and no text breaks a table."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fedslm.reporting import render as rendering
from fedslm.reporting.render import cell, page

TEMPLATES = sorted((Path(rendering.__file__).parent / "templates").glob("*.j2"))
IN_A_CELL = ("cell", "figure", "format", "length")


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_no_line_swallows_the_next(path: Path) -> None:
    """A tag that ends a line of text keeps its line's end (`+%}`): trim_blocks would take it."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.endswith("%}") and not re.fullmatch(r"\s*(\{%[^%]*%\}|\}.*%\})", line):
            assert line.endswith("+%}"), line


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_every_cell_is_escaped(path: Path) -> None:
    """What is put into a row of a table goes through a filter that leaves the table whole."""
    for line in path.read_text(encoding="utf-8").splitlines():
        for expression in re.findall(r"\{\{(.*?)\}\}", line) if line.startswith("|") else ():
            filters = re.sub(r"\(.*\)", "", expression.rpartition('"')[2] or expression).split("|")
            assert any(each.strip().startswith(IN_A_CELL) for each in filters[1:]), expression


@pytest.mark.parametrize("text", ["|z| = 0.4", "a\\|b", "one\ntwo", "||", "`|`", ""])
def test_no_text_breaks_a_row(text: str) -> None:
    """A bar, a backslash before it or a line's end leaves two cells two, with the text in the first."""
    table = f"| a | b |\n|---|---|\n| {cell(text)} | last |\n"
    cells = re.findall(r"<td>(.*?)</td>", page(table, "t"))
    shown = text.replace("\n", " ").replace("`|`", "<code>|</code>").replace("\\|", "|")
    assert cells == [shown, "last"]
