"""What the terminal shows of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.checkpoints import record
from support.tiny import PRIVATE

from fedslm.aggregation.server import ServerState
from fedslm.attestations import keep, places_of_simulation
from fedslm.config import Config
from fedslm.federation.checkpoint import Checkpoint
from fedslm.progress import Bar
from fedslm.records import AdapterState

ANNOUNCED = "the first private round tests this code"


def shown(config: Config, round: int = 0) -> str:
    """What a run says at its start."""
    text = StringIO()
    bar = Bar(Console(file=text, soft_wrap=True))
    bar.on_start(config, Checkpoint(round, ServerState(AdapterState({})), {}, {"accuracy": 0.5}))
    bar.on_end(None)
    return text.getvalue()


def test_the_first_private_round_of_a_machine_is_announced(
    config_in: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until its results are kept; a run without privacy or a resumed one has nothing to announce."""
    monkeypatch.setenv("FEDSLM_CACHE", str(tmp_path / "cache"))
    private: Config = config_in(tmp_path / "run", privacy=PRIVATE)
    assert ANNOUNCED in shown(private)
    assert ANNOUNCED not in shown(config_in(tmp_path / "run"))
    assert ANNOUNCED not in shown(private, round=1)
    isolated: Config = config_in(tmp_path / "run", privacy={**PRIVATE, "passes": "isolated"})
    assert ANNOUNCED in shown(isolated)
    values: dict[str, Any] = {"passed": True}
    for kind in ("self-test", "bit-proof"):
        assert ANNOUNCED in shown(private)
        keep(places_of_simulation(tmp_path / "run"), kind, {}, values)
        assert ANNOUNCED not in shown(isolated)  # it measures no passes
    assert ANNOUNCED not in shown(private)


def test_a_round_s_line_has_that_round_s_bytes_only(
    config_in: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """So it is the same line in a run that was resumed; and the ratio has a name."""
    bar = Bar(Console(file=StringIO(), soft_wrap=True))
    bar.on_start(
        config_in(tmp_path / "run"), Checkpoint(0, ServerState(AdapterState({})), {}, {"accuracy": 0.5})
    )
    for number in (1, 2):
        bar.on_round(replace(record(number), epsilon=1.5, signal_to_noise=0.25, reasons=(), metrics={}))
    bar.on_end(None)
    lines = [line.split(": ", 1)[1] for line in capsys.readouterr().err.splitlines()]
    assert lines == ["2/3 clients  ε 1.50  signal/noise 0.25  ↓30 B ↑20 B"] * 2
