"""Tests of templates: no line swallows the next, and no text breaks a table."""

from __future__ import annotations

import html
import re
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from fedslm import rendering as rendering
from fedslm.rendering import cell, code, page

TEMPLATES = sorted((Path(rendering.__file__).parent / "templates").glob("*.j2"))
IN_A_CELL = ("cell", "figure", "format", "length", "spent")


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


@pytest.mark.parametrize("name", ["<b>north</b>", "<!-- north", "</table>", "<script>x</script>"])
def test_no_name_is_html(name: str) -> None:
    """A client or a label that looks like HTML is shown as it is, also where HTML is allowed."""
    text = html.unescape(MarkdownIt("commonmark").render(f"- {cell(name)}: it failed"))
    assert "<" not in MarkdownIt("commonmark").render(cell(name)).removeprefix("<p>").replace(
        "</p>", ""
    )
    assert f"{name}: it failed" in text


@pytest.mark.parametrize("text", ["epsilon = 8.0", "a `b` c", "``", "`", "one\ntwo", "<b>"])
def test_code_is_shown_whole(text: str) -> None:
    """A value with backticks or line ends is one piece of code, with every character."""
    shown = re.findall(r"<code>(.*?)</code>", page(f"- set: {code(text)}, then more", "t"))
    assert [html.unescape(each) for each in shown] == [text.replace("\n", " ")]
