"""The server's view of one masked vector is uniform, also for those who know all masks but one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from support.secagg import Federation, Vector

from fedslm.secagg import node as node_module
from fedslm.secagg.keys import pair_mask_key, self_mask_key
from fedslm.secagg.masking import add_masks
from fedslm.secagg.messages import InputHead, SharesRequest, decode

LENGTH = 100_000
FALSE_ALARM = 1e-6


def p_value(vector: Vector) -> float:
    """Chi-square of all bytes and of the lowest bits against the uniform distribution; the lower p."""
    counts = np.bincount(vector.view(np.uint8), minlength=256)
    low = np.bincount(vector & np.uint32(15), minlength=16)
    return min(stats.chisquare(counts).pvalue, stats.chisquare(low).pvalue) * 2  # two tests


def is_uniform(vector: Vector) -> bool:
    """Whether a vector passes; a uniform one fails with a probability of at most 1e-6."""
    return p_value(vector) > FALSE_ALARM


def small_numbers(client: int) -> Vector:
    """A vector as it really is: small positive and negative numbers."""
    generator = np.random.default_rng(client)
    return generator.integers(-500, 500, LENGTH).astype(np.int32).view(np.uint32)


def known_masks(
    federation: Federation, owner: int, knowing: list[int]
) -> tuple[list[bytes], list[bytes]]:
    """Keys of the masks between a node and some others, by what these others have: (plus, minus)."""
    keys = {each.client: each for each in decode(SharesRequest, federation.requests["shares"]).keys}
    context = decode(InputHead, federation.inputs[owner].head).context
    plus, minus = [], []
    for peer in knowing:
        secrets = federation.nodes[peer].kept.read().secrets  # type: ignore[union-attr]
        assert secrets is not None
        key = pair_mask_key(secrets.mask_key, keys[owner].mask_key, context, (owner, peer))
        (plus if owner < peer else minus).append(key)
    return plus, minus


def own_mask(federation: Federation, owner: int) -> bytes:
    """The key of a node's self mask: what t shares reveal."""
    secrets = federation.nodes[owner].kept.read().secrets  # type: ignore[union-attr]
    assert secrets is not None
    return self_mask_key(secrets.seed, decode(InputHead, federation.inputs[owner].head).context, owner)


def views(federation: Federation) -> dict[str, Vector]:
    """What is left of node 1's masked vector for those who know more and more."""
    federation.input({client: small_numbers(client) for client in federation.nodes})
    sent = federation.inputs[1].vector
    found = {"the server": sent}
    for name, peers, with_self in [
        ("the server with nodes 0 and 2 before unmasking", [0, 2], False),
        ("the server with all other nodes before unmasking", [0, 2, 3], False),
        ("the server with nodes 0 and 2 after unmasking", [0, 2], True),
    ]:
        rest = sent.copy()
        plus, minus = known_masks(federation, 1, peers)
        add_masks(rest, plus=minus, minus=plus)
        if with_self:
            add_masks(rest, minus=[own_mask(federation, 1)])
        found[name] = rest
    return found


def test_one_masked_vector_is_uniform(tmp_path: Path) -> None:
    """Whoever knows all masks but one sees uniform numbers; who knows all of them sees the vector."""
    federation = Federation(tmp_path, 4, LENGTH)
    federation.until("input")
    for name, vector in views(federation).items():
        assert is_uniform(vector), name
    rest = federation.inputs[1].vector.copy()
    plus, minus = known_masks(federation, 1, [0, 2, 3])
    add_masks(rest, plus=minus, minus=[*plus, own_mask(federation, 1)])
    assert rest.tolist() == small_numbers(1).tolist()
    assert not is_uniform(rest)


@pytest.mark.parametrize("left_out", ["self mask", "mask with an honest peer"])
def test_the_test_notices_a_missing_mask(
    left_out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Power: a node that leaves out one mask fails the same test, in the view that needs this mask."""
    federation = Federation(tmp_path, 4, LENGTH)
    federation.until("input")
    broken = (left_out == "self mask", left_out != "self mask")

    def without_one(vector: Vector, plus: list[bytes], minus: list[bytes]) -> None:
        if len(plus) == 3:  # node 1: itself, 2 and 3; it subtracts that of 0
            plus = plus[1:] if broken[0] else plus[:-1]
        add_masks(vector, plus, minus)

    monkeypatch.setattr(node_module, "add_masks", without_one)
    found = views(federation)
    uniform = {name: is_uniform(vector) for name, vector in found.items()}
    assert uniform["the server"]  # three masks are left
    if broken[0]:
        assert not uniform["the server with all other nodes before unmasking"]
    else:
        assert not uniform["the server with nodes 0 and 2 after unmasking"]


@pytest.mark.parametrize("span", [2, 16, 250])
def test_the_test_has_power(span: int) -> None:
    """A vector that never takes the highest values, in bytes or in low bits, fails."""
    generator = np.random.default_rng(1)
    values = generator.integers(0, 1 << 32, LENGTH, np.uint32)
    narrow = (values.view(np.uint8) % np.uint8(span)).view(np.uint32)
    assert not is_uniform(narrow)
    assert is_uniform(values)
