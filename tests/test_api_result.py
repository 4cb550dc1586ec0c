"""Tests of what a result can do: what the commands do, on the same run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from support.commands import run
from support.finished import rows_of
from support.pairs import public, student
from support.tiny import write_rows

import fedslm
from fedslm.errors import ConfigError, DataError, PrivacyError, RunError
from fedslm.storage import load_adapter

Finished = Callable[[str], Path]


@pytest.fixture
def result(finished_run: Finished) -> fedslm.RunResult:
    """A finished classifier."""
    return fedslm.resume(finished_run("classification"))


def test_predictions_are_those_of_the_command(result: fedslm.RunResult) -> None:
    """For a list, for one text, and for a column of a frame."""
    texts = ["chest pain", "fracture of the wrist"]
    said = [part for text in texts for part in ("--text", text)]
    lines = run("predict", str(result.directory), *said, "--json").stdout.splitlines()
    expected = [json.loads(line) for line in lines]
    assert result.predict(texts) == result.predict(pd.Series(texts)) == expected
    (one,) = result.predict(texts[0])  # another batch, so another rounding
    assert one["label"] == expected[0]["label"]
    assert one["probabilities"] == pytest.approx(expected[0]["probabilities"], abs=1e-6)


def test_generated_texts_are_those_of_the_command(finished_run: Finished) -> None:
    """Greedy and sampled, for as many prompts as are given."""
    found = fedslm.resume(finished_run("causal-lm"))
    prompts = ["chest pain", "cast"]
    said = [part for text in prompts for part in ("--prompt", text)]
    options = ["--max-tokens", "4", "--temperature", "1", "--samples", "2"]
    lines = run("generate", str(found.directory), *said, *options, "--json").stdout.splitlines()
    expected = [json.loads(line)["texts"] for line in lines]
    assert found.generate(prompts, max_tokens=4, temperature=1.0, samples=2) == expected


def test_evaluation_is_that_of_the_command(result: fedslm.RunResult) -> None:
    """On the run's own split, and on the same records in memory."""
    shown = run("evaluate", str(result.directory), "--json").stdout
    own = result.evaluate()
    assert own["metrics"] == json.loads(shown)["metrics"]
    rows = rows_of(30, 1)
    assert result.evaluate(rows)["metrics"] == result.evaluate(pd.DataFrame(rows))["metrics"]
    assert result.evaluate(rows)["metrics"] == own["metrics"]


def test_the_adapter_is_not_shared(result: fedslm.RunResult) -> None:
    """It has the run's tensors; changing it changes no later prediction."""
    before = result.predict("chest pain")
    model = result.load_adapter()
    stored = load_adapter(result.adapter / "adapter_model.safetensors")
    held = [each for name, each in model.named_parameters() if ".lora_" in name]
    assert held
    assert sum(each.numel() for each in held) == sum(
        value.size for key, value in stored.tensors.items() if ".lora_" in key
    )
    with torch.no_grad():
        for each in held:
            each.fill_(1.0)
    assert result.predict("chest pain") == before


def test_the_history_has_a_row_for_each_round(result: fedslm.RunResult) -> None:
    """The last metrics are those of the report; a frame has the rounds as its index."""
    table, frame = result.rounds_table(), result.history
    assert [row["round"] for row in table] == list(frame.index) == list(range(1, result.rounds + 1))
    for name, value in result.metrics_after.items():
        assert table[-1][f"metrics.{name}"] == frame[f"metrics.{name}"].iloc[-1] == value


def test_a_notebook_shows_a_table(result: fedslm.RunResult) -> None:
    """Metrics and guarantee; text from outside is escaped."""
    page = result._repr_html_()
    assert f"{result.metrics_after['accuracy']:.4f}" in page
    assert str(result.directory) in page
    private = replace(result, epsilon=1.234567, delta=1e-5, stopped="<script>")
    assert "ε = 1.23" in private._repr_html_()
    assert "1e-05" in private._repr_html_()
    assert "&lt;script&gt;" in private._repr_html_()
    assert "<script>" not in private._repr_html_()


def test_what_a_run_cannot_do_is_said(result: fedslm.RunResult, finished_run: Finished) -> None:
    """Each with the remedy."""
    with pytest.raises(ConfigError, match="writes no text; use: fedslm predict"):
        result.generate("chest")
    with pytest.raises(ConfigError, match="texts: value of type int"):
        result.predict(7)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="row 1: column 'text'"):
        result.predict([["a", "list"]])
    with pytest.raises(ConfigError, match=r"data: has no column 'label' \(data.label_column\)"):
        result.evaluate([{"text": "chest"}])
    with pytest.raises(ConfigError, match="data: value of type str: it names a source"):
        result.evaluate("notes.csv")
    with pytest.raises(PrivacyError, match="without privacy"):
        result.audit()
    instructed: Any = fedslm.resume(finished_run("instruction"))
    with pytest.raises(DataError, match="a prompt of this run is a dict with text; add text"):
        instructed.generate([{"note": "chest"}], max_tokens=2)


def test_an_export_is_that_of_the_command(result: fedslm.RunResult, tmp_path: Path) -> None:
    """The adapter, or a merged model that answers alike; a directory with files is refused."""
    said = run("export", str(result.directory), "--out", str(tmp_path / "command"))
    assert said.exit_code == 0
    assert result.export(tmp_path / "call") == tmp_path / "call"
    names = sorted(path.name for path in (tmp_path / "command").iterdir())
    assert sorted(path.name for path in (tmp_path / "call").iterdir()) == names
    merged = result.export(tmp_path / "merged", merge=True, dtype="bfloat16")
    assert "bfloat16" in (merged / "config.json").read_text()
    with pytest.raises(RunError, match="is not empty"):
        result.export(merged)
    for wrong in ({"dtype": "float16"}, {"dtype": "int8", "merge": True}):
        with pytest.raises(ConfigError, match="dtype: value"):
            result.export(tmp_path / "other", **wrong)
    assert not (tmp_path / "other").exists()


def test_a_student_is_that_of_the_command(finished_run: Finished, tmp_path: Path) -> None:
    """The same settings give the same adapter, and only keys of [distill] can be set."""
    found = fedslm.resume(finished_run("causal-lm"))
    model, records = student(tmp_path, "causal-lm"), public(tmp_path)
    few = {"distill.steps": 3, "distill.rank": 2, "distill.batch_size": 4, "distill.device": "cpu"}
    values = [part for key, value in few.items() for part in ("--set", f"{key}={value}")]
    told = run(
        *("distill", str(found.directory), "--student", str(model), "--data", str(records)),
        *("--out", str(tmp_path / "command"), "--json", *values),
    )
    called = found.distill(model, records, directory=tmp_path / "call", overrides=few)
    assert called["adapter_sha256"] == json.loads(told.stdout)["adapter_sha256"]
    dry = found.distill(model, records, directory=tmp_path / "no", overrides=few, dry_run=True)
    assert (dry["steps"], dry["public_records"], dry["method"]) == (3, 24, "proxy-target")
    assert dry["total_bytes"] > 0
    with pytest.raises(ConfigError, match=r"lora\.rank: only keys of"):
        found.distill(model, records, directory=tmp_path / "no", overrides={"lora.rank": 2})


def test_a_proof_takes_what_the_command_takes(finished_run: Finished, tmp_path: Path) -> None:
    """Records to test on, seeds and resamples; what is wrong is named as the argument."""
    found = fedslm.resume(finished_run("causal-lm"))
    model, records = student(tmp_path, "causal-lm"), public(tmp_path)
    held_out = tmp_path / "held-out.jsonl"
    write_rows(held_out, rows_of(10, 7))
    few = {"distill.steps": 2, "distill.rank": 2, "distill.batch_size": 4, "distill.device": "cpu"}
    settings: dict[str, Any] = {"directory": tmp_path / "out", "overrides": few}
    for proof, part in (
        (fedslm.Proof(test="/no.jsonl"), "test='/no.jsonl': no such file"),
        (fedslm.Proof(seeds=0), "seeds: value 0"),
        (fedslm.Proof(resamples=10), "resamples: value 10"),
    ):
        with pytest.raises(fedslm.FedslmError, match=part):
            found.distill(model, records, prove=proof, dry_run=True, **settings)
    assert not (tmp_path / "out").exists()
    proof = fedslm.Proof(test=held_out, seeds=2, resamples=1000, ceiling=False)
    report = found.distill(model, records, prove=proof, **settings)
    assert report["proof"]["seeds"] == 2
    assert report["proof"]["records"] == 10
