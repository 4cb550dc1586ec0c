"""Export a trained model from a run: as plain transformers files, or as a PEFT adapter."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedslm.config.tasks import TASKS
from fedslm.errors import ModelError, RunError, Unusable
from fedslm.inference.trained import FinishedRun
from fedslm.models.loaded import load
from fedslm.models.pooling import MeanPoolingClassifier
from fedslm.rendering import render
from fedslm.storage import with_usual_modes, write_text

if TYPE_CHECKING:
    from torch import nn

Precision = Literal["float32", "float16", "bfloat16"]
_PRIVACY = "## Privacy\n"
_NOT_OURS = ("_name_or_path", "id2label", "label2id", "problem_type")  # of the classifier, or a path
_OWN_CODE = "mean_pooling.py"


def export_adapter(run: FinishedRun, target: Path) -> None:
    """Copies the adapter as PEFT wrote it, with its tokenizer and model card.

    Args:
        run: A finished run.
        target: A directory that does not exist or is empty.

    Raises:
        RunError: The directory is not empty or cannot be written; nothing is left behind.
    """
    with _new_directory(target) as directory:
        shutil.copytree(run.adapter_directory, directory, dirs_exist_ok=True)


def export_merged(run: FinishedRun, target: Path, dtype: Precision) -> None:
    """Merges the adapter into the base model's weights and writes a plain transformers model.

    The adapter is added in float32 to the original base weights, even where training used rounded
    (``model.dtype``) or quantized (``model.quantization``) ones; the sum is then rounded once.

    Args:
        run: A finished run.
        target: A directory that does not exist or is empty.
        dtype: Precision of the files.

    Raises:
        ModelError: The base model is missing or a different one, or the run has no privacy statement.
        RunError: As :func:`export_adapter`.
    """
    import torch

    with _new_directory(target) as directory:
        run.check_base()
        statement = privacy_statement(run)
        network, tokenizer = _merged(run)
        network.to(getattr(torch, dtype)).save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        card = render(
            "exported_card.md.j2",
            run=run,
            report=run.report,
            dtype=dtype,
            trained_in=run.report.get("base_dtype", run.model.dtype),
            privacy=statement,
            auto_class=TASKS[run.task.name].auto_class,
            own_code=(directory / _OWN_CODE).exists(),
        )
        write_text(directory / "README.md", card)


def privacy_statement(run: FinishedRun) -> str:
    """Returns the privacy statement of the run's own model card, verbatim.

    Raises:
        ModelError: The card is missing or has no such statement.
    """
    path = run.adapter_directory / "README.md"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    _, found, rest = text.partition(_PRIVACY)
    statement = rest.split("\n## ")[0].strip()
    if not found or not statement:
        raise ModelError(
            f"{path} has no privacy statement, and no model is passed on without one; restore it"
        )
    return statement


@contextmanager
def _new_directory(target: Path) -> Iterator[Path]:
    """Yields a temporary directory; if the block succeeds, it becomes ``target``."""
    from safetensors import SafetensorError

    target = target.expanduser().absolute()
    temporary = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise Unusable(f"{target} exists and is not empty; choose another --out")
        temporary.mkdir(parents=True)
        yield temporary
        with_usual_modes(temporary)
        temporary.replace(target)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{target} cannot be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _merged(run: FinishedRun) -> tuple[Any, Any]:
    """Returns the base model with the adapter merged into its weights, and the tokenizer."""
    plain = {"quantization": "none", "dtype": "float32", "device": "cpu"}
    # Loads a new model: merging modifies it, and the cached one is shared within this process.
    loaded = load.__wrapped__(run.model.model_copy(update=plain), run.lora, run.task, len(run.labels))
    loaded.adapter.write(run.adapter)
    adapted: Any = loaded.adapter.network
    network: Any = adapted.merge_and_unload()
    if isinstance(network, MeanPoolingClassifier):
        network = _with_own_class(network, len(run.labels))
    if run.labels:
        network.config.id2label = dict(enumerate(run.labels))
        network.config.label2id = {label: number for number, label in enumerate(run.labels)}
    if TASKS[run.task.name].classes == "several":
        network.config.problem_type = "multi_label_classification"
    if hasattr(network.config, "use_cache"):
        network.config.use_cache = True  # training had disabled it
    return network, loaded.tokenizer


def _with_own_class(network: MeanPoolingClassifier, num_labels: int) -> nn.Module:
    """Returns the same layers in a class whose code is exported with the files."""
    import torch

    from fedslm.inference.mean_pooling import (
        Center,
        MeanPoolingConfig,
        MeanPoolingForSequenceClassification,
    )

    encoder: Any = network.encoder
    values = {k: value for k, value in encoder.config.to_dict().items() if k not in _NOT_OURS}
    config = MeanPoolingConfig(
        encoder=values,
        encoder_class=type(encoder).__name__,
        normalized=network.normalized,
        num_labels=num_labels,
        pad_token_id=encoder.config.pad_token_id,
    )
    with torch.device("meta"):
        exported = MeanPoolingForSequenceClassification(config)
    exported.encoder, exported.classifier = encoder, network.classifier
    if network.normalized:
        exported.center = Center(network.center.weight.shape[0])
        exported.center.load_state_dict(network.center.state_dict())
    return exported.eval()  # type: ignore[no-any-return]
