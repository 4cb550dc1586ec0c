"""A node's keys for one attempt at a round, and what is derived from them.

Formal guarantees:
    * Both X25519 keys (RFC 7748) and the self-mask's seed are fresh from the operating system.
    * Every derived key (HKDF-SHA256, RFC 5869) is bound to its purpose, to the cohort and all its
      keys, and to the two nodes in their order: none is used twice.
    * Shares are encrypted with AES-256-GCM (NIST SP 800-38D); the associated data bind them to the
      same.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedslm.errors import FederationError
from fedslm.privacy.keys import is_signed, sha256_of, signature_of
from fedslm.secagg.cohort import Cohort
from fedslm.secagg.messages import NONCE_BYTES, TAG_BYTES, PublicKeys

KEY_BYTES = 32
_FIELD = 2**255 - 19
_SHARES, _PAIR, _SELF = "shares", "mask of a pair", "mask of one node"


@dataclass(frozen=True, repr=False)
class RoundSecrets:
    """What a node keeps secret in one attempt; each value has 32 bytes.

    Attributes:
        share_key: Private X25519 key for the encryption of shares.
        mask_key: Private X25519 key for the masks of pairs.
        seed: Seed of the self mask.
    """

    share_key: bytes
    mask_key: bytes
    seed: bytes

    @classmethod
    def fresh(cls) -> RoundSecrets:
        """New secrets from the operating system."""
        return cls(*(secrets.token_bytes(KEY_BYTES) for _ in range(3)))

    def public(self, cohort: Cohort, client: int, ledger_key: Ed25519PrivateKey) -> PublicKeys:
        """The public keys and the commitment to the seed, signed for one attempt."""
        committed = commitment(self.seed, cohort, client)
        keys = PublicKeys(client, public_of(self.share_key), public_of(self.mask_key), committed, "")
        return replace(keys, signature=signature_of(ledger_key, _signed_values(keys, cohort)))


def check_keys(keys: PublicKeys, cohort: Cohort, ledger_key: Ed25519PublicKey) -> None:
    """Refuses keys that a peer did not sign for this attempt, or that cannot be used.

    Args:
        keys: The keys that a peer is said to have.
        cohort: The cohort of the attempt.
        ledger_key: The peer's key on the roster.

    Raises:
        FederationError: The signature is another's or for another attempt, or a key is not valid.
    """
    if not is_signed(ledger_key, _signed_values(keys, cohort), keys.signature):
        raise FederationError(f"client={keys.client} did not sign these keys for this attempt")
    for key in (keys.share_key, keys.mask_key):
        if int.from_bytes(bytes.fromhex(key), "little") >= _FIELD:
            raise FederationError(f"client={keys.client} has a key in a second encoding")
        agreed(secrets.token_bytes(KEY_BYTES), key)


def public_of(private: bytes) -> str:
    """The public half (hexadecimal) of a private X25519 key."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw().hex()


def agreed(private: bytes, public: str) -> bytes:
    """The X25519 secret of a private key and a peer's public key.

    Raises:
        FederationError: The public key is of small order: everybody would know the secret.
    """
    try:
        peer = X25519PublicKey.from_public_bytes(bytes.fromhex(public))
        return X25519PrivateKey.from_private_bytes(private).exchange(peer)
    except ValueError as error:
        raise FederationError(f"the key {public[:16]}… is of small order") from error


def derived(secret: bytes, info: bytes) -> bytes:
    """A key of 32 bytes (HKDF-SHA256 without salt).

    Args:
        secret: A uniform secret, or one agreed by X25519.
        info: What the key is for.
    """
    return HKDF(hashes.SHA256(), KEY_BYTES, salt=None, info=info).derive(secret)


def self_mask_key(seed: bytes, context: str, client: int) -> bytes:
    """The key of a node's self mask.

    Args:
        seed: The node's seed.
        context: Hash of the cohort, all its keys, and who sent shares.
        client: The node.
    """
    return derived(seed, _bound(_SELF, context, client, client))


def pair_mask_key(mask_key: bytes, public: str, context: str, pair: tuple[int, int]) -> bytes:
    """The key of the mask that two nodes share; both compute the same.

    Args:
        mask_key: Private mask key of one of them.
        public: Public mask key of the other.
        context: Hash of the cohort, all its keys, and who sent shares. Nodes that were told different
            things have different masks, which never cancel.
        pair: The two nodes, in any order.

    Raises:
        FederationError: The public key is of small order.
    """
    return derived(agreed(mask_key, public), _bound(_PAIR, context, min(pair), max(pair)))


def seal(secret: bytes, content: bytes, context: str, way: tuple[int, int]) -> bytes:
    """Encrypts shares for one peer.

    Args:
        secret: The X25519 secret of both nodes' share keys.
        content: The shares.
        context: Hash of the cohort and all its keys.
        way: Sender and receiver.
    """
    bound = _bound(_SHARES, context, *way)
    nonce = secrets.token_bytes(NONCE_BYTES)
    return nonce + AESGCM(derived(secret, bound)).encrypt(nonce, content, bound)


def opened(secret: bytes, box: bytes, context: str, way: tuple[int, int]) -> bytes | None:
    """Decrypts shares; None if they are not from this sender for this receiver and attempt.

    Args:
        secret: As for :func:`seal`.
        box: What :func:`seal` returned.
        context: As for :func:`seal`.
        way: Sender and receiver.
    """
    if len(box) < NONCE_BYTES + TAG_BYTES:
        return None
    bound = _bound(_SHARES, context, *way)
    try:
        return AESGCM(derived(secret, bound)).decrypt(box[:NONCE_BYTES], box[NONCE_BYTES:], bound)
    except InvalidTag:
        return None


def commitment(seed: bytes, cohort: Cohort, client: int) -> str:
    """The hash by which the server recognises a reconstructed seed; a seed of 256 bits stays hidden."""
    return sha256_of(
        {
            "purpose": "fedslm secagg seed, version 1",
            "cohort_sha256": cohort.sha256,
            "client": client,
            "seed": seed.hex(),
        }
    )


def survivor_values(cohort: Cohort, context: str, survivors: tuple[int, ...]) -> dict[str, Any]:
    """The values that a node signs about who sent a masked input.

    Args:
        cohort: The cohort of the attempt.
        context: Hash of everything that the nodes agreed on before.
        survivors: Clients, ascending.
    """
    return {
        "purpose": "fedslm secagg survivors, version 1",
        "cohort_sha256": cohort.sha256,
        "context": context,
        "survivors": list(survivors),
    }


def _signed_values(keys: PublicKeys, cohort: Cohort) -> Mapping[str, Any]:
    """The values that a node signs about its keys."""
    return {
        "purpose": "fedslm secagg keys, version 1",
        "run": cohort.run,
        "round": cohort.round,
        "attempt": cohort.attempt,
        "cohort_sha256": cohort.sha256,
        "client": keys.client,
        "share_key": keys.share_key,
        "mask_key": keys.mask_key,
        "commitment": keys.commitment,
    }


def _bound(purpose: str, context: str, sender: int, receiver: int) -> bytes:
    """The 32 bytes that bind a key or a ciphertext to its use."""
    values = {"purpose": f"fedslm secagg {purpose}, version 1", "context": context}
    return bytes.fromhex(sha256_of({**values, "from": sender, "to": receiver}))
