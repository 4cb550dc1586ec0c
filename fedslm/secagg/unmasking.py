"""From shares to the sum: reconstructs the nodes' secrets and removes what masks are left."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedslm.errors import FederationError
from fedslm.secagg.cohort import Cohort
from fedslm.secagg.keys import commitment, pair_mask_key, public_of, self_mask_key
from fedslm.secagg.masking import add_masks
from fedslm.secagg.messages import PublicKeys, Unmask
from fedslm.secagg.shamir import Interpolation


class Misfit(NamedTuple):
    """A share that did not fit: the node that made it, or the one that gave it, is at fault.

    Attributes:
        owner: The node whose secret was shared.
        holder: The node that held the share.
    """

    owner: int
    holder: int


class Reconstruction:
    """The secrets of one attempt, from the shares that nodes gave.

    Every secret is compared with what its owner signed: a wrong one is never used.

    Args:
        cohort: The cohort of the attempt.
        keys: Each node's signed keys.
        opened: Each holder's shares.

    Attributes:
        misfits: Shares that did not fit so far.
    """

    def __init__(
        self, cohort: Cohort, keys: Mapping[int, PublicKeys], opened: Mapping[int, Unmask]
    ) -> None:
        self.misfits: set[Misfit] = set()
        self._cohort = cohort
        self._keys = keys
        self._opened = opened
        self._interpolations: dict[tuple[int, ...], Interpolation] = {}

    def seed(self, owner: int) -> bytes:
        """A survivor's seed.

        Raises:
            FederationError: Its shares are too few, or too many are wrong.
        """
        shares = {who: each.seeds[owner] for who, each in self._opened.items() if owner in each.seeds}
        committed = self._keys[owner].commitment
        secret = self._secret(
            owner, shares, lambda found: commitment(found, self._cohort, owner) == committed
        )
        if secret is None:
            raise self._failed(owner, "seed", shares)
        return secret

    def mask_key(self, owner: int) -> bytes:
        """The private mask key of a node that dropped out.

        Raises:
            FederationError: Its shares are too few, or too many are wrong.
        """
        shares = {
            who: each.mask_keys[owner] for who, each in self._opened.items() if owner in each.mask_keys
        }
        public = self._keys[owner].mask_key
        secret = self._secret(owner, shares, lambda found: public_of(found) == public)
        if secret is None:
            raise self._failed(owner, "mask key", shares)
        return secret

    def _secret(
        self, owner: int, given: Mapping[int, str], is_right: Callable[[bytes], bool]
    ) -> bytes | None:
        """One secret; None if it cannot be reconstructed. Names the shares that do not fit.

        Holders of earlier misfits are left out first: finding the wrong shares takes seconds in a large
        cohort, and a hostile holder could ask for it once for each secret.
        """
        suspects = {misfit.holder for misfit in self.misfits}
        for holders in (sorted(given.keys() - suspects), sorted(given)):
            if len(holders) >= self._cohort.threshold:
                shares = [bytes.fromhex(given[holder]) for holder in holders]
                interpolation = self._interpolation(tuple(map(self._cohort.point, holders)))
                secret = interpolation.secret(shares)
                if secret is not None and is_right(secret):
                    return secret
        if len(given) <= self._cohort.threshold:
            return None
        found = interpolation.corrected(shares)  # of all holders, the last that were tried
        if found is None or not is_right(found[0]):
            return None
        self.misfits |= {Misfit(owner, self._cohort.clients[point - 1]) for point in found[1]}
        return found[0]

    def _interpolation(self, points: tuple[int, ...]) -> Interpolation:
        """The interpolation at some points; most secrets have the same."""
        if points not in self._interpolations:
            self._interpolations[points] = Interpolation(points, self._cohort.threshold)
        return self._interpolations[points]

    def _failed(self, owner: int, what: str, shares: Mapping[int, str]) -> FederationError:
        """The error of a secret that cannot be reconstructed."""
        return FederationError(
            f"the {what} of client={owner} cannot be reconstructed from {len(shares)} shares "
            f"(threshold {self._cohort.threshold}): this client, or holders of its shares, gave wrong "
            f"ones. The attempt ends without a sum; begin another without client={owner}"
        )


def remove_masks(
    total: NDArray[np.uint32],
    seeds: Mapping[int, bytes],
    mask_keys: Mapping[int, bytes],
    keys: Mapping[int, PublicKeys],
    context: str,
) -> None:
    """Removes all masks that are left in the sum of the survivors' masked vectors, in place.

    Args:
        total: The sum modulo 2^32.
        seeds: Survivor to its seed.
        mask_keys: Dropped node to its private mask key; survivors hold masks for it that nothing
            cancels.
        keys: Each node's public keys.
        context: The context of the masks.
    """
    add_masks(total, minus=[self_mask_key(seed, context, who) for who, seed in seeds.items()])
    for lost, private in mask_keys.items():
        plus: list[bytes] = []
        minus: list[bytes] = []
        for survivor in seeds:
            key = pair_mask_key(private, keys[survivor].mask_key, context, (lost, survivor))
            (minus if survivor < lost else plus).append(key)  # the lower client had added it
        add_masks(total, plus, minus)
