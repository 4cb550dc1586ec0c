"""The server's side of secure aggregation: one attempt at a round, from the cohort to the sum.

It needs no trust of the nodes, and keeps one vector in memory. Each ``add_…`` takes one reply, whose
sender the transport has authenticated; a refused reply counts as none, so its node drops out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedslm.errors import FederationError
from fedslm.privacy.keys import is_signed
from fedslm.secagg.cohort import Cohort
from fedslm.secagg.keys import check_keys, survivor_values
from fedslm.secagg.messages import (
    InputHead,
    InputRequest,
    KeysRequest,
    PublicKeys,
    Shares,
    SharesRequest,
    SurvivorsRequest,
    SurvivorsSignature,
    Unmask,
    UnmaskRequest,
    decode,
    encode,
    keys_context,
    sharers_context,
    survivors_context,
)
from fedslm.secagg.roster import Roster
from fedslm.secagg.unmasking import Misfit, Reconstruction, remove_masks

_KEYS, _SHARES, _INPUT, _SURVIVORS, _UNMASK, _DONE = range(6)
_LEG_NAMES = ("keys", "shares", "input", "survivors", "unmask", "the sum")


@dataclass(frozen=True)
class Outcome:
    """What an attempt gives.

    Attributes:
        sum: Sum of the survivors' vectors modulo 2^32.
        survivors: Clients in the sum, ascending.
        dropped: Clients of the cohort that are not in it, ascending.
        misfits: Shares that did not fit; the sum is right nevertheless.
    """

    sum: NDArray[np.uint32]
    survivors: tuple[int, ...]
    dropped: tuple[int, ...]
    misfits: tuple[Misfit, ...]


class Server:
    """One attempt.

    Call, in this order: :meth:`keys_request`, :meth:`add_keys` for each reply, :meth:`shares_request`,
    :meth:`add_shares`, :meth:`input_requests`, :meth:`add_input`, :meth:`survivors_request`,
    :meth:`add_signature`, :meth:`unmask_request`, :meth:`add_unmask`, :meth:`finish`. Each request
    ends the leg before it: later replies are refused.

    Args:
        cohort: Who is asked, and how many must survive.
        roster: The roster whose hash the cohort names.

    Raises:
        FederationError: The cohort names another roster, or a client that is not on it.
    """

    def __init__(self, cohort: Cohort, roster: Roster) -> None:
        if cohort.roster_sha256 != roster.sha256:
            raise FederationError("the cohort names another roster")
        for client in cohort.clients:
            roster.ledger_key(client)
        self.cohort = cohort
        self._roster = roster
        self._leg = _KEYS
        self._context = cohort.sha256
        self._keys: dict[int, PublicKeys] = {}
        self._shares: dict[int, Mapping[int, str]] = {}
        self._inputs: dict[int, InputHead] = {}
        self._signatures: dict[int, str] = {}
        self._opened: dict[int, Unmask] = {}
        self._mask_context = ""
        self._sum = np.zeros(cohort.num_values, np.uint32)

    def keys_request(self) -> bytes:
        """The request of the first leg, for each client of the cohort."""
        return encode(KeysRequest(self.cohort))

    def add_keys(self, client: int, reply: bytes) -> None:
        """Takes one node's keys.

        Args:
            client: The authenticated sender.
            reply: An encoded :class:`fedslm.secagg.messages.PublicKeys`.

        Raises:
            FederationError: The reply is late, repeated, not readable, or not valid.
        """
        self._check_leg(_KEYS, client, self.cohort.clients, self._keys)
        keys = decode(PublicKeys, reply)
        _check_sender(client, keys.client)
        check_keys(keys, self.cohort, self._roster.ledger_key(client))
        used = {key for each in self._keys.values() for key in (each.share_key, each.mask_key)}
        if keys.share_key == keys.mask_key or used & {keys.share_key, keys.mask_key}:
            raise FederationError(f"client={client} sent a key that is used already")
        self._keys[client] = keys

    def shares_request(self) -> bytes:
        """The request of the second leg, for each client that sent keys.

        Raises:
            FederationError: Too few nodes answered.
        """
        self._next(_SHARES, self._keys)
        keys = tuple(self._keys[client] for client in sorted(self._keys))
        request = SharesRequest(self._context, keys)
        self._context = keys_context(self.cohort, keys)
        return encode(request)

    def add_shares(self, client: int, reply: bytes) -> None:
        """Takes one node's encrypted shares.

        Args:
            client: The authenticated sender.
            reply: An encoded :class:`fedslm.secagg.messages.Shares`.

        Raises:
            FederationError: The reply is late, repeated, not readable, or not for exactly its peers.
        """
        self._check_leg(_SHARES, client, self._keys, self._shares)
        shares = self._read(Shares, client, reply)
        if shares.boxes.keys() != self._keys.keys() - {client}:
            raise FederationError(f"client={client} must send one box for each peer")
        self._shares[client] = shares.boxes

    def input_requests(self) -> dict[int, bytes]:
        """The requests of the third leg, for each client that sent shares.

        Raises:
            FederationError: Too few nodes answered.
        """
        self._next(_INPUT, self._shares)
        requests = {}
        for client in sorted(self._shares):
            senders = sorted(self._shares.keys() - {client})
            boxes = {sender: self._shares[sender][client] for sender in senders}
            requests[client] = encode(InputRequest(self._context, boxes))
        self._context = self._mask_context = sharers_context(self._context, self._shares)
        return requests

    def add_input(self, client: int, head: bytes, vector: NDArray[np.uint32]) -> None:
        """Adds one masked vector to the sum.

        Args:
            client: The authenticated sender.
            head: An encoded :class:`fedslm.secagg.messages.InputHead`.
            vector: Its uint32 values, not changed; ``np.frombuffer(content, "<u4")`` of what arrived.

        Raises:
            FederationError: The reply is late, repeated, not readable, or has another form.
        """
        self._check_leg(_INPUT, client, self._shares, self._inputs)
        found = self._read(InputHead, client, head)
        if not set(found.unreadable) <= self._shares.keys() - {client}:
            raise FederationError(f"client={client} could not read shares that it was not sent")
        if vector.dtype != np.uint32 or vector.shape != self._sum.shape:
            raise FederationError(
                f"client={client} must send {len(self._sum)} values of uint32 in one dimension"
            )
        self._inputs[client] = found
        np.add(self._sum, vector, out=self._sum)

    def survivors_request(self) -> bytes:
        """The request of the fourth leg, for each client that sent a masked vector.

        Raises:
            FederationError: Too few nodes answered.
        """
        self._next(_SURVIVORS, self._inputs)
        request = SurvivorsRequest(self._context, self.survivors)
        self._context = survivors_context(self._context, self.survivors)
        return encode(request)

    def add_signature(self, client: int, reply: bytes) -> None:
        """Takes one node's signature of the survivors.

        Args:
            client: The authenticated sender.
            reply: An encoded :class:`fedslm.secagg.messages.SurvivorsSignature`.

        Raises:
            FederationError: The reply is late, repeated, not readable, or not this client's signature.
        """
        self._check_leg(_SURVIVORS, client, self._inputs, self._signatures)
        found = self._read(SurvivorsSignature, client, reply)
        values = survivor_values(self.cohort, self._mask_context, self.survivors)
        if not is_signed(self._roster.ledger_key(client), values, found.signature):
            raise FederationError(f"client={client} did not sign the survivors")
        self._signatures[client] = found.signature

    def unmask_request(self) -> bytes:
        """The request of the last leg, for each client that signed.

        Raises:
            FederationError: Too few nodes answered.
        """
        self._next(_UNMASK, self._signatures)
        return encode(UnmaskRequest(self._context, dict(sorted(self._signatures.items()))))

    def add_unmask(self, client: int, reply: bytes) -> None:
        """Takes one node's shares.

        Args:
            client: The authenticated sender.
            reply: An encoded :class:`fedslm.secagg.messages.Unmask`.

        Raises:
            FederationError: The reply is late, repeated, not readable, or gives shares that were not
                asked for.
        """
        self._check_leg(_UNMASK, client, self._signatures, self._opened)
        found = self._read(Unmask, client, reply)
        lost = self._shares.keys() - self._inputs.keys()
        if not (found.seeds.keys() <= self._inputs.keys() and found.mask_keys.keys() <= lost):
            raise FederationError(f"client={client} gives shares that were not asked for")
        self._opened[client] = found

    def finish(self) -> Outcome:
        """Reconstructs the secrets, removes the masks, and returns the sum.

        Raises:
            FederationError: Too few nodes answered, or a secret cannot be reconstructed; the text names
                whose. Nothing is revealed; further shares can still be added.
        """
        self._check_enough(_DONE, self._opened)
        found = Reconstruction(self.cohort, self._keys, self._opened)
        seeds = {client: found.seed(client) for client in self.survivors}
        lost = sorted(self._shares.keys() - self._inputs.keys())
        mask_keys = {client: found.mask_key(client) for client in lost}
        self._leg = _DONE
        remove_masks(self._sum, seeds, mask_keys, self._keys, self._mask_context)
        dropped = tuple(client for client in self.cohort.clients if client not in self._inputs)
        unreadable = {
            Misfit(owner, holder) for holder, head in self._inputs.items() for owner in head.unreadable
        }
        misfits = tuple(sorted(found.misfits | unreadable))
        return Outcome(self._sum, self.survivors, dropped, misfits)

    @property
    def survivors(self) -> tuple[int, ...]:
        """Clients whose masked vector is in the sum, ascending."""
        return tuple(sorted(self._inputs))

    def _check_leg(
        self, leg: int, client: int, asked: Collection[int], answered: Collection[int]
    ) -> None:
        """Refuses a reply of another leg, of a client that was not asked, or a second one."""
        if self._leg != leg:
            raise FederationError(
                f"client={client} answers {_LEG_NAMES[leg]!r}, but the leg is {_LEG_NAMES[self._leg]!r}"
            )
        if client not in asked:
            raise FederationError(f"client={client} was not asked for {_LEG_NAMES[leg]!r}")
        if client in answered:
            raise FederationError(f"client={client} answers {_LEG_NAMES[leg]!r} a second time")

    def _read(self, expected: type[Any], client: int, reply: bytes) -> Any:
        """Reads a reply of this leg."""
        found = decode(expected, reply)
        _check_sender(client, found.client)
        if found.context != self._context:
            raise FederationError(f"client={client} answers for another attempt, or was told otherwise")
        return found

    def _next(self, leg: int, answered: Collection[int]) -> None:
        """Ends the leg before this one."""
        self._check_enough(leg, answered)
        self._leg = leg

    def _check_enough(self, leg: int, answered: Collection[int]) -> None:
        """Refuses a leg out of turn, or after one that too few nodes answered."""
        if self._leg != leg - 1:
            raise FederationError(f"{_LEG_NAMES[leg]!r} follows {_LEG_NAMES[leg - 1]!r}, once")
        if len(answered) < self.cohort.threshold:
            raise FederationError(
                f"{len(answered)} nodes answered {_LEG_NAMES[leg - 1]!r}; the threshold is "
                f"{self.cohort.threshold}: the attempt ends and reveals nothing"
            )


def _check_sender(client: int, claimed: int) -> None:
    """Refuses a reply in another client's name."""
    if client != claimed:
        raise FederationError(f"client={client} answers in the name of client={claimed}")
