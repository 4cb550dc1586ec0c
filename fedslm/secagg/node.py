"""A node's side of secure aggregation: each leg is answered once, and nothing that reveals its vector.

The server is the adversary: every request is checked against what the node itself has kept.

Formal guarantees:
    * Each leg of an attempt has one answer: the same request gets the same bytes, another is refused.
    * State is on disk before an answer leaves. A node that restarted only repeats answers.
    * A vector is asked for at most once in an attempt, whatever fails, so no second noise is drawn.
    * The node signs one survivor set; for each peer it then gives a share of the seed (the peer is in
      the set) or of the mask key (it is not), never both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from fedslm.errors import PolicyRefused
from fedslm.privacy.keys import is_signed, public_hex, signature_of
from fedslm.secagg.cohort import Cohort, Requirements
from fedslm.secagg.kept import INPUT, KEYS, LEGS, SHARES, SURVIVORS, UNMASK, Attempt, Kept
from fedslm.secagg.keys import (
    RoundSecrets,
    agreed,
    check_keys,
    opened,
    pair_mask_key,
    seal,
    self_mask_key,
    survivor_values,
)
from fedslm.secagg.masking import add_masks, check_vector
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
from fedslm.secagg.shamir import SHARE_BYTES, is_share, split

Vector = NDArray[np.uint32]


@dataclass(frozen=True)
class MaskedInput:
    """A node's masked vector, as it may leave.

    Attributes:
        head: The encoded :class:`fedslm.secagg.messages.InputHead`.
        vector: uint32 values modulo 2^32.
    """

    head: bytes
    vector: Vector


@dataclass(frozen=True)
class Node:
    """One node in one run.

    Attributes:
        key: Its ledger key.
        roster: The roster that it verified.
        requirements: What its policy requires of a cohort.
        kept: Its files of the run.
    """

    key: Ed25519PrivateKey
    roster: Roster
    requirements: Requirements
    kept: Kept

    @property
    def client(self) -> int:
        """Its number on the roster.

        Raises:
            FederationError: Its ledger key is not on the roster.
        """
        return self.roster.client_of(public_hex(self.key.public_key()))

    def keys(self, request: bytes) -> bytes:
        """Answers the first leg with fresh keys.

        Args:
            request: An encoded :class:`fedslm.secagg.messages.KeysRequest`.

        Raises:
            FederationError: The request cannot be read, or names unknown nodes.
            PolicyRefused: The cohort does not meet the node's requirements, or the attempt was answered
                otherwise, or is over.
            RunError: The node's files cannot be read or written.
        """
        with self.kept.locked():
            before = self.kept.read()
            if before is not None and before.legs[KEYS].request.encode() == request:
                return before.legs[KEYS].reply.encode()
            cohort = decode(KeysRequest, request).cohort
            self._check_cohort(cohort)
            if before is not None and cohort.order <= before.cohort.order:
                raise PolicyRefused(
                    f"(round, attempt)={cohort.order} must come after {before.cohort.order}, which was "
                    f"answered; begin a later attempt"
                )
            secrets = RoundSecrets.fresh()
            reply = encode(secrets.public(cohort, self.client, self.key))
            self.kept.write(Attempt(self.kept.session, secrets).with_leg(KEYS, request, reply))
            return reply

    def shares(self, request: bytes) -> bytes:
        """Answers the second leg with encrypted shares of its mask key and its seed.

        Args:
            request: An encoded :class:`fedslm.secagg.messages.SharesRequest`.

        Raises:
            FederationError: The request cannot be read, or keys in it are not their owners'.
            PolicyRefused: There are too few nodes, the node's own keys were changed, keys are used
                twice, or this leg was answered otherwise.
            RunError: The node's files cannot be read or written.
        """
        return self._answer(SHARES, request, self._make_shares)

    def masked_input(self, request: bytes, vector_fn: Callable[[Cohort], Vector]) -> MaskedInput:
        """Answers the third leg with its masked vector.

        Args:
            request: An encoded :class:`fedslm.secagg.messages.InputRequest`.
            vector_fn: Charges the ledger, then returns the encoded vector with its noise (uint32, one
                dimension), which is masked in place. Called at most once in an attempt, after every
                check, with the cohort that this node accepted: its ``honest_survivors`` set the noise.

        Raises:
            FederationError: The request cannot be read, or the vector has another form.
            PolicyRefused: There are too few nodes, or this leg was answered otherwise, or was begun
                and did not finish. Errors of ``vector_fn`` pass through.
            RunError: The node's files cannot be read or written.
        """
        with self.kept.locked():
            attempt = self._attempt()
            done = self._repeated(attempt, INPUT, request)
            if done is not None:
                return MaskedInput(done, self.kept.read_input(attempt.cohort.num_values))
            self._check_turn(attempt, INPUT)
            secrets, keys, boxes = _secrets(attempt), _keys(attempt), self._boxes(attempt, request)
            self.kept.write(begun := attempt.with_leg(INPUT, request, b""))
        vector = vector_fn(attempt.cohort)
        check_vector(vector, attempt.cohort.num_values)
        context = sharers_context(_context(attempt), [*boxes, self.client])
        self._mask(vector, secrets, [keys[peer] for peer in boxes], context)
        unreadable = tuple(peer for peer, shares in boxes.items() if shares is None)
        head = encode(InputHead(context, self.client, unreadable))
        with self.kept.locked():
            if self._attempt().legs != begun.legs:
                raise PolicyRefused("a later attempt has begun meanwhile; nothing was sent")
            self.kept.write_input(vector)
            self.kept.write(attempt.with_leg(INPUT, request, head))
        return MaskedInput(head, vector)

    def survivors(self, request: bytes) -> bytes:
        """Answers the fourth leg: signs who sent a masked input.

        Args:
            request: An encoded :class:`fedslm.secagg.messages.SurvivorsRequest`.

        Raises:
            FederationError: The request cannot be read.
            PolicyRefused: There are too few survivors, the node is not one, or it signed another set.
            RunError: The node's files cannot be read or written.
        """
        return self._answer(SURVIVORS, request, self._sign_survivors)

    def unmask(self, request: bytes) -> bytes:
        """Answers the last leg with one share of each peer, and forgets its secrets.

        Args:
            request: An encoded :class:`fedslm.secagg.messages.UnmaskRequest`.

        Raises:
            FederationError: The request cannot be read.
            PolicyRefused: Fewer than the threshold of survivors signed the set that this node signed.
            RunError: The node's files cannot be read or written.
        """
        return self._answer(UNMASK, request, self._open_shares)

    def _answer(
        self, leg: str, request: bytes, make: Callable[[Attempt, bytes], tuple[Attempt, bytes]]
    ) -> bytes:
        """Answers one leg once; the state is on disk before the answer is returned."""
        with self.kept.locked():
            attempt = self._attempt()
            done = self._repeated(attempt, leg, request)
            if done is not None:
                return done
            self._check_turn(attempt, leg)
            attempt, reply = make(attempt, request)
            self.kept.write(attempt.with_leg(leg, request, reply))
            return reply

    def _attempt(self) -> Attempt:
        """The attempt under way."""
        attempt = self.kept.read()
        if attempt is None:
            raise PolicyRefused(
                f"this node has sent no keys in run {self.kept.run!r}; begin an attempt"
            )
        return attempt

    def _repeated(self, attempt: Attempt, leg: str, request: bytes) -> bytes | None:
        """The answer that was given before; None if this leg was not asked for."""
        done = attempt.legs.get(leg)
        if done is None:
            return None
        if done.request.encode() != request:
            raise PolicyRefused(f"this node has answered another {leg!r} request in this attempt")
        if not done.reply:
            raise PolicyRefused("the masked input was begun and did not finish; begin a later attempt")
        return done.reply.encode()

    def _check_turn(self, attempt: Attempt, leg: str) -> None:
        """Refuses a leg out of turn, and any new answer after a restart."""
        if attempt.session != self.kept.session:
            raise PolicyRefused("this node restarted in the attempt; it only repeats what it has sent")
        wanted = LEGS[: LEGS.index(leg)]
        if tuple(attempt.legs) != wanted or not all(each.reply for each in attempt.legs.values()):
            raise PolicyRefused(f"{leg!r} comes after {', '.join(wanted)}; begin a later attempt")

    def _check_cohort(self, cohort: Cohort) -> None:
        """Refuses a cohort that does not meet the node's requirements."""
        if cohort.run != self.kept.run or cohort.roster_sha256 != self.roster.sha256:
            raise PolicyRefused("the cohort is of another run or roster than this node's")
        if self.client not in cohort.clients:
            raise PolicyRefused(f"client={self.client}, this node, is not in the cohort")
        for client in cohort.clients:
            self.roster.ledger_key(client)
        self.requirements.check(cohort)

    def _make_shares(self, attempt: Attempt, content: bytes) -> tuple[Attempt, bytes]:
        """Checks everybody's keys, and shares both secrets."""
        request, cohort = decode(SharesRequest, content), attempt.cohort
        if request.context != cohort.sha256:
            raise PolicyRefused("these keys are for another cohort or attempt")
        self._check_keys(request.keys, attempt)
        context, secrets = keys_context(cohort, request.keys), _secrets(attempt)
        clients = [each.client for each in request.keys]
        points = [cohort.point(client) for client in clients]
        halves = (split(each, cohort.threshold, points) for each in (secrets.mask_key, secrets.seed))
        both = {client: a + b for client, a, b in zip(clients, *halves, strict=True)}
        own = both.pop(self.client)
        boxes = {
            peer.client: seal(
                agreed(secrets.share_key, peer.share_key),
                both[peer.client],
                context,
                (self.client, peer.client),
            ).hex()
            for peer in request.keys
            if peer.client != self.client
        }
        return replace(attempt, own_shares=own.hex()), encode(Shares(context, self.client, boxes))

    def _check_keys(self, keys: tuple[PublicKeys, ...], attempt: Attempt) -> None:
        """Refuses keys that are not their owners', or used twice."""
        cohort, own = attempt.cohort, decode(PublicKeys, attempt.legs[KEYS].reply.encode())
        _check_enough((each.client for each in keys), cohort, "sent keys")
        if own not in keys:
            raise PolicyRefused("this node's own keys are missing or were changed")
        for each in keys:
            if each.client not in cohort.clients:
                raise PolicyRefused(f"client={each.client} is not in the cohort")
            check_keys(each, cohort, self.roster.ledger_key(each.client))
        if len({key for each in keys for key in (each.share_key, each.mask_key)}) != 2 * len(keys):
            raise PolicyRefused("two keys of the cohort are equal; begin a later attempt")

    def _boxes(self, attempt: Attempt, content: bytes) -> dict[int, bytes | None]:
        """Each peer that sent shares, with its two shares; None where they cannot be read."""
        request, keys = decode(InputRequest, content), _keys(attempt)
        context, secrets = _context(attempt), _secrets(attempt)
        if request.context != context:
            raise PolicyRefused("these shares are for other keys or another attempt")
        if not request.boxes.keys() <= keys.keys() - {self.client}:
            raise PolicyRefused("shares come from a client that sent no keys")
        _check_enough([*request.boxes, self.client], attempt.cohort, "sent shares")
        return {
            peer: _read_shares(
                opened(
                    agreed(secrets.share_key, keys[peer].share_key),
                    bytes.fromhex(box),
                    context,
                    (peer, self.client),
                )
            )
            for peer, box in request.boxes.items()
        }

    def _mask(
        self, vector: Vector, secrets: RoundSecrets, peers: list[PublicKeys], context: str
    ) -> None:
        """Adds all masks in place; of each pair the lower client adds and the higher subtracts."""
        plus, minus = [self_mask_key(secrets.seed, context, self.client)], list[bytes]()
        for peer in peers:
            pair = (self.client, peer.client)
            key = pair_mask_key(secrets.mask_key, peer.mask_key, context, pair)
            (plus if self.client < peer.client else minus).append(key)
        add_masks(vector, plus, minus)

    def _sign_survivors(self, attempt: Attempt, content: bytes) -> tuple[Attempt, bytes]:
        """Checks and signs the survivor set."""
        request, cohort = decode(SurvivorsRequest, content), attempt.cohort
        if request.context != _head(attempt).context:
            raise PolicyRefused("these survivors are of other shares or another attempt")
        sharers = decode(InputRequest, attempt.legs[INPUT].request.encode()).boxes.keys()
        if not set(request.survivors) <= sharers | {self.client}:
            raise PolicyRefused("a survivor sent no shares")
        if self.client not in request.survivors:
            raise PolicyRefused(f"client={self.client}, this node, is not among the survivors")
        _check_enough(request.survivors, cohort, "survived")
        values = survivor_values(cohort, request.context, request.survivors)
        context = survivors_context(request.context, request.survivors)
        reply = SurvivorsSignature(context, self.client, signature_of(self.key, values))
        return attempt, encode(reply)

    def _open_shares(self, attempt: Attempt, content: bytes) -> tuple[Attempt, bytes]:
        """Checks the signatures, and gives one share of each peer."""
        request, cohort = decode(UnmaskRequest, content), attempt.cohort
        named = decode(SurvivorsRequest, attempt.legs[SURVIVORS].request.encode())
        if request.context != survivors_context(named.context, named.survivors):
            raise PolicyRefused("these signatures are for other survivors than this node signed")
        if not request.signatures.keys() <= set(named.survivors):
            raise PolicyRefused("a node that did not survive signed")
        _check_enough(request.signatures, cohort, "signed the survivors")
        values = survivor_values(cohort, named.context, named.survivors)
        for client, signature in request.signatures.items():
            if not is_signed(self.roster.ledger_key(client), values, signature):
                raise PolicyRefused(f"client={client} did not sign the survivors that this node signed")
        boxes = self._boxes(attempt, attempt.legs[INPUT].request.encode())
        boxes[self.client] = bytes.fromhex(attempt.own_shares)
        held = {owner: shares for owner, shares in sorted(boxes.items()) if shares is not None}
        survivors = set(named.survivors)
        seeds = {who: both[SHARE_BYTES:].hex() for who, both in held.items() if who in survivors}
        masks = {who: both[:SHARE_BYTES].hex() for who, both in held.items() if who not in survivors}
        reply = encode(Unmask(request.context, self.client, seeds, masks))
        return replace(attempt, secrets=None, own_shares=""), reply


def _secrets(attempt: Attempt) -> RoundSecrets:
    """The secrets of an attempt that has not ended."""
    if attempt.secrets is None:
        raise PolicyRefused("this node has unmasked this attempt and forgotten its secrets")
    return attempt.secrets


def _keys(attempt: Attempt) -> dict[int, PublicKeys]:
    """The keys that the node accepted."""
    request = decode(SharesRequest, attempt.legs[SHARES].request.encode())
    return {each.client: each for each in request.keys}


def _context(attempt: Attempt) -> str:
    """The hash of the cohort and of the keys that the node accepted."""
    return decode(Shares, attempt.legs[SHARES].reply.encode()).context


def _head(attempt: Attempt) -> InputHead:
    """What the node sent next to its masked vector."""
    return decode(InputHead, attempt.legs[INPUT].reply.encode())


def _read_shares(content: bytes | None) -> bytes | None:
    """Two shares; None if they are not that."""
    if content is None or len(content) != 2 * SHARE_BYTES:
        return None
    return content if is_share(content[:SHARE_BYTES]) and is_share(content[SHARE_BYTES:]) else None


def _check_enough(clients: Iterable[int], cohort: Cohort, what: str) -> None:
    """Refuses fewer nodes than the threshold."""
    found = len(set(clients))
    if found < cohort.threshold:
        raise PolicyRefused(f"{found} nodes {what}; the threshold is {cohort.threshold}")
