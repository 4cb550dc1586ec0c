"""Render templates to Markdown, and Markdown to a printable page."""

from __future__ import annotations

import html
import math
import re
from pathlib import Path
from typing import Any

from fedslm.errors import plural
from fedslm.records import epsilon_of_json

_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font: 11pt/1.45 Georgia, serif; color: #111; }}
body {{ max-width: 48rem; margin: 2rem auto; padding: 0 1rem; }}
h1, h2 {{ font-family: Helvetica, Arial, sans-serif; line-height: 1.2; }}
h2 {{ border-bottom: 1px solid #999; padding-bottom: .2rem; margin-top: 2rem; break-after: avoid; }}
table {{ border-collapse: collapse; margin: 1rem 0; break-inside: avoid; font-size: 10pt; }}
th, td {{ border: 1px solid #999; padding: .25rem .6rem; text-align: left; }}
code {{ overflow-wrap: anywhere; font-size: 9.5pt; }}
@page {{ size: A4; margin: 18mm; }}
@media print {{ body {{ max-width: none; margin: 0; padding: 0; }} }}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def render(template: str, **values: Any) -> str:
    """Renders one of the templates in this file's directory."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701  (Markdown, not HTML)
    )
    filters = {"cell": cell, "code": code, "figure": figure, "spent": spent, "plural": plural}
    environment.filters |= filters
    return environment.get_template(template).render(**values)


def cell(value: object) -> str:
    r"""Escapes text for one line or a table cell: bars do not end the cell, HTML is not interpreted.

    >>> cell("|z| < 3"), cell("<b>north")
    ('\\|z\\| < 3', '&lt;b>north')
    """
    text = " ".join(str(value).replace("|", "\\|").splitlines())
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", text)


def code(value: object) -> str:
    """Formats text as inline code, whatever backticks it contains.

    >>> code("privacy.epsilon = 8.0"), code("a `b`")
    ('`privacy.epsilon = 8.0`', '`` a `b` ``')
    """
    text = " ".join(str(value).splitlines())
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence, room = "`" * (longest + 1), " " if "`" in text else ""
    return f"{fence}{room}{text}{room}{fence}"


def figure(value: float | None) -> str:
    """Formats a number with four decimals; None (JSON's form of a non-finite number) becomes a dash.

    >>> figure(0.5), figure(None), figure(math.nan)
    ('0.5000', '–', '–')
    """
    return "–" if value is None or not math.isfinite(value) else f"{value:.4f}"


def spent(epsilon: float | str, digits: int = 3) -> str:
    """Formats an epsilon given as a number or in its JSON form.

    >>> spent(2.5), spent("infinite"), spent(math.inf)
    ('2.500', '∞', '∞')
    """
    value = epsilon_of_json(epsilon) if isinstance(epsilon, str) else epsilon
    return "∞" if value == math.inf else f"{value:.{digits}f}"


def page(markdown: str, title: str) -> str:
    """Returns a self-contained, printable HTML page; HTML in the Markdown is shown, not interpreted.

    >>> "<script>" in page("<script>", "a")
    False
    """
    from markdown_it import MarkdownIt

    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)
    return _PAGE.format(title=html.escape(title), body=body)
