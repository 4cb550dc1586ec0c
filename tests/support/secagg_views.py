"""What is left of a masked vector for those who know some of its masks, and whether it is uniform."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from scipy import stats

from fedslm.secagg.keys import RoundSecrets, pair_mask_key, self_mask_key
from fedslm.secagg.masking import add_masks
from fedslm.secagg.messages import InputHead, SharesRequest, decode
from support.secagg import Federation, Vector

FALSE_ALARM = 1e-6


def p_value(vector: Vector) -> float:
    """Chi-square of all bytes and of the lowest bits against the uniform distribution; the lower p."""
    counts = np.bincount(vector.view(np.uint8), minlength=256)
    low = np.bincount(vector & np.uint32(15), minlength=16)
    return min(stats.chisquare(counts).pvalue, stats.chisquare(low).pvalue) * 2  # two tests


def is_uniform(vector: Vector) -> bool:
    """Whether a vector passes; a uniform one fails with a probability of at most 1e-6."""
    return p_value(vector) > FALSE_ALARM


def small_numbers(client: int, length: int) -> Vector:
    """A vector as it really is: small positive and negative numbers."""
    generator = np.random.default_rng(client)
    return generator.integers(-500, 500, length).astype(np.int32).view(np.uint32)


def secrets_of(federation: Federation, client: int) -> RoundSecrets:
    """A node's secrets, before it has unmasked."""
    attempt = federation.nodes[client].kept.read()
    assert attempt is not None
    assert attempt.secrets is not None
    return attempt.secrets


def without_masks(
    federation: Federation, owner: int, peers: Collection[int], *, with_self: bool
) -> Vector:
    """What is left of a node's masked vector for those who know its masks with some peers.

    Args:
        federation: All secrets are still on the nodes' disks.
        owner: The node.
        peers: Peers whose mask keys are known.
        with_self: Whether the node's seed is known, too.
    """
    keys = {each.client: each for each in decode(SharesRequest, federation.requests["shares"]).keys}
    context = decode(InputHead, federation.inputs[owner].head).context
    added: list[bytes] = []
    subtracted: list[bytes] = []
    for peer in peers:
        private = secrets_of(federation, peer).mask_key
        key = pair_mask_key(private, keys[owner].mask_key, context, (owner, peer))
        (added if owner < peer else subtracted).append(key)
    if with_self:
        added.append(self_mask_key(secrets_of(federation, owner).seed, context, owner))
    rest = federation.inputs[owner].vector.copy()
    add_masks(rest, plus=subtracted, minus=added)
    return rest
