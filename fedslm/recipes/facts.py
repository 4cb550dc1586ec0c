"""What a recipe depends on: the base's kind and sizes, and about how many units a client has."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedslm.config import DataConfig, ModelConfig, PrivacyConfig, TaskConfig
from fedslm.data.federated import load_what_is_public
from fedslm.data.labels import read_file
from fedslm.data.layouts import laid_out
from fedslm.data.owners import owners_in
from fedslm.data.sources import load_train
from fedslm.errors import ModelError
from fedslm.models import families
from fedslm.models.base import resolve_config

_STEPS = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0, 10.0)
# The last linear layer of a layer, by architecture: what is below it is computed once for each record.
_LAST = {
    "bert": "{}.output.dense",
    "roberta": "{}.output.dense",
    "xlm-roberta": "{}.output.dense",
    "distilbert": "{}.ffn.lin2",
    "modernbert": "{}.mlp.Wo",
    "gpt2": "{}.mlp.c_proj",
    "phi": "{}.mlp.fc2",
    **dict.fromkeys(
        ("gemma", "gemma2", "gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3"),
        "{}.mlp.down_proj",
    ),
}


@dataclass(frozen=True)
class Base:
    """Facts of a base, from its ``config.json``.

    Attributes:
        width: Length of a hidden state.
        parameters: About how many parameters it has.
        last: Name of its last linear layer; "usual" if the architecture is not in the table.
        is_encoder: Whether it reads texts in both directions.
    """

    width: int
    parameters: int
    last: str
    is_encoder: bool


def base_of(model: ModelConfig) -> Base:
    """Reads the facts of a base; only ``config.json`` is read or downloaded.

    Raises:
        ModelError: There is no such base, or its ``config.json`` gives no sizes.
    """
    values = families.configuration(resolve_config(model))
    width = _size(values, "hidden_size", "d_model", "n_embd", "dim")
    layers = _size(values, "num_hidden_layers", "num_layers", "n_layer", "n_layers")
    last, known = _LAST.get(values["model_type"]), families.PROVED.get(values["model_type"])
    return Base(
        width,
        12 * layers * width**2 + _size(values, "vocab_size") * width,
        "usual" if last is None else last.format(layers - 1),
        known is not None and known.reads == "both ways",
    )


def _size(values: Mapping[str, Any], *names: str) -> int:
    """Returns the first of some sizes that a configuration has."""
    for name in names:
        found = values.get(name)
        if isinstance(found, int) and not isinstance(found, bool) and found > 0:
            return found
    raise ModelError(
        f"config.json of the base lacks {names[0]}, so no recipe can be chosen: set privacy.delta, "
        f"privacy.clip_norm and privacy.sample_rate"
    )


def num_classes(data: DataConfig, task: TaskConfig, seed: int) -> int:
    """Returns the number of classes, from the config or from the public split; 0 without classes.

    Raises:
        DataError: The public split, or the file with the names, cannot be read.
    """
    if task.labels:
        return len(task.labels)
    if task.labels_file is not None:
        return len(read_file(task.labels_file))
    return len(load_what_is_public(data, task, seed).labels)


def size_class(units: float) -> int:
    """Rounds a number of units to 1, 1.5, 2, 3, 5 or 7 times a power of ten, the nearest in ratio.

    A public figure that differs from the true number: one unit more or less changes it only where the
    number is next to the border of two classes.

    >>> [size_class(units) for units in (3, 48, 231, 999, 1000, 1510)]
    [3, 50, 200, 1000, 1000, 1500]
    """
    scale: float = 10.0 ** math.floor(math.log10(max(units, 1)))
    classes: list[float] = [step * scale for step in _STEPS]
    nearest: float = min(classes, key=lambda each: abs(math.log(each / units)))
    return round(nearest)


def simulated_units(
    data: DataConfig, task: TaskConfig, privacy: PrivacyConfig, *, num_clients: int, seed: int
) -> int:
    """Size class of the units that a simulated client trains on, by the mean over the clients.

    Args:
        data: The training split and how it is divided.
        task: The task.
        privacy: The unit.
        num_clients: Number of clients.
        seed: Seed of the demo data.

    Raises:
        DataError: The training split cannot be read.
    """
    data, task = laid_out(data, task, seed)
    natural, owner = data.partition == "natural", privacy.unit_column
    more = {"data.natural_column": data.natural_column} if natural else {}
    if privacy.unit == "user" and owner is not None:
        more["privacy.unit_column"] = owner
    rows = load_train(data, task, seed, more=more)
    owners: list[Any] = list(range(len(rows)))
    if privacy.unit == "user" and owner is not None:
        owners = owners_in(rows, owner)
    clients: list[Any] = list(rows[data.natural_column]) if natural else [0] * len(rows)
    pairs = {(client, one) for client, one in zip(clients, owners, strict=True) if client is not None}
    sizes = [size for _, size in Counter(client for client, _ in pairs).most_common(num_clients)]
    units = sum(sizes) / num_clients * (1 - data.validation_fraction)
    return size_class(max(units, 1))
