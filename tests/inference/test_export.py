"""Tests of exports: plain transformers, in a process that cannot import fedslm, gives the run's logits."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import finished
from support.finished import KINDS
from support.tiny import disk_full
from transformers import AutoModelForCausalLM

from fedslm.config import Config
from fedslm.errors import ModelError, RunError
from fedslm.inference.evaluation import EvaluationOptions, evaluate, own_rows
from fedslm.inference.export import export_adapter, export_merged, privacy_statement
from fedslm.inference.generation import Sampling, prompts_of, write
from fedslm.inference.prediction import predict
from fedslm.inference.trained import load_trained, open_run

Finished = Callable[[str], Path]
Exported = Callable[[str], Path]
IDS = [[2, 36, 163, 164, 250, 3], [2, 99, 3, 0, 0, 0]]
MASK = [[1] * 6, [1, 1, 1, 0, 0, 0]]
BEGUN = [[0, 36, 163], [0, 99, 7]]
PRECISIONS = [("float32", 1e-5), ("float16", 0.05), ("bfloat16", 0.4)]

# What the exported model card says, for every directory of a list.
OUTSIDE = """
import json, sys
sys.modules["fedslm"] = None  # any import of it fails
import numpy, torch, transformers
from transformers import AutoTokenizer
jobs, inputs, out = json.loads(sys.argv[1])
found = {}
for name, (directory, kind, code) in jobs.items():
    options = {"trust_remote_code": True} if code else {}
    model = getattr(transformers, kind).from_pretrained(directory, dtype="auto", **options).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory, **options)
    tensors = {key: torch.tensor(value) for key, value in inputs.items()}
    if kind != "AutoModelForSeq2SeqLM":
        tensors.pop("decoder_input_ids")
    with torch.inference_mode():
        found[name] = model(**tensors).logits.float().numpy()
    config = model.config
    found[f"{name}/config"] = json.dumps({
        "labels": [config.id2label[at] for at in range(len(config.id2label))],
        "numbers": config.label2id,
        "dtype": str(next(model.parameters()).dtype),
        "problem": getattr(config, "problem_type", None),
        "cache": getattr(config, "use_cache", None),
        "ids": tokenizer("chest pain")["input_ids"],
    })
    if kind in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM"):
        ids = torch.tensor([inputs["input_ids"][0]])
        new = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
        found[f"{name}/written"] = new.numpy()
numpy.savez(out, **found)
"""
AUTO = {
    "classification": "AutoModelForSequenceClassification",
    "normalized": "AutoModelForSequenceClassification",
    "native": "AutoModelForSequenceClassification",
    "multi-label": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "seq2seq": "AutoModelForSeq2SeqLM",
}
OWN_CODE = ("classification", "normalized", "multi-label")


@pytest.fixture(scope="module")
def outside(
    finished_run: Finished, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Path], dict[str, Any]]:
    """Every kind exported, and what one fresh process without fedslm makes of them all."""
    place = tmp_path_factory.mktemp("exported")
    made, jobs = {}, {}
    for kind in KINDS:
        for dtype, _ in PRECISIONS if kind in ("classification", "causal-lm") else PRECISIONS[:1]:
            name = f"{kind}-{dtype}"
            made[name] = place / name
            export_merged(open_run(finished_run(kind)), made[name], dtype)  # type: ignore[arg-type]
            jobs[name] = (str(made[name]), AUTO.get(kind, "AutoModelForCausalLM"), kind in OWN_CODE)
    inputs = {"input_ids": IDS, "attention_mask": MASK, "decoder_input_ids": BEGUN}
    found = place / "found.npz"
    subprocess.run(
        [sys.executable, "-c", OUTSIDE, json.dumps([jobs, inputs, str(found)])],
        check=True,
        cwd=place,
        env={"HF_HOME": str(place / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    return made, dict(np.load(found))


def inputs_of(kind: str) -> dict[str, torch.Tensor]:
    """The same inputs here."""
    values = {"input_ids": IDS, "attention_mask": MASK}
    if kind == "seq2seq":
        values["decoder_input_ids"] = BEGUN
    return {key: torch.tensor(value) for key, value in values.items()}


def config_of(outside: tuple[dict[str, Path], dict[str, Any]], name: str) -> dict[str, Any]:
    """What the other process read of a config."""
    return dict(json.loads(str(outside[1][f"{name}/config"])))


@pytest.mark.parametrize("kind", KINDS)
def test_plain_transformers_gives_the_run_s_logits(
    kind: str, finished_run: Finished, outside: tuple[dict[str, Path], dict[str, Any]]
) -> None:
    """Where no row is padding, logits in float32 are those of the run, to 1e-4."""
    trained = load_trained(open_run(finished_run(kind)))
    with torch.inference_mode():
        ours = trained.model.adapter.network(**inputs_of(kind)).logits.numpy()
    theirs = outside[1][f"{kind}-float32"]
    assert theirs.shape == ours.shape
    seen = np.ones(ours.shape, bool)
    if ours.ndim == 3 and kind != "seq2seq":
        seen &= np.array(MASK, bool)[:, :, None]
    assert float(np.abs(theirs - ours)[seen].max()) < 1e-4
    assert float(np.abs(ours).max()) > 0.01
    config = config_of(outside, f"{kind}-float32")
    if trained.run.labels:
        assert tuple(config["labels"]) == trained.run.labels
        assert config["numbers"] == {name: at for at, name in enumerate(trained.run.labels)}
    expected = "multi_label_classification" if kind == "multi-label" else None
    assert config["problem"] == expected
    assert config["ids"] == trained.model.tokenizer("chest pain")["input_ids"]
    assert config["cache"] is not False


@pytest.mark.parametrize("kind", ["classification", "causal-lm"])
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_half_precision_is_near(
    kind: str, dtype: str, tolerance: float, outside: tuple[dict[str, Path], dict[str, Any]]
) -> None:
    """Files of half the size, and logits near those in float32."""
    made, found = outside
    whole, near = found[f"{kind}-float32"], found[f"{kind}-{dtype}"]
    assert config_of(outside, f"{kind}-{dtype}")["dtype"] == f"torch.{dtype}"
    assert float(np.abs(near - whole).max()) < tolerance
    sizes = [(made[f"{kind}-{d}"] / "model.safetensors").stat().st_size for d in ("float32", dtype)]
    assert sizes[1] < (0.55 if dtype != "float32" else 1.01) * sizes[0]


@pytest.mark.parametrize("kind", ["causal-lm", "gpt2", "instruction", "seq2seq"])
def test_an_exported_model_writes(kind: str, outside: tuple[dict[str, Path], dict[str, Any]]) -> None:
    """``generate`` works on the exported files, and starts from the prompt."""
    written = outside[1][f"{kind}-float32/written"][0].tolist()
    assert len(written) > 1
    assert written[0] == 0 if kind == "seq2seq" else written[:6] == IDS[0]


def test_own_code_must_be_trusted(outside: tuple[dict[str, Path], dict[str, Any]]) -> None:
    """Without a word of trust the folder is refused; it never loads as another class by mistake."""
    import transformers

    directory = outside[0]["classification-float32"]
    auto = transformers.AutoModelForSequenceClassification
    with pytest.raises(ValueError, match="trust_remote_code"):
        auto.from_pretrained(directory, trust_remote_code=False)
    assert "fedslm" not in (directory / "mean_pooling.py").read_text()
    assert {path.name for path in outside[0]["native-float32"].glob("*.py")} == set()


@pytest.mark.parametrize("name", ["classification-bfloat16", "seq2seq-float32"])
def test_the_card_keeps_the_privacy_statement(
    name: str, finished_run: Finished, outside: tuple[dict[str, Path], dict[str, Any]]
) -> None:
    """What the run's card says about privacy stands in the exported one, with the figures and the use."""
    kind, _, dtype = name.rpartition("-")
    run = open_run(finished_run(kind))
    card = (outside[0][name] / "README.md").read_text()
    statement = privacy_statement(run)
    assert "without differential privacy" in statement
    assert f"## Privacy\n\n{statement}\n" in card
    assert dtype in card
    assert run.report["adapter_sha256"] in card
    assert f"{AUTO[kind]}.from_pretrained(directory" in card
    assert ("trust_remote_code=True" in card) == (kind in OWN_CODE)


def test_exported_files_name_no_directory_of_this_machine(
    finished_run: Finished, outside: tuple[dict[str, Path], dict[str, Any]]
) -> None:
    """Where the base lay is nobody's business, but for its name in the card."""
    for name, directory in outside[0].items():
        base = open_run(finished_run(name.rpartition("-")[0])).model.base
        for file in directory.glob("*.json"):
            text = file.read_text()
            assert str(Path(base).parent) + "/" not in text, file
            assert str(Path(__file__).parents[2]) not in text, file


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_quantised_base_is_merged_unquantised(
    kind: str, config_in: Callable[..., Config], tmp_path: Path
) -> None:
    """The adapter goes into the base's own weights; the run itself is used with its small base."""
    source = finished.write_sources(tmp_path)
    model = {"quantization": kind}
    run = open_run(finished.train("causal-lm", tmp_path, source, config_in, model=model))
    trained = load_trained(run)
    found = evaluate(trained, own_rows(run), lambda done, total: None, EvaluationOptions(1000)).metrics
    assert found["loss"].tuned.value == pytest.approx(run.report["metrics_after"]["loss"], rel=1e-5)
    texts = [{"text": "chest pain"}, {"text": "a fall"}]
    (first,), _ = write(trained, prompts_of(trained, texts, 5), Sampling(5))
    assert first
    with torch.inference_mode():
        small = trained.model.adapter.network(**inputs_of("causal-lm")).logits
    export_merged(run, tmp_path / "out", "float32")
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"(float32, {kind})" in card
    plain = open_run(run.directory).model.model_copy(update={"quantization": "none"})
    whole = load_trained(replace(run, model=plain)).model.adapter.network
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = whole(**inputs_of("causal-lm")).logits
        logits = merged(**inputs_of("causal-lm")).logits
    assert float((logits - expected)[0].abs().max()) < 1e-4
    near = float((logits - small)[0].abs().max()) / float(logits[0].abs().max())
    assert 1e-3 < near < (0.1 if kind == "int8" else 0.8)


def test_exporting_leaves_the_loaded_model_alone(finished_run: Finished, tmp_path: Path) -> None:
    """A model in use goes on giving the same answers while it is exported."""
    run = open_run(finished_run("native"))
    trained = load_trained(run)
    before = list(predict(trained, [{"text": "chest pain"}]))
    export_merged(run, tmp_path / "out", "float32")
    assert list(predict(trained, [{"text": "chest pain"}])) == before
    assert trained.model.adapter.read().sha256() == run.adapter.sha256()


def test_an_adapter_is_copied_as_it_is(finished_run: Finished, tmp_path: Path) -> None:
    """Every file of PEFT's, byte by byte; an empty directory may be there already."""
    run = open_run(finished_run("classification"))
    target = tmp_path / "deep" / "out"
    target.mkdir(parents=True)
    export_adapter(run, target)
    files = sorted(path.name for path in run.adapter_directory.iterdir())
    assert sorted(path.name for path in target.iterdir()) == files
    assert {"README.md", "adapter_model.safetensors", "tokenizer.json"} <= set(files)
    for name in files:
        assert (target / name).read_bytes() == (run.adapter_directory / name).read_bytes()


def test_what_is_there_is_never_overwritten(finished_run: Finished, tmp_path: Path) -> None:
    """A directory with something in it, or a file, is refused and stays."""
    run = open_run(finished_run("classification"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for target in (tmp_path / "out", tmp_path / "file"):
        for export in (export_adapter, lambda r, t: export_merged(r, t, "float32")):
            with pytest.raises(RunError, match="not empty"):
                export(run, target)
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == [
        "file",
        "out",
        "out/mine.txt",
    ]


def test_a_full_disk_leaves_nothing_behind(finished_run: Finished, tmp_path: Path) -> None:
    """An export that cannot be finished is our error, and no half of it is left."""
    run = open_run(finished_run("native"))
    with disk_full(20_000), pytest.raises(RunError, match="cannot be written"):
        export_merged(run, tmp_path / "out", "float32")
    assert list(tmp_path.iterdir()) == []


def test_no_model_goes_without_its_privacy_statement(finished_run: Finished, tmp_path: Path) -> None:
    """A run whose card is gone, or says nothing about privacy, is not exported."""
    copy = Path(shutil.copytree(finished_run("classification"), tmp_path / "copy"))
    card = copy / "adapter" / "README.md"
    text = card.read_text()
    for spoilt in (text.replace("## Privacy", "## Secrecy"), text.split("## Privacy")[0], None):
        card.unlink() if spoilt is None else card.write_text(spoilt)
        with pytest.raises(ModelError, match="no privacy statement"):
            export_merged(open_run(copy), tmp_path / "out", "float32")
    assert not (tmp_path / "out").exists()


def test_another_base_is_never_merged(finished_run: Finished, tmp_path: Path) -> None:
    """An adapter is added to the base that it was trained on, and to no other."""
    other = open_run(finished_run("gpt2")).model.base
    with pytest.raises(ModelError, match="fits only that base"):
        export_merged(open_run(finished_run("causal-lm"), base=other), tmp_path / "out", "float32")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_weights_are_as_readable_as_their_neighbours(
    umask: int, mode: int, finished_run: Finished, tmp_path: Path
) -> None:
    """Every exported file has the mode of any new file, weights too; where new files are private, so are they."""
    run = open_run(finished_run("classification"))
    before = os.umask(umask)
    try:
        export_merged(run, tmp_path / "merged", "float32")
        export_adapter(run, tmp_path / "adapter")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "merged").iterdir()}
    assert modes == dict.fromkeys(modes, mode)
    assert (tmp_path / "adapter/adapter_model.safetensors").stat().st_mode & 0o777 == mode
    inside = {path.stat().st_mode & 0o777 for path in run.adapter_directory.iterdir()}
    assert inside == {0o666 & ~before}
