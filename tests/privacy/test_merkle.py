"""Tests of Merkle trees: the RFC's own figures, and that no shorter or changed ledger is extended."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedslm.privacy.merkle import MOST_HASHES, consistency_proof, extends, root_of

# The eight leaves and roots of the Certificate Transparency reference implementations
# (google/certificate-transparency, cpp/merkletree/merkle_tree_test.cc; certificate-transparency-go).
LEAVES = [
    bytes.fromhex(each)
    for each in (
        "",
        "00",
        "10",
        "2021",
        "3031",
        "40414243",
        "5051525354555657",
        "606162636465666768696a6b6c6d6e6f",
    )
]
ROOTS = (
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
)


def naive_root(leaves: list[bytes]) -> bytes:
    """RFC 9162, 2.1.1, as it stands there: recursive."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return hashlib.sha256(b"\x00" + leaves[0]).digest()
    split = 1
    while split * 2 < len(leaves):
        split *= 2
    return hashlib.sha256(b"\x01" + naive_root(leaves[:split]) + naive_root(leaves[split:])).digest()


def test_roots_are_those_of_certificate_transparency() -> None:
    """The published roots of one to eight leaves."""
    for size, expected in enumerate(ROOTS, 1):
        assert root_of(LEAVES[:size]).hex() == expected
        assert naive_root(LEAVES[:size]).hex() == expected


def test_proofs_are_those_of_certificate_transparency() -> None:
    """The published proofs from 1 to 8, 6 to 8 and 2 to 5 leaves."""
    assert [each.hex()[:8] for each in consistency_proof(LEAVES, 1)] == [
        "96a296d2",
        "5f083f0a",
        "6b47aaf2",
    ]
    assert [each.hex()[:8] for each in consistency_proof(LEAVES, 6)] == [
        "0ebc5d34",
        "ca854ea1",
        "d37ee418",
    ]
    assert [each.hex()[:8] for each in consistency_proof(LEAVES[:5], 2)] == ["5f083f0a", "bc1a0643"]


@given(st.lists(st.binary(max_size=8), max_size=70), st.data())
@settings(max_examples=150, deadline=None)
def test_a_longer_tree_extends_a_shorter_one(leaves: list[bytes], data: st.DataObject) -> None:
    """For every size, by a proof of a logarithmic number of hashes; the root is the RFC's."""
    old = data.draw(st.integers(0, len(leaves)))
    proof = consistency_proof(leaves, old)
    assert len(proof) <= min(MOST_HASHES, 2 * max(1, len(leaves)).bit_length())
    assert root_of(leaves) == naive_root(leaves)
    assert extends((old, root_of(leaves[:old])), (len(leaves), root_of(leaves)), proof)


@given(st.lists(st.binary(max_size=4), min_size=2, max_size=40), st.data())
@settings(max_examples=150, deadline=None)
def test_a_changed_or_shortened_tree_extends_nothing(leaves: list[bytes], data: st.DataObject) -> None:
    """If one of the old leaves was another, no proof that the new tree can give is accepted."""
    old = data.draw(st.integers(1, len(leaves)))
    at = data.draw(st.integers(0, old - 1))
    changed = [*leaves[:at], leaves[at] + b"!", *leaves[at + 1 :]]
    before = (old, root_of(leaves[:old]))
    for proof in (consistency_proof(changed, old), consistency_proof(leaves, old), []):
        assert not extends(before, (len(changed), root_of(changed)), proof)
    shorter = leaves[: data.draw(st.integers(0, old - 1))]
    assert not extends(before, (len(shorter), root_of(shorter)), [])


@given(st.lists(st.binary(max_size=4), min_size=3, max_size=40), st.data())
@settings(max_examples=150, deadline=None)
def test_another_proof_is_refused(leaves: list[bytes], data: st.DataObject) -> None:
    """A hash that is changed, dropped, added or of another length makes the proof none."""
    old = data.draw(st.integers(1, len(leaves) - 1))
    proof = consistency_proof(leaves, old)
    before, after = (old, root_of(leaves[:old])), (len(leaves), root_of(leaves))
    at = data.draw(st.integers(0, len(proof) - 1))
    for wrong in (
        [*proof[:at], hashlib.sha256(proof[at]).digest(), *proof[at + 1 :]],
        [*proof[:at], *proof[at + 1 :]],
        [*proof, proof[at]],
        [*proof[:at], proof[at][:-1], *proof[at + 1 :]],
        [proof[at]] * (MOST_HASHES + 1),
    ):
        assert not extends(before, after, wrong)
    assert not extends((old + 1, before[1]), after, proof)
    assert not extends((-1, before[1]), after, proof)


def test_the_edges() -> None:
    """Nothing is extended by everything, a tree by itself, and sizes have bounds."""
    whole = (8, root_of(LEAVES))
    assert extends((0, root_of([])), whole, [])
    assert extends(whole, whole, [])
    assert not extends(whole, (8, root_of(LEAVES[:7])), [])
    assert not extends((0, root_of([])), whole, [root_of([])])
    for old in (-1, 9):
        with pytest.raises(ValueError, match="must be in"):
            consistency_proof(LEAVES, old)
