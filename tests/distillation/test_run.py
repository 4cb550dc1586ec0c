"""A distillation from beginning to end: what it learns, what it writes, and how it goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from support.pairs import FEW, Interrupted, Stops, Told, public, settings, student
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedslm.distillation import contexts
from fedslm.distillation.models import load_student, load_teacher
from fedslm.distillation.run import PreparedJob, distill, prepare
from fedslm.errors import ConfigError, DataError, ModelError, RunError
from fedslm.inference.trained import open_run
from fedslm.storage import load_adapter

Finished = Callable[[str], Path]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Public records and larger models."""
    root = tmp_path_factory.mktemp("pairs")
    kinds = ("causal-lm", "instruction", "classification")
    return {"public": public(root), **{kind: student(root, kind) for kind in kinds}}


def asked(finished_run: Finished, places: dict[str, Path], kind: str, **changes: Any) -> PreparedJob:
    """What a test asks for."""
    values = {"student": str(places[kind]), "source": str(places["public"]), **changes}
    return prepare(open_run(finished_run(kind)), settings(**values))


def learned(report: dict[str, Any]) -> bool:
    """Whether the student came nearer to its target."""
    losses = report["losses"]
    return sum(losses[-3:]) < sum(losses[:3])  # an epoch each


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("causal-lm", "auto"),
        ("instruction", "auto"),
        ("causal-lm", "forward-kl"),
        ("causal-lm", "reverse-kl"),
        ("instruction", "jsd"),
        ("causal-lm", "sequence"),
        ("instruction", "labels"),
        ("classification", "auto"),
        ("classification", "log-confidence"),
        ("classification", "forward-kl"),
        ("classification", "labels"),
    ],
)
def test_every_method_teaches(
    kind: str, method: str, finished_run: Finished, places: dict[str, Path], tmp_path: Path
) -> None:
    """The loss falls, what PEFT loads is what was learned, and the work's files are gone."""
    want = asked(finished_run, places, kind, method=method, steps=18)
    report = distill(want, tmp_path / "out", Told())
    assert learned(report)
    assert report["method"] == {"auto": _auto(kind)}.get(method, method)
    written = load_adapter(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert written.sha256() == report["adapter_sha256"] == report["privacy"]["student_adapter_sha256"]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"steps", "targets", "texts.jsonl", "proof"}.isdisjoint(names)
    assert {"distill.md", "distill.json", "distill.png", "adapter", "contexts.jsonl"} <= names
    assert "not a privacy mechanism" in (tmp_path / "out" / "distill.md").read_text()
    assert json.loads((tmp_path / "out" / "distill.json").read_text())["seconds"] > 0


def _auto(kind: str) -> str:
    """What "auto" becomes."""
    return "gated-reverse-kl" if kind == "classification" else "proxy-target"


def test_peft_loads_what_was_learned(
    finished_run: Finished, places: dict[str, Path], tmp_path: Path
) -> None:
    """The adapter changes the student's own logits as it did in training."""
    want = asked(finished_run, places, "causal-lm", steps=12)
    report = distill(want, tmp_path / "out", Told())
    base = AutoModelForCausalLM.from_pretrained(places["causal-lm"], dtype=torch.float32)
    tokens = torch.arange(5, 15)[None]
    before = base(input_ids=tokens).logits.detach().clone()
    model = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter").eval()
    after = model(input_ids=tokens).logits.detach()
    assert not torch.allclose(before, after, atol=1e-4)
    ours = load_student(want.job.run, want.job.settings)
    ours.model.adapter.write(load_adapter(tmp_path / "out" / "adapter" / "adapter_model.safetensors"))
    assert torch.allclose(ours.model.adapter.network(input_ids=tokens).logits, after, atol=1e-5)
    assert report["metrics"]["student after"] != report["metrics"]["student before"]


def test_a_written_answer_ends_as_training_ended_answers(
    finished_run: Finished, places: dict[str, Path]
) -> None:
    """Behind what the teacher writes stands what the chat template ends a turn with."""
    job = asked(finished_run, places, "instruction").job
    teacher = load_teacher(job.run, job.settings)
    try:
        teacher.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}[MASK]{% endfor %}"
        example = contexts._continued((5, 6), (7,), teacher)
    finally:
        teacher.tokenizer.chat_template = None
    assert example is not None
    assert example.input_ids == (5, 6, 7, teacher.tokenizer.mask_token_id)


def test_an_untuned_teacher_leaves_the_student_alone(
    finished_run: Finished, places: dict[str, Path], tmp_path: Path
) -> None:
    """S* = S0: the proxy target is the student's own distribution, so no step moves anything."""
    want = asked(finished_run, places, "causal-lm")
    nothing = load_teacher(want.run, want.job.settings).trained.initial
    run = replace(want.run, adapter=nothing)
    plain = replace(want, run=run, job=replace(want.job, run=run))
    report = distill(plain, tmp_path / "out", Told())
    assert report["losses"] == [0.0] * FEW["steps"]
    assert report["metrics"]["student after"] == report["metrics"]["student before"]


@pytest.mark.parametrize("cached", [0, 8])
def test_an_interrupted_distillation_goes_on(
    cached: int, finished_run: Finished, places: dict[str, Path], tmp_path: Path
) -> None:
    """Stopped in the writing and in the learning, then called again: bit for bit the same adapter."""
    changes = {"method": "forward-kl", "cached_samples": cached}
    want = asked(finished_run, places, "causal-lm", **changes)
    whole = distill(want, tmp_path / "whole", Told())
    for stage, after in [("teacher writes", 1), ("student learns", 4)]:
        with pytest.raises(Interrupted):
            distill(want, tmp_path / "out", Stops(stage, after))
    told = Told()
    report = distill(want, tmp_path / "out", told)
    assert "teacher writes" not in told.stages
    assert told.stages.count("student learns") < 6
    assert report["adapter_sha256"] == whole["adapter_sha256"]
    assert report["losses"] == whole["losses"]
    with pytest.raises(RunError, match="finished distillation"):
        distill(want, tmp_path / "out", Told())


def test_another_question_is_not_gone_on_with(
    finished_run: Finished, places: dict[str, Path], tmp_path: Path
) -> None:
    """An interrupted distillation is not mixed with one that was asked otherwise."""
    with pytest.raises(Interrupted):
        distill(asked(finished_run, places, "causal-lm"), tmp_path / "out", Stops("student learns", 2))
    with pytest.raises(RunError, match="different settings \\(settings\\)"):
        distill(asked(finished_run, places, "causal-lm", alpha=0.5), tmp_path / "out", Told())
    identity = tmp_path / "out" / "asked.json"
    identity.write_bytes(b"\xff")
    with pytest.raises(RunError, match=r"asked\.json is damaged: .*; remove "):
        distill(asked(finished_run, places, "causal-lm"), tmp_path / "out", Told())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("…")
    with pytest.raises(RunError, match="contains something else"):
        distill(asked(finished_run, places, "causal-lm"), tmp_path / "mine", Told())


@pytest.mark.parametrize("kind", ["classification", "causal-lm"])
def test_two_passes_learn_the_same_job_and_teacher(
    kind: str, finished_run: Finished, places: dict[str, Path], tmp_path: Path
) -> None:
    """Classes are kept whole: the same adapter. Many sampled tokens: nearly the same losses."""
    common = {"method": "forward-kl", "sampled_fraction": 0.0}
    live = distill(asked(finished_run, places, kind, **common), tmp_path / "live", Told())
    samples = {"cached_samples": 4000}
    cached = distill(
        asked(finished_run, places, kind, **common, **samples), tmp_path / "cached", Told()
    )
    if kind == "classification":
        assert cached["losses"] == pytest.approx(live["losses"], abs=1e-5)
    else:  # cross-entropy = KL + the teacher's entropy: the same differences
        first, second = (
            [x - report["losses"][0] for x in report["losses"]] for report in (live, cached)
        )
        assert first == pytest.approx(second, abs=0.3)
    before, after = (report["metrics"]["student after"]["loss"] for report in (live, cached))
    assert before == pytest.approx(after, rel=0.03)


def test_public_labels_count_where_they_are(
    finished_run: Finished, places: dict[str, Path], tmp_path: Path
) -> None:
    """With a label weight the loss has a second part; records without a label have none."""
    without = distill(asked(finished_run, places, "classification"), tmp_path / "a", Told())
    weighed = asked(finished_run, places, "classification", label_weight=1.0)
    assert distill(weighed, tmp_path / "b", Told())["losses"][0] > without["losses"][0] + 0.1
    unlabelled = [{**row, "label": None} for row in weighed.job.rows]
    blind = replace(weighed, job=replace(weighed.job, rows=unlabelled))
    assert distill(blind, tmp_path / "c", Told())["losses"] == pytest.approx(without["losses"])


def test_general_text_holds_the_student(
    finished_run: Finished, places: dict[str, Path], tmp_path: Path
) -> None:
    """The more it is held, the less its perplexity on general text moves."""
    moved = []
    for weight in (0.0, 30.0):
        changes = {"general_source": str(places["public"]), "general_weight": weight, "steps": 20}
        want = asked(finished_run, places, "causal-lm", alpha=3.0, **changes)
        before, after = distill(want, tmp_path / str(weight), Told())["general"]
        moved.append(abs(after / before - 1))
    assert moved[1] < moved[0]


def test_bad_input_is_refused_with_a_remedy(
    finished_run: Finished, places: dict[str, Path], tmp_path: Path
) -> None:
    """Before a model is loaded, and each with what would work."""
    run = open_run(finished_run("causal-lm"))
    good = {"student": str(places["causal-lm"]), "source": str(places["public"])}
    with pytest.raises(ConfigError, match=r"distill.source: is missing; give public records"):
        prepare(run, settings(student=good["student"]))
    with pytest.raises(ConfigError, match=r"distill.student: is missing"):
        prepare(run, settings(source=good["source"]))
    with pytest.raises(ModelError, match="is the teacher's base"):
        prepare(run, settings(**{**good, "student": run.model.base}))
    with pytest.raises(ConfigError, match=r'distill.dtype: value "float16" would turn small gradients'):
        prepare(run, settings(**good, dtype="float16"))
    with pytest.raises(ConfigError, match="is for classes; for causal-lm use proxy-target"):
        prepare(run, settings(**good, method="log-confidence"))
    with pytest.raises(ConfigError, match='needs method="forward-kl"'):
        prepare(run, settings(**good, cached_samples=4, method="proxy-target"))
    with pytest.raises(DataError, match="private training split"):
        prepare(run, settings(**{**good, "source": run.data.source}, split="train"))
    with pytest.raises(ConfigError, match="cannot be distilled; classification, causal-lm"):
        prepare(open_run(finished_run("token-classification")), settings(**good))
    with pytest.raises(ConfigError, match="there is no teacher model"):
        prepare(replace(run, method="fedsa"), settings(**good))
    shutil.copytree(run.directory, tmp_path / "run")
    (tmp_path / "run" / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors cannot be read"):
        open_run(tmp_path / "run")
    (tmp_path / "empty.jsonl").write_text('{"other": "x"}\n')
    with pytest.raises(DataError, match=r"'text' is not a column of .*; it has other"):
        prepare(run, settings(**{**good, "source": str(tmp_path / "empty.jsonl")}))


def test_other_tokenizers_need_texts(
    finished_run: Finished, places: dict[str, Path], tmp_path: Path
) -> None:
    """A logit method is refused by name; texts are learned all the same."""
    other = student(tmp_path, "causal-lm")
    content = json.loads((other / "tokenizer.json").read_text())
    content["model"]["vocab"] = {
        (token if token.startswith("[") else f"{token}x"): number
        for token, number in content["model"]["vocab"].items()
    }
    (other / "tokenizer.json").write_text(json.dumps(content))
    run, values = open_run(finished_run("causal-lm")), {"student": str(other)}
    values["source"] = str(places["public"])
    with pytest.raises(ConfigError, match='different tokenizers; use method="sequence"'):
        prepare(run, settings(**values, method="forward-kl"))
    assert prepare(run, settings(**values)).job.settings.method == "sequence"


def test_public_records_that_hold_test_records(
    finished_run: Finished, places: dict[str, Path], tmp_path: Path
) -> None:
    """More than one in a hundred is refused; on demand such records are left out, and counted."""
    run = open_run(finished_run("causal-lm"))
    tests = Path(run.data.source) / "test.jsonl"
    lines = tests.read_text().splitlines()[:3] + places["public"].read_text().splitlines()
    (tmp_path / "mixed.jsonl").write_text("\n".join(lines) + "\n")
    values = {"student": str(places["causal-lm"]), "source": str(tmp_path / "mixed.jsonl")}
    with pytest.raises(DataError, match=r"3 of 30 test records \(10.0%\).*--drop-overlap"):
        prepare(run, settings(**values))
    found = prepare(run, settings(**values), drop_overlap=True)
    assert (found.overlap.found, found.overlap.dropped) == (3, 3)
    assert len(found.job.rows) == 24


def test_a_smaller_student_is_warned_of(
    finished_run: Finished, places: dict[str, Path], tmp_path: Path
) -> None:
    """It works, and the report says that it is an odd choice."""
    changes = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    small = student(tmp_path, "causal-lm", **changes)
    report = distill(
        asked(finished_run, {**places, "causal-lm": small}, "causal-lm", steps=1),
        tmp_path / "out",
        Told(),
    )
    assert "a smaller student can only lose" in report["warnings"][0]
    assert "**Warning:**" in (tmp_path / "out" / "distill.md").read_text()


def test_padded_rows_of_the_vocabulary_say_nothing(
    finished_run: Finished, places: dict[str, Path], tmp_path: Path
) -> None:
    """A student with rows that no token has learns the same training_set, and never their logits."""
    padded = student(tmp_path, "causal-lm", vocab_size=1744 + 64)
    want = asked(finished_run, {**places, "causal-lm": padded}, "causal-lm", steps=2)
    assert want.job.vocabulary == max(AutoTokenizer.from_pretrained(padded).get_vocab().values()) + 1
    report = distill(want, tmp_path / "out", Told())
    assert all(0 <= loss < 10 for loss in report["losses"])


def test_the_card_s_code_gives_the_students_figures(
    finished_run: Finished, places: dict[str, Path], tmp_path: Path
) -> None:
    """What the model card shows runs as it stands, and classifies as the report says."""
    want = asked(finished_run, places, "classification", steps=12)
    report = distill(want, tmp_path / "out", Told())
    code = (tmp_path / "out" / "adapter" / "README.md").read_text().split("```python\n")[1]
    code = code.split("```")[0].replace('"adapter"', f'"{tmp_path / "out" / "adapter"}"')
    code = code.replace('["…"]', "texts")
    texts = [row["text"] for row in want.tests]
    found: dict[str, Any] = {"texts": texts}
    exec(compile(code, "model card", "exec"), found)  # noqa: S102
    guessed = [found["labels"][number] for number in found["logits"].argmax(-1).tolist()]
    right = sum(guess == row["label"] for guess, row in zip(guessed, want.tests, strict=True))
    assert right / len(texts) == pytest.approx(report["metrics"]["student after"]["accuracy"])


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_a_small_footprint_learns_too(
    quantization: str, finished_run: Finished, places: dict[str, Path], tmp_path: Path
) -> None:
    """A student in 8 or 4 bits that recomputes its activations learns nearly what the whole one does."""
    whole = distill(asked(finished_run, places, "causal-lm", steps=18), tmp_path / "whole", Told())
    small = {"quantization": quantization, "gradient_checkpointing": True}
    report = distill(
        asked(finished_run, places, "causal-lm", steps=18, **small), tmp_path / "out", Told()
    )
    assert learned(report)
    before, after = (sum(each["losses"][-3:]) for each in (whole, report))
    assert after == pytest.approx(before, rel=0.4)
