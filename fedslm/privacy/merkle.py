"""Merkle tree hashes over a ledger's lines, and proofs that a longer ledger extends a shorter one.

A server that remembers the size and the root of a node's ledger can check that the ledger has only
grown since, without seeing a line of it: lines name other federations' runs and commit to the data.

Formal guarantees (SHA-256 is collision-resistant):
    * :func:`extends` returns True only if the first ``old`` leaves of the tree with root ``new_root``
      are the leaves of the tree with root ``old_root``. In particular, nothing was removed or changed.
    * A proof reveals nothing but hashes of subtrees.

Edge cases: two trees of one size are either equal or do not extend each other, and the proof is empty.
Every tree extends the empty tree, with an empty proof.

References:
    RFC 9162, Certificate Transparency 2.0, sections 2.1.1 and 2.1.4.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

_LEAF, _NODE = b"\x00", b"\x01"  # without these, two concatenated hashes could pass for a leaf
MOST_SEEN = 8  # points of a ledger that a server may ask a node to extend
MOST_HASHES = 64  # a proof of a tree of at most 2^62 leaves is not longer


def root_of(leaves: Sequence[bytes]) -> bytes:
    """The root of the tree over ``leaves``, 32 bytes; without leaves, the hash of the empty string.

    >>> root_of([]).hex()[:16]
    'e3b0c44298fc1c14'
    """
    if not leaves:
        return hashlib.sha256().digest()
    level = [hashlib.sha256(_LEAF + leaf).digest() for leaf in leaves]
    while len(level) > 1:  # an odd one moves up unchanged: RFC 9162's split at a power of two
        paired = [_parent(level[at], level[at + 1]) for at in range(0, len(level) - 1, 2)]
        level = paired + level[len(paired) * 2 :]
    return level[0]


def consistency_proof(leaves: Sequence[bytes], old: int) -> list[bytes]:
    """Hashes that show that the tree over ``leaves`` extends the one over its first ``old`` leaves.

    Args:
        leaves: All leaves.
        old: Size of the older tree, in [0, len(leaves)].

    Returns:
        At most about 2 log2(len(leaves)) hashes of 32 bytes.

    Raises:
        ValueError: ``old`` is out of its range.
    """
    if not 0 <= old <= len(leaves):
        raise ValueError(f"old={old} must be in [0, {len(leaves)}]")
    return [] if old in (0, len(leaves)) else _subproof(leaves, old, is_whole=True)


def extends(old: tuple[int, bytes], new: tuple[int, bytes], proof: Sequence[bytes]) -> bool:
    """Whether a tree extends an older one.

    Args:
        old: Size and root of the older tree.
        new: Size and root of the newer one.
        proof: The result of :func:`consistency_proof`.
    """
    (old_size, old_root), (new_size, new_root) = old, new
    if not 0 <= old_size <= new_size or len(proof) > MOST_HASHES:
        return False
    if old_size == 0:
        return not proof
    if old_size == new_size:
        return not proof and old_root == new_root
    if any(len(each) != hashlib.sha256().digest_size for each in proof):
        return False
    path = [old_root, *proof] if old_size & (old_size - 1) == 0 else list(proof)
    return _is_proved(path, old, new)


def _is_proved(path: list[bytes], old: tuple[int, bytes], new: tuple[int, bytes]) -> bool:
    """RFC 9162, 2.1.4.2: both roots are computed from one path of hashes.

    The subtrees that make up the old root are then subtrees of the new one, in the same places. Other
    leaves under the same hashes would be a collision of SHA-256.
    """
    at, last = old[0] - 1, new[0] - 1
    while at & 1:
        at, last = at >> 1, last >> 1
    if not path:
        return False
    small = large = path[0]
    for each in path[1:]:
        if last == 0:
            return False
        if at & 1 or at == last:
            small, large = _parent(each, small), _parent(each, large)
            while at and not at & 1:
                at, last = at >> 1, last >> 1
        else:
            large = _parent(large, each)
        at, last = at >> 1, last >> 1
    return last == 0 and small == old[1] and large == new[1]


def _subproof(leaves: Sequence[bytes], old: int, *, is_whole: bool) -> list[bytes]:
    """RFC 9162, 2.1.4.1: SUBPROOF(m, D_n, b)."""
    if old == len(leaves):
        return [] if is_whole else [root_of(leaves)]
    split = 1 << (len(leaves) - 1).bit_length() - 1  # the largest power of two below the size
    left, right = leaves[:split], leaves[split:]
    if old <= split:
        return [*_subproof(left, old, is_whole=is_whole), root_of(right)]
    return [*_subproof(right, old - split, is_whole=False), root_of(left)]


def _parent(left: bytes, right: bytes) -> bytes:
    """Hash of an inner node."""
    return hashlib.sha256(_NODE + left + right).digest()
