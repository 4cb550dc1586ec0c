"""Tests of a round's keys: published vectors through the same calls, and what the keys are bound to."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.secagg import RUN, ledger_key, roster_of

from fedslm.errors import FederationError
from fedslm.secagg import keys
from fedslm.secagg.cohort import Cohort
from fedslm.secagg.keys import (
    RoundSecrets,
    agreed,
    check_keys,
    derived,
    opened,
    pair_mask_key,
    public_of,
    seal,
    self_mask_key,
)

COHORT = Cohort(RUN, 1, 1, (0, 1, 2), 2, 0, 4, roster_of(range(3)).sha256, "cd" * 32)
CONTEXT, OTHER_CONTEXT = "ab" * 32, "cd" * 32
ALICE = bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
BOB = bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
SMALL_ORDER = [
    "00" * 32,
    "01" + "00" * 31,
    "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
    "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
    "ec" + "ff" * 30 + "7f",
]


def test_x25519_as_published() -> None:
    """RFC 7748: the first vector of section 5.2, and the exchange of section 6.1."""
    scalar = bytes.fromhex("a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4")
    point = "e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c"
    product = "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552"
    assert agreed(scalar, point).hex() == product
    alice, bob = public_of(ALICE), public_of(BOB)
    assert alice == "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"
    assert bob == "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"
    secret = "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"  # noqa: S105
    assert agreed(ALICE, bob).hex() == agreed(BOB, alice).hex() == secret


def test_hkdf_as_published() -> None:
    """RFC 5869, test case 3 (SHA-256, no salt, no info): the first 32 of its 42 bytes."""
    found = derived(b"\x0b" * 22, b"").hex()
    assert found == "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d"


def test_aes_gcm_as_published(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GCM specification's test case 16 (McGrew and Viega; NIST SP 800-38D), by seal and opened."""
    key = "feffe9928665731c6d6a8f9467308308" * 2
    text = (
        "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a72"
        "1c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b39"
    )
    sealed = (
        "cafebabefacedbaddecaf888"
        "522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa"
        "8cb08e48590dbb3da7b08b1056828838c5f61e6393ba7a0abcc9f662"
        "76fc6ece0f4e1768cddf8853bb2d551b"
    )
    bound = bytes.fromhex("feedfacedeadbeeffeedfacedeadbeefabaddad2")
    monkeypatch.setattr(keys, "derived", lambda *_: bytes.fromhex(key))
    monkeypatch.setattr(keys, "_bound", lambda *_: bound)
    monkeypatch.setattr(keys.secrets, "token_bytes", lambda _: bytes.fromhex(sealed[:24]))
    assert seal(b"", bytes.fromhex(text), CONTEXT, (1, 2)).hex() == sealed
    assert opened(b"", bytes.fromhex(sealed), CONTEXT, (1, 2)) == bytes.fromhex(text)


def test_shares_open_only_where_they_belong() -> None:
    """Another sender, receiver, attempt or secret, a reflected, cut or changed box: nothing."""
    secret = agreed(ALICE, public_of(BOB))
    box = seal(secret, b"two shares", CONTEXT, (1, 2))
    assert opened(secret, box, CONTEXT, (1, 2)) == b"two shares"
    for way in ((2, 1), (1, 3), (3, 2)):
        assert opened(secret, box, CONTEXT, way) is None
    assert opened(secret, box, OTHER_CONTEXT, (1, 2)) is None
    assert opened(bytes(32), box, CONTEXT, (1, 2)) is None
    for i in range(len(box)):
        changed = bytes([*box[:i], box[i] ^ 1, *box[i + 1 :]])
        assert opened(secret, changed, CONTEXT, (1, 2)) is None
        assert opened(secret, box[:i], CONTEXT, (1, 2)) is None
    assert seal(secret, b"two shares", CONTEXT, (1, 2)) != box  # a fresh nonce


def test_mask_keys_are_bound_to_their_use() -> None:
    """A pair computes one key; another context, pair or purpose has another."""
    pair = pair_mask_key(ALICE, public_of(BOB), CONTEXT, (1, 2))
    assert pair == pair_mask_key(BOB, public_of(ALICE), CONTEXT, (2, 1))
    secret = agreed(ALICE, public_of(BOB))
    others = {
        pair_mask_key(ALICE, public_of(BOB), OTHER_CONTEXT, (1, 2)),
        pair_mask_key(ALICE, public_of(BOB), CONTEXT, (1, 3)),
        self_mask_key(secret, CONTEXT, 1),
        self_mask_key(secret, CONTEXT, 2),
        self_mask_key(secret, OTHER_CONTEXT, 1),
        derived(secret, keys._bound("shares", CONTEXT, 1, 2)),
        secret,
    }
    assert pair not in others
    assert len(others) == 7


def test_secrets_are_fresh_and_not_shown() -> None:
    """Two attempts share nothing, and a traceback shows no secret."""
    first, second = RoundSecrets.fresh(), RoundSecrets.fresh()
    values = [first.share_key, first.mask_key, first.seed]
    values += [second.share_key, second.mask_key, second.seed]
    assert len(set(values)) == 6
    assert not any(repr(value)[2:-1] in repr(first) for value in values)


def test_keys_are_signed_for_one_attempt() -> None:
    """Every value and every part of the attempt is under the signature of the right node."""
    own = RoundSecrets.fresh().public(COHORT, 1, ledger_key(1))
    public = ledger_key(1).public_key()
    check_keys(own, COHORT, public)
    other = RoundSecrets.fresh().public(COHORT, 1, ledger_key(1))
    wrong = [
        (replace(own, share_key=other.share_key), COHORT, public),
        (replace(own, mask_key=other.mask_key), COHORT, public),
        (replace(own, commitment=other.commitment), COHORT, public),
        (replace(own, client=2), COHORT, public),
        (replace(own, signature=other.signature), COHORT, public),
        (replace(own, signature=own.signature.upper()), COHORT, public),
        (own, COHORT, ledger_key(2).public_key()),
        (own, replace(COHORT, attempt=2), public),
        (own, replace(COHORT, round=2), public),
        (own, replace(COHORT, run="run-2"), public),
        (own, replace(COHORT, clients=(0, 1)), public),
        (own, replace(COHORT, num_values=5), public),
        (own, replace(COHORT, threshold=3), public),
        (own, replace(COHORT, roster_sha256="ab" * 32), public),
    ]
    for keys_, cohort, key in wrong:
        with pytest.raises(FederationError, match="did not sign"):
            check_keys(keys_, cohort, key)


@pytest.mark.parametrize("point", SMALL_ORDER)
def test_keys_of_small_order_are_refused(point: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The secret with such a key is known to everybody (RFC 7748, section 6.1)."""
    with pytest.raises(FederationError, match="small order"):
        agreed(ALICE, point)
    monkeypatch.setattr(keys, "public_of", lambda _: point)
    signed = RoundSecrets.fresh().public(COHORT, 1, ledger_key(1))
    with pytest.raises(FederationError, match="small order"):
        check_keys(signed, COHORT, ledger_key(1).public_key())


@pytest.mark.parametrize("add", [2**255, 2**255 - 19])
def test_keys_in_a_second_encoding_are_refused(add: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """X25519 ignores the highest bit and reduces: the same key would pass as another."""
    point = 9 if add == 2**255 - 19 else int.from_bytes(bytes.fromhex(public_of(BOB)), "little")
    twin = (point + add).to_bytes(32, "little").hex()
    assert agreed(ALICE, twin) == agreed(ALICE, point.to_bytes(32, "little").hex())
    monkeypatch.setattr(keys, "public_of", lambda _: twin)
    signed = RoundSecrets.fresh().public(COHORT, 1, ledger_key(1))
    with pytest.raises(FederationError, match="second encoding"):
        check_keys(signed, COHORT, ledger_key(1).public_key())
