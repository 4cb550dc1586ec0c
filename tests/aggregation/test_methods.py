"""Tests of what each method trains, sends and keeps."""

from __future__ import annotations

import pytest

from fedslm.aggregation.methods import (
    METHODS,
    kind_of,
    method_of,
    moving_keys,
    rank_of_client,
    sent_keys,
    trained_keys,
)
from fedslm.config import AggregationConfig, LoraConfig

A, B, R, HEAD = (f"layer.{name}.weight" for name in ("lora_A", "lora_B", "lora_R", "score"))
DELTA = ("layer.delta_A.weight", "layer.delta_B.weight")
KEYS = (A, B, HEAD, *DELTA)
# Written down from the papers, apart from the table that the program reads.
TRAINED = {
    "fedit": ({A, B, HEAD}, {A, B, HEAD}),
    "ffa": ({B, HEAD}, {B, HEAD}),
    "rolora": ({B, HEAD}, {A, HEAD}),
    "fedrot": ({A, B, HEAD}, {A, B, HEAD}),
    "fedsa": ({A, B, HEAD}, {A, B, HEAD}),
    "fed-sb": ({R, HEAD}, {R, HEAD}),
    "stack": ({A, B, HEAD}, {A, B, HEAD}),
    "flexlora": ({A, B, HEAD}, {A, B, HEAD}),
    "fedex": ({A, B, HEAD}, {A, B, HEAD}),
    "flora": ({A, B, HEAD}, {A, B, HEAD}),
    "hetlora": ({A, B, HEAD}, {A, B, HEAD}),
    "head": ({HEAD}, {HEAD}),
}


def keys_of(name: str) -> tuple[str, ...]:
    """The keys that an adapter of a method has."""
    return (*KEYS, R) if name == "fed-sb" else KEYS


def test_every_method_is_here() -> None:
    """The table below is complete."""
    assert set(TRAINED) == set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_what_a_method_trains(name: str) -> None:
    """On odd and even turns exactly what the papers say; what was put aside is never trained."""
    for turn, expected in enumerate(TRAINED[name] * 2, start=1):
        assert trained_keys(name, keys_of(name), turn) == expected


@pytest.mark.parametrize("name", METHODS)
def test_what_a_method_sends(name: str) -> None:
    """All that is trained; FedSA keeps B and the head, and the server's adapter has no B that moves."""
    for turn in (1, 2):
        sent = sent_keys(name, keys_of(name), turn)
        assert sent == ({A} if name == "fedsa" else TRAINED[name][turn - 1])
    both = sent_keys(name, keys_of(name), 1) | sent_keys(name, keys_of(name), 2)
    assert moving_keys(name, keys_of(name)) == both


def test_b_goes_first() -> None:
    """As long as B is zero A has no gradient: a method that alternates starts with B."""
    assert B in trained_keys("rolora", KEYS, 1)
    assert A not in trained_keys("rolora", KEYS, 1)


@pytest.mark.parametrize("name", METHODS)
def test_updates_are_compared_with_their_own_kind(name: str) -> None:
    """Two turns have one kind exactly if they train the same parts."""
    same = trained_keys(name, keys_of(name), 1) == trained_keys(name, keys_of(name), 2)
    assert (kind_of(name, 1) == kind_of(name, 2)) == same
    assert kind_of(name, 1) == kind_of(name, 3)


def test_an_unresolved_method_is_an_error() -> None:
    """Nothing is trained under "auto"."""
    with pytest.raises(ValueError, match="resolved"):
        method_of(AggregationConfig())
    assert method_of(AggregationConfig(method="ffa")) == "ffa"


def test_a_misspelt_method_is_refused() -> None:
    """A method that is not there is an error that lists those that are, never another method."""
    with pytest.raises(ValueError, match="flexlora"):
        AggregationConfig(method="flexlorra")  # type: ignore[arg-type]


def test_ranks_are_dealt_out_in_turn() -> None:
    """Client k holds the k-th rank of the list, which starts over; without a list the server's."""
    lora = LoraConfig(rank=8, client_ranks=(2, 4, 8))
    assert [rank_of_client(lora, client) for client in range(5)] == [2, 4, 8, 2, 4]
    assert rank_of_client(LoraConfig(rank=8), 3) == 8
