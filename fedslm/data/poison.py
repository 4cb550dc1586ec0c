"""What hostile clients of a simulation do to their own records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fedslm.config import AttackConfig
from fedslm.data.missing import name_of
from fedslm.rng import stream

if TYPE_CHECKING:
    from datasets import Dataset


def hostile_clients(attack: AttackConfig, num_clients: int, seed: int) -> frozenset[int]:
    """Who is hostile: a function of the seed.

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
    """A hostile client's records.

    Args:
        shard: One class name for each record.
        attack: label-flip gives every record the next class; backdoor puts the trigger before every
            second text and gives it the target; anything else leaves the records alone.
        labels: Class names.
        text_column: Column with the text.
        label_column: Column with the class name.
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
