"""The scenarios of simulations/ on real weights and data, and the adapter outside fedslm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.scenarios import run

from fedslm.storage import load_adapter

pytestmark = pytest.mark.real


def test_spam_at_epsilon_3(assets: Path, tmp_path: Path) -> None:
    """Ten clients, record-level epsilon = 3, delta = 1e-5: test accuracy at least 0.95 (majority 0.86)."""
    report = run(
        "sms_spam.toml",
        tmp_path,
    )
    assert report["metrics_after"]["accuracy"] >= 0.95
    assert len(report["privacy"]) == 10
    assert all(spent["epsilon"] <= 3.0 for spent in report["privacy"].values())
    assert report["delta"] == 1e-5
    assert report["failures"] == []
    check_with_plain_peft(report, assets)


def check_with_plain_peft(report: dict[str, Any], assets: Path) -> None:
    """The class of the model card, plain peft and transformers give the run's own accuracy."""
    import torch
    from peft import PeftModel
    from transformers import AutoModel, AutoTokenizer

    directory = Path(report["directory"])
    card = (directory / "adapter" / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    assert f'"{report["base_model"]}"' in code
    namespace: dict[str, Any] = {}
    definitions = code.split("base = ")[0]
    exec(compile(definitions, "model card", "exec"), namespace)  # noqa: S102
    encoder = AutoModel.from_pretrained(report["base_model"], dtype=torch.float32)
    base = namespace["MeanPoolingClassifier"](encoder, 2)
    model = PeftModel.from_pretrained(base, directory / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(directory / "adapter")
    import pyarrow.parquet as pq

    rows = pq.read_table(directory / "data" / "evaluation.parquet").to_pylist()
    hits = 0
    with torch.inference_mode():
        for start in range(0, len(rows), 64):
            part = rows[start : start + 64]
            texts = [row["text"] for row in part]
            batch = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=64)
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            chosen = [report["labels"][index] for index in logits.argmax(-1)]
            hits += sum(label == row["label"] for label, row in zip(chosen, part, strict=True))
    assert hits / len(rows) == pytest.approx(report["metrics_after"]["accuracy"], abs=1e-9)


@pytest.mark.parametrize(
    ("overrides", "goal"),
    [((), 3.2), (("privacy.unit=record", "aggregation.method=ffa"), 3.9)],
    ids=["no privacy", "epsilon 8"],
)
def test_shakespeare_by_speaker(
    assets: Path, tmp_path: Path, overrides: tuple[str, ...], goal: float
) -> None:
    """The twenty largest speakers: loss per token falls from about 4.4 to the goal."""
    report = run(
        "shakespeare.toml",
        tmp_path,
        *overrides,
    )
    assert 4.2 < report["metrics_before"]["loss"] < 4.6
    assert report["metrics_after"]["loss"] <= goal
    assert len(report["clients"]) == 20
    if overrides:
        assert 7.5 < report["epsilon"] <= 8.0
    check_language_model_with_plain_peft(report)


def check_language_model_with_plain_peft(report: dict[str, Any]) -> None:
    """Plain peft gives the run's own loss per token."""
    import pyarrow.parquet as pq
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = Path(report["directory"])
    base = AutoModelForCausalLM.from_pretrained(report["base_model"], dtype=torch.float32)
    model = PeftModel.from_pretrained(base, directory / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(directory / "adapter")
    rows = pq.read_table(directory / "data" / "evaluation.parquet").to_pylist()
    total = tokens = 0.0
    with torch.inference_mode():
        for row in rows:
            ids = tokenizer(row["text"], return_tensors="pt", truncation=True, max_length=96)[
                "input_ids"
            ]
            count = ids.shape[1] - 1
            if count >= 1:
                total += float(model(input_ids=ids, labels=ids).loss) * count
                tokens += count
    assert total / tokens == pytest.approx(report["metrics_after"]["loss"], abs=1e-3)


def test_saved_hash_names_the_adapter(assets: Path, tmp_path: Path) -> None:
    """adapter_sha256 of the report is the hash of frozen and trained tensors on disk."""
    report = run(
        "shakespeare.toml",
        tmp_path,
        "federation.rounds=1",
        "federation.num_clients=2",
        "training.local_steps=2",
        "data.max_evaluation_records=20",
    )
    directory = Path(report["directory"])
    state = json.loads((directory / "checkpoint" / "state.json").read_text())
    trained = load_adapter(directory / "checkpoint" / state["files"]["moving"]["name"])
    whole = load_adapter(directory / "frozen.safetensors").merged(trained)
    assert whole.sha256() == report["adapter_sha256"]
