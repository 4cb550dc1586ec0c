"""Open a finished run: its settings, its report, and its model with the adapter."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import UnionType
from typing import Any

import fedslm
from fedslm import layout
from fedslm.config import (
    DataConfig,
    DistillConfig,
    LoraConfig,
    ModelConfig,
    TaskConfig,
    TrainingConfig,
)
from fedslm.data import store
from fedslm.errors import DataError, ModelError, RunError
from fedslm.federation.checkpoint import RunDirectory
from fedslm.models.base import base_sha256, resolve
from fedslm.models.initial import initial_state
from fedslm.models.label_head import label_head
from fedslm.models.loaded import LoadedModel, load
from fedslm.models.public_head import public_head
from fedslm.records import AdapterState
from fedslm.storage import load_adapter
from fedslm.tasks import build
from fedslm.tasks.base import Task

OnProgress = Callable[[int, int], None]  # (done, total)
_KEPT: dict[str, type | UnionType] = {  # fields that a report must contain
    "fedslm_version": str,
    "base_sha256": str,
    "adapter_sha256": str,
    "adapter_lora": dict,
    "labels": list,
    "plan": dict | None,
    "metrics_after": dict,
}


@dataclass(frozen=True)
class TunedModel:
    """A federated model that is not loaded yet: a finished run, or a run between rounds.

    Attributes:
        directory: The run directory, absolute.
        model: The base model.
        lora: The adapter's settings.
        data: Names of the columns, and the source of the run's data.
        task: The learning task.
        seed: The run's seed, which determined the starting adapter.
        adapter: The trained adapter with all its tensors.
        labels: Class names in the order of the logits; empty if the task has none.
        base_sha256: Hash of the files of the base model on which the adapter was trained.
        method: Aggregation method; empty if a report of an older version does not contain it.
    """

    directory: Path
    model: ModelConfig
    lora: LoraConfig
    data: DataConfig
    task: TaskConfig
    seed: int
    adapter: AdapterState
    labels: tuple[str, ...]
    base_sha256: str
    method: str

    def check_base(self) -> None:
        """Refuses a base model whose files differ from the one used for training.

        Raises:
            ModelError: The base is missing, or its hash differs.
        """
        found, expected = base_sha256(resolve(self.model)), self.base_sha256
        if found != expected:
            raise ModelError(
                f"model.base={self.model.base!r} has sha256 {found[:12]}, but {self.directory} was "
                f"trained on {expected[:12]}: the adapter fits only that base; give it with --base"
            )


@dataclass(frozen=True)
class FinishedRun(TunedModel):
    """A finished run as it is stored on disk; nothing is loaded yet.

    Attributes:
        report: Content of ``report.json``.
        training: Training settings of the clients.
        distill: The ``[distill]`` section of the run.
    """

    report: dict[str, Any]
    training: TrainingConfig
    distill: DistillConfig

    @property
    def adapter_directory(self) -> Path:
        """Directory of PEFT's files, the tokenizer and the model card."""
        return self.directory / layout.ADAPTER


@dataclass(frozen=True)
class Trained:
    """The model of a run, ready for use.

    Attributes:
        run: The run that trained it.
        model: The base model with the trained adapter.
        task: The learning task.
    """

    run: TunedModel
    model: LoadedModel
    task: Task

    @cached_property
    def initial(self) -> AdapterState:
        """The run's starting adapter: behaves as the base; a new head as ``task.head`` says.

        Raises:
            DataError: The head started from public records, which were deleted.
        """
        state, task = initial_state(self.run.adapter.shapes, self.run.seed), self.run.task
        if task.head == "random":
            return state
        rows = store.read_public(self.run.directory / layout.DATA)
        if task.head == "public" and not rows:
            raise DataError(
                f"{self.run.directory}/data/public.parquet is not there any more: with "
                f'task.head="public" the base starts from these public records; put the file back, or '
                f"use predict and export, which do not need it"
            )
        state = label_head(self.model, self.run.labels, task.max_length, state)
        if task.head == "labels":
            return state
        examples = self.task.prepare(rows, self.model.tokenizer).examples
        return public_head(self.model, self.task, examples, state)

    @property
    def has_new_head(self) -> bool:
        """True if a classifier was trained in addition to the LoRA factors."""
        return any(".lora_" not in key for key in self.run.adapter)


def open_run(path: Path, *, base: str | None = None, device: str | None = None) -> FinishedRun:
    """Reads a finished run.

    Args:
        path: The run directory, or the adapter directory inside it.
        base: Current location of the base model; None: the location used in training.
        device: Device to compute on, as ``model.device``; None: as in training.

    Raises:
        ModelError: There is no finished run of this version of fedslm, or its files were modified.
    """
    path = path.expanduser().absolute()
    if not path.is_dir():
        raise ModelError(f"{path}: no such run directory")
    if (path / "adapter_config.json").exists() and (path.parent / layout.CONFIG_JSON).exists():
        path = path.parent
    report = _report(path)
    try:
        _, config = RunDirectory.open(path)
    except RunError as error:
        raise ModelError(str(error)) from error
    moved = {"base": base, "device": device, "gradient_checkpointing": False}
    changes = {key: value for key, value in moved.items() if value is not None}
    return FinishedRun(
        directory=path,
        model=config.model.model_copy(update=changes),
        lora=config.lora.model_copy(update=report["adapter_lora"]),
        data=config.data,
        task=config.task,
        seed=config.run.seed,
        adapter=_adapter(path, report),
        labels=tuple(report["labels"]),
        base_sha256=report["base_sha256"],
        method=str(report.get("aggregation", "")),
        report=report,
        training=config.training,
        distill=config.distill,
    )


def load_trained(run: TunedModel) -> Trained:
    """Loads the base model of a run with the trained adapter.

    Raises:
        ModelError: The base model is missing, is a different one, or cannot be loaded.
    """
    run.check_base()
    return _trained(run, load(run.model, run.lora, run.task, len(run.labels)))


def load_separately(run: TunedModel) -> Trained:
    """Loads the base model of a run with the trained adapter, in memory that no other run shares.

    Raises:
        ModelError: As :func:`load_trained`.
    """
    run.check_base()
    return _trained(run, load.__wrapped__(run.model, run.lora, run.task, len(run.labels)))


def _trained(run: TunedModel, model: LoadedModel) -> Trained:
    """Writes a run's adapter into a model."""
    model.adapter.write(run.adapter)
    model.adapter.network.eval()
    return Trained(run, model, build(run.task, run.data, run.labels))


@contextmanager
def computing(model: LoadedModel) -> Iterator[None]:
    """Disables gradients and uses the precision of training: a half-precision base computes in it."""
    import torch

    mixed = model.dtype != torch.float32
    with torch.inference_mode(), torch.autocast(model.device.type, model.dtype, enabled=mixed):
        yield


def _report(path: Path) -> dict[str, Any]:
    """Reads ``report.json``, which the last step of a run writes."""
    file = path / layout.REPORT
    if not file.exists():
        if (path / layout.CONFIG_JSON).exists() and not (path / "adapter_config.json").exists():
            raise ModelError(
                f"{path} is not finished: it has no report.json; continue it with "
                f"fedslm simulate --resume {path}"
            )
        raise ModelError(f"{path} is not a run directory: it has no report.json")
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} is damaged: {error}") from error
    held = report if isinstance(report, dict) else {}
    wrong = [key for key, kind in _KEPT.items() if key not in held or not isinstance(held[key], kind)]
    if wrong:
        raise ModelError(
            f"{file} is damaged: {', '.join(wrong)} must be as the run wrote it; restore it"
        )
    version = held["fedslm_version"]
    if version.split(".")[:2] != fedslm.__version__.split(".")[:2]:
        raise ModelError(
            f"{path} was written by fedslm {version}, and this is {fedslm.__version__}; "
            f"install fedslm=={version}, or train again"
        )
    return held


def _adapter(path: Path, report: dict[str, Any]) -> AdapterState:
    """Reads the trained adapter and checks it against the report's hash."""
    file = path / layout.ADAPTER / layout.ADAPTER_WEIGHTS
    try:
        adapter = load_adapter(file)
    except RunError as error:
        raise ModelError(str(error)) from error
    if adapter.sha256() != report["adapter_sha256"]:
        raise ModelError(
            f"{file} is not what the run wrote: sha256 {adapter.sha256()[:12]}, in report.json "
            f"{report['adapter_sha256'][:12]}; restore it"
        )
    return adapter
