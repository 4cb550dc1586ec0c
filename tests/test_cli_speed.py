"""What ``fedslm model info`` says of the precision and of the time of a training pass."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.commands import DEMO, run

from fedslm.errors import TrainingError
from fedslm.models import precision
from fedslm.training import probe


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two turns are enough: how long a pass takes is not tested."""
    monkeypatch.setattr(probe, "_MOST_TURNS", 2)


def info(*overrides: str) -> dict[str, Any]:
    """The JSON of ``model info`` on the demo scenario with some values replaced."""
    parts = [part for override in overrides for part in ("--set", override)]
    result = run("model", "info", DEMO, *parts, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_info_times_both_precisions(dtype: str) -> None:
    """Seconds of both, how they compare, and the precision that this machine uses, which is in the table."""
    found = info(f"model.dtype={dtype}", "task.max_length=24", "privacy.passes=isolated")
    speed = found["speed"]
    assert found["dtype_asked"] == dtype
    assert found["dtype"] == ("bfloat16" if dtype == "bfloat16" else "float32")
    assert set(speed["seconds"]) == {"float32", "bfloat16"}
    assert (speed["records"], speed["tokens"]) == (1, 24)
    ratio = speed["seconds"]["float32"] / speed["seconds"]["bfloat16"]
    assert speed["bfloat16_gain"] == pytest.approx(ratio)
    shown = run(
        "model", "info", DEMO, "--set", f"model.dtype={dtype}", "--set", "model.device=cpu"
    ).stdout
    assert f'{found["dtype"]} here (model.dtype="{dtype}")' in shown
    assert "times the speed of float32" in shown
    assert "on one thread" in " ".join(shown.split())


@pytest.mark.parametrize("native", [True, False])
def test_emulated_bfloat16_is_warned_of_with_the_ratio(
    native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asks for it by name is told what it costs here."""
    monkeypatch.setattr(precision, "is_native", lambda device: native)
    found = info("model.dtype=bfloat16", "model.device=cpu")
    gain = found["speed"]["bfloat16_gain"]
    said = [warning for warning in found["warnings"] if "emulated" in warning]
    assert len(said) == (0 if native else 1)
    assert all(f"measured: {gain:.2f} times the speed of float32" in warning for warning in said)


def test_a_speed_that_is_unknown_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything else is told."""

    def fail(trial: object) -> None:
        raise TrainingError("no pass could be timed: no memory")

    monkeypatch.setattr(probe, "measure", fail)
    found = info()
    assert found["speed"] is None
    assert any("the speed is unknown: no pass" in warning for warning in found["warnings"])
    assert "training pass" not in run("model", "info", DEMO).stdout
