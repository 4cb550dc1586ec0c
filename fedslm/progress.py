"""Progress on the terminal: a bar with round, clients, time, ε, metric, signal-to-noise and bytes."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fedslm import layout
from fedslm.attestations import is_any_known
from fedslm.config import Config
from fedslm.errors import RunError, plural
from fedslm.federation.checkpoint import Checkpoint
from fedslm.federation.observers import Observer
from fedslm.records import RoundRecord
from fedslm.storage import user_cache

_UNITS = ("B", "kB", "MB", "GB", "TB")


class Bar(Observer):
    """An observer that draws a progress bar on a terminal, or else prints one line per round.

    Args:
        console: Where to draw; standard error by default, so that ``--json`` stays clean.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, soft_wrap=True)
        self._progress: Progress | None = None
        self._rounds = 0

    def on_start(self, config: Config, done: Checkpoint) -> None:
        """Shows the settings of the run that starts."""
        self._rounds = config.federation.rounds
        cohort = config.federation.cohort_size
        first = ", ".join(f"{key} {value:.4f}" for key, value in done.metrics.items())
        self._console.print(
            f"[bold]{config.run.name}[/bold]: {plural(config.federation.num_clients, 'client')}, "
            f"round {done.round} of {self._rounds}; public split: {first}"
        )
        if config.privacy.unit != "none" and config.engine.nodes is None and not done.round:
            self._say_what_is_paid_once(config.privacy.passes)
        self._progress = Progress(
            TextColumn("round {task.fields[round]}/{task.fields[rounds]}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("clients"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._console,
            transient=True,
        )
        self._task = self._progress.add_task(
            "clients",
            total=cohort * (self._rounds - done.round),
            round=done.round + 1,
            rounds=self._rounds,
            note="",
        )
        if self._console.is_terminal:
            self._progress.start()

    def _say_what_is_paid_once(self, passes: str) -> None:
        """Says why the first private round on a machine takes long."""
        with suppress(RunError):  # no cache, which was said
            places = (user_cache() / layout.ATTESTATIONS,)
            kinds = ("self-test", "bit-proof") if passes == "fixed" else ("self-test",)
            if not all(is_any_known(places, kind) for kind in kinds):
                self._console.print(
                    "the first private round tests this code and measures passes on this machine, "
                    "which may take minutes"
                )

    def on_client(self, round: int, done: int, cohort: int) -> None:
        """Advances the bar."""
        if self._progress is not None:
            self._progress.update(self._task, advance=1, round=round)

    def on_round(self, record: RoundRecord) -> None:
        """Shows a round's metrics."""
        note = self._note(record)
        if self._progress is not None:
            self._progress.update(self._task, note=note)
        if not self._console.is_terminal:
            print(f"round {record.round}/{self._rounds}: {note}", file=sys.stderr, flush=True)
        for reason in record.reasons:
            self._console.print(
                f"round {record.round}: {reason}", style="yellow", highlight=False, markup=False
            )

    def on_end(self, report: Mapping[str, Any] | None) -> None:
        """Restores the terminal."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _note(self, record: RoundRecord) -> str:
        """Formats a round's metrics as one line."""
        parts = [f"{record.completed}/{record.cohort} clients"]
        if math.isfinite(record.epsilon):
            parts.append(f"ε {record.epsilon:.2f}")
        parts += [f"{key} {value:.4f}" for key, value in list(record.metrics.items())[:2]]
        if record.signal_to_noise is not None:
            parts.append(f"signal/noise {record.signal_to_noise:.2f}")
        parts.append(f"↓{readable(record.bytes_down)} ↑{readable(record.bytes_up)}")
        return "  ".join(parts)


def readable(num_bytes: float) -> str:
    """Formats a number of bytes with a unit.

    >>> readable(1_500_000)
    '1.5 MB'
    """
    for unit in _UNITS:
        if num_bytes < 1000 or unit == _UNITS[-1]:
            break
        num_bytes /= 1000
    return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
