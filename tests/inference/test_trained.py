"""Tests of opening finished runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.finished import KINDS

from fedslm.errors import ModelError
from fedslm.inference.trained import load_trained, open_run
from fedslm.models.base import resolve
from fedslm.storage import load_adapter, save_adapter
from fedslm.training.batches import forward

Finished = Callable[[str], Path]


@pytest.fixture
def copied(finished_run: Finished, tmp_path: Path) -> Path:
    """A copy of a finished run, to be spoilt."""
    return Path(shutil.copytree(finished_run("classification"), tmp_path / "copy"))


def change_report(run: Path, **values: Any) -> None:
    """Edits report.json."""
    file = run / "report.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def assert_refused(path: Path, *parts: str, **options: Any) -> None:
    """Opening and loading raises our error with these words in it."""
    with pytest.raises(ModelError) as caught:
        load_trained(open_run(path, **options))
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_finished_run_opens_as_what_it_was(kind: str, finished_run: Finished) -> None:
    """Settings, labels and the adapter are the run's own, and the model holds the adapter."""
    path = finished_run(kind)
    report = json.loads((path / "report.json").read_text())
    trained = load_trained(open_run(path))
    assert trained.run.labels == tuple(report["labels"]) == trained.task.labels
    assert trained.run.adapter.sha256() == report["adapter_sha256"]
    assert trained.model.adapter.read().sha256() == report["adapter_sha256"]
    assert trained.has_new_head == bool(report["labels"])
    assert not trained.model.adapter.network.training


@pytest.mark.parametrize(
    "values", [{"labels": 5}, {"adapter_lora": None}, {"fedslm_version": None}, {"plan": "none"}]
)
def test_a_report_with_values_of_another_kind_is_refused(copied: Path, values: dict[str, Any]) -> None:
    """What a run never wrote is named; it ends neither in a traceback nor in wrong advice."""
    change_report(copied, **values)
    assert_refused(copied, "report.json is damaged", *values)


def test_the_adapter_directory_stands_for_its_run(finished_run: Finished) -> None:
    """The directory that people pass around, as long as it lies in its run, opens the run."""
    path = finished_run("classification")
    by_adapter, by_run = open_run(path / "adapter"), open_run(path)
    assert by_adapter.directory == by_run.directory == path
    assert by_adapter.adapter.sha256() == by_run.adapter.sha256()


@pytest.mark.parametrize("kind", ["causal-lm", "gpt2", "instruction", "seq2seq"])
def test_a_language_model_starts_as_its_plain_base(kind: str, finished_run: Finished) -> None:
    """The starting adapter gives the same logits as no adapter at all."""
    trained = load_trained(open_run(finished_run(kind)))
    example = trained.task.made_up()
    with torch.inference_mode():
        tuned, _ = forward(trained.model, trained.task, [example])
        with trained.model.adapter.disabled():
            plain, _ = forward(trained.model, trained.task, [example])
        trained.model.adapter.write(trained.initial)
        started, _ = forward(trained.model, trained.task, [example])
    trained.model.adapter.write(trained.run.adapter)
    assert torch.equal(started, plain)
    assert not torch.allclose(tuned, plain, atol=1e-3)


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    """A path that is not there is named."""
    assert_refused(tmp_path / "no", "no: no such run directory")


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    """A directory without a report is no run."""
    assert_refused(tmp_path, "is not a run directory")


def test_an_adapter_without_its_run_is_refused(finished_run: Finished, tmp_path: Path) -> None:
    """An adapter that was copied away does not say what it was trained for."""
    path = shutil.copytree(finished_run("classification") / "adapter", tmp_path / "adapter")
    assert_refused(Path(path), "is not a run directory")


def test_an_unfinished_run_is_refused(copied: Path) -> None:
    """A run without a report is not finished; the error says how to go on."""
    (copied / "report.json").unlink()
    assert_refused(copied, "is not finished", f"--resume {copied}")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"fedslm_version": "0.1.0"}', "\udcff"])
def test_a_damaged_report_is_refused(copied: Path, text: str) -> None:
    """A report that cannot be read, or lacks what is needed, is named."""
    (copied / "report.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert_refused(copied, "report.json is damaged")


def test_another_version_is_refused(copied: Path) -> None:
    """A run of another minor version is not guessed at; a patch version is fine."""
    change_report(copied, fedslm_version="0.1.99")
    assert open_run(copied).report["fedslm_version"] == "0.1.99"
    change_report(copied, fedslm_version="7.2.0")
    assert_refused(copied, "written by fedslm 7.2.0", "fedslm==7.2.0")


def test_an_edited_config_is_refused(copied: Path) -> None:
    """The config must be the one that the run was made with."""
    file = copied / "config.json"
    file.write_text(file.read_text().replace('"max_length": 32', '"max_length": 31'))
    assert_refused(copied, "config.json was edited")


def test_another_adapter_is_refused(copied: Path) -> None:
    """Weights that the run did not write are refused: they may have no privacy statement."""
    file = copied / "adapter" / "adapter_model.safetensors"
    adapter = load_adapter(file)
    save_adapter(file, type(adapter)({key: value + 1 for key, value in adapter.tensors.items()}))
    assert_refused(copied, "is not what the run wrote")
    file.write_bytes(b"nonsense")
    assert_refused(copied, "cannot be read")


def test_another_base_is_refused(copied: Path, finished_run: Finished) -> None:
    """A base with another hash is refused, whatever it is called."""
    change_report(copied, base_sha256="0" * 64)
    assert_refused(copied, "trained on 000000000000", "--base")
    other = open_run(finished_run("native")).model.base
    assert_refused(finished_run("classification"), "the adapter fits only that base", base=other)


def test_a_base_that_was_moved_can_be_named(finished_run: Finished, tmp_path: Path) -> None:
    """The same files under another path are the same base; a path that is not there is named."""
    run = open_run(finished_run("native"))
    moved = shutil.copytree(resolve(run.model), tmp_path / "moved")
    trained = load_trained(open_run(finished_run("native"), base=str(moved)))
    assert trained.run.model.base == str(moved)
    assert_refused(finished_run("native"), "no such directory", base=str(tmp_path / "gone"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused(finished_run: Finished) -> None:
    """A run from a machine with a GPU says so on one without."""
    assert_refused(finished_run("classification"), "not on this machine", device="cuda")
