"""The server's own work with the model, only on public data: describe, evaluate, export.

Plain functions, so that they run in the server's process or in one of its workers (the server's own
process then never imports torch).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedslm import layout
from fedslm.aggregation.methods import moving_keys
from fedslm.attestations import places_of_simulation
from fedslm.data import store
from fedslm.errors import DataError, ModelError
from fedslm.models import precision
from fedslm.models.initial import initial_state
from fedslm.models.label_head import label_head
from fedslm.models.loaded import LoadedModel
from fedslm.models.peft_export import save_plain
from fedslm.models.public_head import public_head
from fedslm.privacy.plan import PrivatePlan
from fedslm.privacy.verified import verified
from fedslm.protocol.loading import model_for, task_for
from fedslm.protocol.setup import Setup
from fedslm.records import AdapterState
from fedslm.storage import with_usual_modes
from fedslm.tasks.base import Example, Prepared
from fedslm.workers import Pool


@dataclass(frozen=True)
class Description:
    """What the server needs to know about the model.

    Attributes:
        moving: Initial tensors that rounds change.
        frozen: Tensors that no round changes at the server, shared by hash.
        base_sha256: Hash of the base model's files.
        dtype: Precision in which the base computes here.
        warning: What the operator should know about it; empty if there is nothing.
    """

    moving: AdapterState
    frozen: AdapterState
    base_sha256: str
    dtype: str
    warning: str


def describe(setup: Setup) -> Description:
    """Loads the model and creates the initial adapter.

    Raises:
        ModelError: The model or its LoRA targets are not usable, or the precision is float16.
        PrivacyError: The plan is private, and the base couples records, or the accountants disagree.
    """
    if setup.model.dtype == "float16":  # the config of an earlier version's run, resumed
        raise ModelError(f"model.dtype: {precision.NO_FLOAT16}")
    model, plan = model_for(setup), setup.plan
    if isinstance(plan, PrivatePlan):
        verified(plan, places_of_simulation(Path(setup.directory) / layout.NODES))
        from fedslm.training.checks import check_private_model

        check_private_model(model.adapter.network)
    shapes = {key: tuple(each.shape) for key, each in model.adapter.parameters.items()}
    state = initial_state(shapes, setup.seed)
    if setup.lora.initial == "eva":
        state = _from_public_inputs(setup, model, state)
    if setup.task.head != "random":
        state = label_head(model, setup.labels, setup.task.max_length, state)
    if setup.task.head == "public":
        state = public_head(model, task_for(setup), _public_examples(setup, model), state)
    moving = moving_keys(setup.method, state)
    return Description(
        moving=state.select(moving),
        frozen=state.select(set(state) - moving),
        base_sha256=model.base_sha256,
        dtype=str(model.dtype).removeprefix("torch."),
        warning=precision.warning(setup.model, model.device),
    )


def _from_public_inputs(setup: Setup, model: LoadedModel, state: AdapterState) -> AdapterState:
    """Initialises A from the main directions of each layer's inputs on the public records."""
    from fedslm.models.activations import eva_state, input_directions

    examples = _public_examples(setup, model)
    return eva_state(state, input_directions(model, task_for(setup), examples, setup.lora.rank))


def _public_examples(setup: Setup, model: LoadedModel) -> tuple[Example, ...]:
    """The public records that training may use."""
    rows = store.read_public(Path(setup.directory) / layout.DATA)
    return task_for(setup).prepare(rows, model.tokenizer).examples


def evaluate(pool: Pool, setup: Setup, adapter: AdapterState) -> dict[str, float]:
    """Metrics of a whole adapter on the public evaluation split, distributed over the workers.

    Raises:
        DataError: No record of the split yields tokens.
    """
    parts = max(1, pool.num_workers)
    counted = pool.map(count, [(setup, adapter, part, parts) for part in range(parts)])
    total: dict[str, NDArray[np.float64]] = {}
    for sums in counted:
        total = {name: total.get(name, 0.0) + value for name, value in sums.items()} or total
    if not total:
        raise DataError("no record of the public evaluation split gives tokens")
    return task_for(setup).metrics(total)


def count(setup: Setup, adapter: AdapterState, part: int, parts: int) -> dict[str, NDArray[np.float64]]:
    """Additive statistics of every ``parts``-th public example; empty if there is none."""
    from fedslm.training.evaluation import count as count_examples

    model = model_for(setup)
    examples = _public(setup).examples[part::parts]
    return count_examples(model, task_for(setup), examples, adapter, again=True)


def export(setup: Setup, adapter: AdapterState, directory: Path) -> None:
    """Writes a whole adapter as one ordinary PEFT LoRA adapter, together with the tokenizer."""
    model = model_for(setup)
    save_plain(model.adapter, adapter, setup.lora, directory)
    model.tokenizer.save_pretrained(directory)
    with_usual_modes(directory)


def truncated(setup: Setup) -> tuple[int, int]:
    """Number of public records that are longer than the task's lengths and are cut, and the total."""
    public = _public(setup)
    return public.truncated, len(public.examples)


@lru_cache(maxsize=1)
def _public(setup: Setup) -> Prepared:
    """The public examples, tokenised once per process."""
    model = model_for(setup)
    task = task_for(setup)
    rows = store.read_evaluation(Path(setup.directory) / layout.DATA)
    return task.prepare(rows, model.tokenizer)
