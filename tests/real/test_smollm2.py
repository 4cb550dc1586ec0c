"""SmolLM2-135M at nine institutes: with privacy and without, the loss on other topics falls, and it answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import commands, smollm2
from support.scenarios import run

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its transformers directory."""
    return smollm2.weights(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("overrides", [(), ("privacy.unit=none",)], ids=["epsilon 8", "no privacy"])
def test_it_learns_medical_answers(
    base: Path, assets: Path, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    """The loss on topics that no institute has falls, within epsilon = 8 at each; the run answers."""
    report = run("smollm2_medquad.toml", tmp_path, f"model.base={base}", *overrides)
    assert report["failures"] == []
    assert len(report["clients"]) == 9
    assert report["metrics_after"]["loss"] < report["metrics_before"]["loss"]
    spent = report["privacy"].values()
    assert len(spent) == (0 if overrides else 9)
    assert all(7.0 < each["epsilon"] <= 8.0 for each in spent)
    question = ["--prompt", "What causes Asthma ?", "--max-tokens", "12", "--json"]
    asked = commands.run("generate", report["directory"], *question)
    assert asked.exit_code == 0, asked.output
    assert json.loads(asked.stdout)["texts"][0].strip()
