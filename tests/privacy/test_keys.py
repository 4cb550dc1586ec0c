"""Tests of a node's secrets: who can read them, and what they sign and commit to."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from support.ledgers import KEY, OTHER_KEY

from fedslm.errors import LedgerError
from fedslm.privacy.keys import (
    _SMALL_ORDER,
    PRIVATE_KEY,
    PUBLIC_KEY,
    data_commitment,
    is_signed,
    public_hex,
    public_pem,
    read_public_key,
    sha256_of,
    signature_of,
    signing_key,
)

ROWS = [{"text": "chest pain", "label": 1}, {"text": "fracture", "label": 0}, {"text": "", "label": 1}]
_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def wrong_keys() -> dict[str, X25519PrivateKey | rsa.RSAPrivateKey]:
    """Keys that are no Ed25519 keys."""
    return {
        "rsa": rsa.generate_private_key(public_exponent=65537, key_size=2048),
        "x25519": X25519PrivateKey.generate(),
    }


def pem(key: X25519PrivateKey | rsa.RSAPrivateKey | Ed25519PrivateKey, password: bytes = b"") -> bytes:
    """A private key as PEM."""
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if password:
        encryption = serialization.BestAvailableEncryption(password)
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


def private_file(directory: Path, content: bytes) -> None:
    """Puts a private key into a directory, readable by its owner alone."""
    (directory / PRIVATE_KEY).write_bytes(content)
    (directory / PRIVATE_KEY).chmod(0o600)


def test_a_key_is_made_once(tmp_path: Path) -> None:
    """The first use makes the key, later uses and other processes read the same; nodes differ."""
    first = signing_key(tmp_path / "node" / "keys")
    again = signing_key(tmp_path / "node" / "keys")
    assert public_hex(first.public_key()) == public_hex(again.public_key())
    assert public_hex(signing_key(tmp_path / "other").public_key()) != public_hex(first.public_key())


def _make(directory: Path, gate: object, made: object) -> None:
    """Makes or reads the keys of a node."""
    gate.wait()  # type: ignore[attr-defined]
    key = signing_key(directory)
    made.put((public_hex(key.public_key()), data_commitment(directory, ROWS)))  # type: ignore[attr-defined]


def test_processes_that_start_together_make_one_key(tmp_path: Path) -> None:
    """Two processes of one node that start at once end with the same keys."""
    context = multiprocessing.get_context("spawn")
    gate, made = context.Barrier(2), context.Queue()
    both = [context.Process(target=_make, args=(tmp_path, gate, made)) for _ in range(2)]
    for process in both:
        process.start()
    keys = {made.get(timeout=60) for _ in both}
    for process in both:
        process.join()
    assert keys == {(public_hex(signing_key(tmp_path).public_key()), data_commitment(tmp_path, ROWS))}


def test_secrets_are_their_owners_alone(tmp_path: Path) -> None:
    """Private key and commitment key have mode 0600; nothing else beside them holds them."""
    key = signing_key(tmp_path)
    data_commitment(tmp_path, ROWS)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes[PRIVATE_KEY] == modes["commitment.key"] == 0o600
    secret = key.private_bytes_raw()
    readable = [path for path in tmp_path.iterdir() if modes[path.name] & 0o077]
    assert PUBLIC_KEY in {path.name for path in readable}
    for path in readable:
        content = path.read_bytes()
        assert b"PRIVATE" not in content
        assert secret not in content
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o620, 0o601])
def test_a_secret_that_others_can_reach_is_refused(tmp_path: Path, mode: int) -> None:
    """A key that its group or anybody can read or write is not used, and the error says what to do."""
    signing_key(tmp_path)
    data_commitment(tmp_path, ROWS)
    for name in (PRIVATE_KEY, "commitment.key"):
        (tmp_path / name).chmod(mode)
    with pytest.raises(LedgerError, match="chmod 600"):
        signing_key(tmp_path)
    with pytest.raises(LedgerError, match="chmod 600"):
        data_commitment(tmp_path, ROWS)


def test_the_public_key_lies_beside_it(tmp_path: Path) -> None:
    """The PEM file beside the private key is its public half, and is made again if it is gone."""
    key = signing_key(tmp_path)
    for _ in range(2):
        assert public_hex(read_public_key(tmp_path / PUBLIC_KEY)) == public_hex(key.public_key())
        assert (tmp_path / PUBLIC_KEY).read_bytes() == public_pem(key.public_key())
        (tmp_path / PUBLIC_KEY).unlink()
        signing_key(tmp_path)


def test_a_public_key_reads_from_hexadecimal_digits() -> None:
    """64 digits are a key too, and stand for the same as the PEM."""
    digits = public_hex(KEY.public_key())
    assert len(digits) == 64
    assert read_public_key(digits) == read_public_key(digits.upper()) == KEY.public_key()


def test_a_key_that_anybody_can_sign_for_is_refused() -> None:
    """Each point of small order, with either sign: one signature, made without a key, fits some messages."""
    for point in _SMALL_ORDER:
        key = Ed25519PublicKey.from_public_bytes(point)
        assert any(is_signed(key, {"a": number}, "01" + "00" * 63) for number in range(300)), point
        for sign in (0, 0x80):
            digits = bytes([*point[:31], point[31] | sign]).hex()
            with pytest.raises(LedgerError, match="anybody can sign"):
                read_public_key(digits)


def test_a_file_cannot_stand_for_hexadecimal_digits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Digits that somebody sent are a key, and never the name of a file in the current directory."""
    digits = public_hex(KEY.public_key())
    signing_key(tmp_path)
    (tmp_path / PUBLIC_KEY).rename(tmp_path / digits)
    monkeypatch.chdir(tmp_path)
    assert public_hex(read_public_key(digits)) == digits


@pytest.mark.parametrize("kind", ["rsa", "x25519"])
def test_a_key_of_another_kind_is_refused(tmp_path: Path, kind: str) -> None:
    """RSA and X25519 keys sign no ledger and check none."""
    key = wrong_keys()[kind]
    private_file(tmp_path, pem(key))
    with pytest.raises(LedgerError, match="not an Ed25519 key"):
        signing_key(tmp_path)
    public = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    (tmp_path / "public.pem").write_bytes(public)
    with pytest.raises(LedgerError, match="not an Ed25519 public key"):
        read_public_key(tmp_path / "public.pem")


@pytest.mark.parametrize("content", [b"", b"\0" * 32, b"rubbish", pem(KEY, b"word"), pem(KEY)[:60]])
def test_a_file_that_is_no_key_is_refused(tmp_path: Path, content: bytes) -> None:
    """Rubbish, a torn key or an encrypted one is an error, and is not replaced by a fresh key."""
    private_file(tmp_path, content)
    with pytest.raises(LedgerError, match="not a key"):
        signing_key(tmp_path)
    assert (tmp_path / PRIVATE_KEY).read_bytes() == content
    with pytest.raises(LedgerError, match="not a public key"):
        read_public_key(tmp_path / PRIVATE_KEY)


@pytest.mark.parametrize("source", ["nowhere.pem", "zz" * 32, "ab" * 31, "", " " * 64, "a\0b"])
def test_a_text_that_is_no_public_key_is_refused(source: str) -> None:
    """Neither a file nor 64 hexadecimal digits: an error that says so."""
    with pytest.raises(LedgerError, match="not a public key"):
        read_public_key(source)


def test_a_place_where_no_key_can_be_is_refused(tmp_path: Path) -> None:
    """A file in the place of the directory is an error of ours."""
    (tmp_path / "file").write_text("")
    for use in (signing_key, lambda directory: data_commitment(directory, ROWS)):
        with pytest.raises(LedgerError, match="cannot be made or read"):
            use(tmp_path / "file")


@given(
    values=st.dictionaries(st.text(max_size=5), _JSON, max_size=4),
    other=_JSON,
    name=st.text(max_size=5),
)
@settings(max_examples=100, deadline=None)
def test_a_signature_is_over_these_values_alone(values: dict, other: object, name: str) -> None:
    """Values verify whatever their order, and no other values, key or signature does."""
    signature = signature_of(KEY, values)
    reordered = dict(reversed(list(values.items())))
    assert is_signed(KEY.public_key(), reordered, signature)
    assert not is_signed(OTHER_KEY.public_key(), values, signature)
    changed = {**values, name: other}
    same = json.dumps(changed, sort_keys=True) == json.dumps(values, sort_keys=True)
    assert is_signed(KEY.public_key(), changed, signature) == same
    assert (sha256_of(changed) == sha256_of(values)) == same
    assert not is_signed(KEY.public_key(), values, signature_of(OTHER_KEY, values))


@pytest.mark.parametrize("signature", ["", "00" * 64, "zz", None, 5, [], "ab" * 63])
def test_what_is_no_signature_signs_nothing(signature: object) -> None:
    """Anything else in the place of a signature is no error, and no signature."""
    assert not is_signed(KEY.public_key(), {"a": 1}, signature)


def test_a_commitment_does_not_depend_on_the_order(tmp_path: Path) -> None:
    """The same records in another order, and with their columns in another order, commit alike."""
    reordered = [dict(reversed(list(row.items()))) for row in reversed(ROWS)]
    assert data_commitment(tmp_path, ROWS) == data_commitment(tmp_path, iter(reordered))
    assert len(data_commitment(tmp_path, [])) == 64


@pytest.mark.parametrize(
    "other",
    [
        [],
        ROWS[:2],
        [*ROWS, ROWS[0]],
        [{"text": "chest pain.", "label": 1}, *ROWS[1:]],
        [{"text": "chest pain", "label": 0}, *ROWS[1:]],
        [{"text": "chest pain", "label": "1"}, *ROWS[1:]],
        [{"text": "chest pain"}, *ROWS[1:]],
        [{**ROWS[0], "age": None}, *ROWS[1:]],
        [{"text": "fracture", "label": 1}, {"text": "chest pain", "label": 0}, ROWS[2]],
    ],
    ids=repr,
)
def test_a_commitment_changes_with_any_record(tmp_path: Path, other: list[dict]) -> None:
    """A record more, less, twice, changed or exchanged in part is another commitment."""
    assert data_commitment(tmp_path, other) != data_commitment(tmp_path, ROWS)


def test_a_commitment_is_the_nodes_own(tmp_path: Path) -> None:
    """Two nodes with the same records commit differently: nobody else can test a guess."""
    assert data_commitment(tmp_path / "a", ROWS) != data_commitment(tmp_path / "b", ROWS)


def test_a_commitment_is_the_same_in_every_process(tmp_path: Path) -> None:
    """Another process, with its own hash seed, commits to the same records alike."""
    program = (
        "import json, sys; from pathlib import Path; from fedslm.privacy.keys import data_commitment; "
        "print(data_commitment(Path(sys.argv[1]), json.loads(sys.argv[2])))"
    )
    expected = data_commitment(tmp_path, ROWS)
    command = [sys.executable, "-c", program, str(tmp_path), json.dumps(ROWS)]
    for seed in ("1", "2"):
        done = subprocess.run(
            command, env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == expected
