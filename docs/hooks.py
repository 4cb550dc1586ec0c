"""A hook of mkdocs: links from docs/ to other files of the repository lead to their pages there."""

from __future__ import annotations

import re
from typing import Any

_OUTSIDE = re.compile(r"\]\(\.\./([^)\s]+)\)")


def on_page_markdown(markdown: str, *, config: Any, **_: Any) -> str:
    """Replaces ``../FILE``, which the site does not have, by its address in the repository.

    Without a ``repo_url`` in mkdocs.yml the text of the link stays, as code, and names the file.
    """
    if config.repo_url:
        return _OUTSIDE.sub(rf"]({config.repo_url.rstrip('/')}/blob/main/\1)", markdown)
    return re.sub(r"\[([^\]]*)\]\(\.\./([^)\s]+)\)", _named, markdown)


def _named(link: re.Match[str]) -> str:
    """The text of a link, and the file that it leads to in a checkout."""
    text, target = link[1].strip("`"), link[2].partition("#")[0]
    is_named = text.lower() == "log" or target.rstrip("/").endswith(text.rstrip("/"))
    return f"`{target}`" if is_named else f"{text}, `{target}`"
