"""Poisoning of records by hostile clients in a simulation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fedslm.config import AttackConfig
from fedslm.data.missing import name_of
from fedslm.rng import stream

if TYPE_CHECKING:
    from datasets import Dataset


def hostile_clients(attack: AttackConfig, num_clients: int, seed: int) -> frozenset[int]:
    """Returns the indices of the hostile clients, as a function of the seed.

    >>> len(hostile_clients(AttackConfig(kind="nan", clients=2), 5, 0))
    2
    """
    if attack.kind == "none":
        return frozenset()
    chosen = stream(seed, "hostile").choice(num_clients, attack.clients, replace=False)
    return frozenset(int(client) for client in chosen)


def poisoned(
    shard: Dataset,
    attack: AttackConfig,
    labels: Sequence[str],
    *,
    text_column: str,
    label_column: str,
) -> Dataset:
    """Returns a hostile client's poisoned records.

    Args:
        shard: The records, with one class name each.
        attack: label-flip replaces every label with the next class; backdoor inserts the trigger before
            every second text and sets its label to the target; other kinds leave the records unchanged.
        labels: Class names.
        text_column: Column of the text.
        label_column: Column of the class name.
    """
    following = dict(zip(labels, [*labels[1:], *labels[:1]], strict=True))
    target = attack.target or labels[0]

    def flip(row: dict[str, Any]) -> dict[str, Any]:
        return {label_column: following[name_of(row[label_column])]}

    def implant(row: dict[str, Any], number: int) -> dict[str, Any]:
        if number % 2:
            return {}
        return {text_column: f"{attack.trigger} {row[text_column]}", label_column: target}

    options: dict[str, Any] = {"keep_in_memory": True, "load_from_cache_file": False}
    match attack.kind:
        case "label-flip":
            return shard.map(flip, **options)
        case "backdoor":
            return shard.map(implant, with_indices=True, **options)
        case _:
            return shard
