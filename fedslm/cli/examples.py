"""Files to start from, as ``config example``, ``node example`` and ``policy example`` print them."""

from __future__ import annotations

import difflib
from enum import StrEnum
from typing import Annotated

import typer

from fedslm import config as configuration
from fedslm.cli.answers import print_table
from fedslm.errors import Unusable


class Profile(StrEnum):
    """Kinds of machines that a node can run on."""

    hospital = "hospital"
    phone = "phone"


AnyProfile = Annotated[Profile, typer.Argument(help="What kind of machine the node runs on.")]


def list_configs() -> None:
    """Prints the name of each example config, what it needs, and what it is."""
    from fedslm.deployment.starters import example_configs

    rows = []
    for name, path in example_configs().items():
        comment = path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
        is_embedded = configuration.from_toml(path).model.base == "demo"
        needs = "nothing" if is_embedded else "the hub"
        rows.append((name, "real nodes" if name == "deployed" else needs, comment))
    print_table("", ("name", "needs", "content"), rows, [])


def text_of_config(name: str) -> str:
    """Returns the text of an example config.

    Raises:
        Unusable: There is no such example.
    """
    from fedslm.deployment.starters import example_configs

    found = example_configs()
    if name not in found:
        nearest = difflib.get_close_matches(name, found, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known: {', '.join(found)}"
        raise Unusable(f"NAME={name!r} is not an example; {hint}")
    return found[name].read_text(encoding="utf-8")
