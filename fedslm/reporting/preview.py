"""A figure of a simulation's data: labels and records of each client."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fedslm.data.preview import Preview
from fedslm.storage import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NAMED_LABELS = 10
_MOST_PIECES = 5000
_MOST_NAMES = 40
_LONGEST_NAME = 24


def plot_preview(path: Path, preview: Preview, title: str) -> None:
    """Plots each client's label shares (top), and its numbers of records and users (bottom).

    Args:
        path: The PNG to write.
        preview: Preview of the data.
        title: Title of the figure.
    """
    from matplotlib.figure import Figure

    width = min(16.0, max(7.0, 3.5 + 0.3 * len(preview.clients)))
    figure = Figure(figsize=(width, 6.0 if preview.labels else 3.5), layout="constrained")
    if preview.labels:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        _draw_labels(above, preview)
    else:
        below = figure.subplots()
    _draw_sizes(below, preview)
    figure.suptitle(title)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _draw_labels(axes: Axes, preview: Preview) -> None:
    """Stacked bars: share of each label in a client's records; labels that do not fit are grey."""
    from matplotlib import colormaps

    clients, labels = preview.clients, preview.labels
    most = max(_NAMED_LABELS, _MOST_PIECES // len(clients))
    totals = [max(1, sum(client.labels.values())) for client in clients]
    bottom = [0.0] * len(totals)
    colours = colormaps["tab10" if len(labels) <= _NAMED_LABELS else "tab20"].colors  # type: ignore[attr-defined]
    for number, label in enumerate(labels[:most]):
        counts = [client.labels.get(label, 0) for client in clients]
        shares = [count / total for count, total in zip(counts, totals, strict=True)]
        name = _shortened(label) if number < _NAMED_LABELS else None
        colour = colours[number % len(colours)]
        axes.bar(range(len(totals)), shares, bottom=bottom, color=colour, label=name, width=0.85)
        bottom = [low + share for low, share in zip(bottom, shares, strict=True)]
    rest = [1 - low if total > 1 else 0 for low, total in zip(bottom, totals, strict=True)]
    more = f"… {len(labels) - _NAMED_LABELS} more" if len(labels) > _NAMED_LABELS else None
    axes.bar(range(len(totals)), rest, bottom=bottom, color="lightgrey", label=more, width=0.85)
    axes.set_ylabel("share of labels")
    axes.set_ylim(0, 1)
    handles, names = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], names[::-1], loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)


def _draw_sizes(axes: Axes, preview: Preview) -> None:
    """Bars: number of records of each client, and of its users if they are the unit."""
    clients = preview.clients
    records = [client.records for client in clients]
    axes.bar(range(len(clients)), records, width=0.85, color="slategrey", label="records")
    units = [client.units for client in clients if client.units is not None]
    if units:
        axes.bar(range(len(units)), units, width=0.45, color="darkorange", label="users")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    axes.set_ylabel("records")
    axes.set_axisbelow(True)
    axes.grid(axis="y", alpha=0.3)
    if len(clients) <= _MOST_NAMES:
        names = [_shortened(client.name) for client in clients]
        slanted = max(map(len, names)) * len(names) > 60
        rotation, side = (45, "right") if slanted else (0, "center")
        axes.set_xticks(range(len(names)), names, rotation=rotation, ha=side, fontsize=8)
    else:
        axes.set_xlabel(f"{len(clients)} clients")


def _shortened(name: str) -> str:
    """Shortens a name so that it fits."""
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"
