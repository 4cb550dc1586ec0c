"""Tests of enrolment: keys stay at the node, requests prove them, admissions are for one node."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from fedslm.deployment import authority, enrolment
from fedslm.errors import RunError
from fedslm.privacy import keys


@pytest.fixture
def server(tmp_path: Path) -> Path:
    """A server's directory with an authority."""
    directory = tmp_path / "server"
    directory.mkdir()
    (directory / "federation.toml").write_text('name = "test"\nhost = "127.0.0.1"\n')
    authority.create_authority(directory, "test", 30)
    return directory


@pytest.fixture
def register() -> Callable[[str, str], int]:
    """Numbers nodes, as a SuperLink does."""
    numbers = iter(range(100, 200))
    return lambda key, name: next(numbers)


def test_a_node_gets_in(server: Path, tmp_path: Path, register: Any) -> None:
    """Enrol, admit, accept: the node ends up with the address, the authority and its index."""
    request = enrolment.enroll(tmp_path / "north", "north")
    node, admission = enrolment.admit(server, request, register)
    found = enrolment.accept(tmp_path / "north", admission)
    assert (node.client, node.node_id, found.client) == (0, 100, 0)
    assert found.address == "127.0.0.1:8443"
    assert found.authority == (server / authority.AUTHORITY).read_text()
    assert [each.name for each in enrolment.admitted_nodes(server)] == ["north"]


def test_private_keys_stay_at_the_node(server: Path, tmp_path: Path, register: Any) -> None:
    """Neither the request, nor the admission, nor anything at the server holds one."""
    directory = tmp_path / "north"
    request = enrolment.enroll(directory, "north")
    _, admission = enrolment.admit(server, request, register)
    secrets = [path for path in directory.iterdir() if b"PRIVATE" in path.read_bytes()]
    assert sorted(path.name for path in secrets) == ["ledger-key.pem", "node-key"]
    assert all(path.stat().st_mode & 0o077 == 0 for path in secrets)
    lines = {line for path in secrets for line in path.read_text().splitlines() if len(line) > 40}
    for path in (request, admission, server / enrolment.NODES):
        assert not any(line in path.read_text() for line in lines)


def test_enrolling_again_keeps_the_keys(tmp_path: Path) -> None:
    """A second request is for the same node."""
    first = enrolment.read_request(enrolment.enroll(tmp_path, "north"))
    again = enrolment.read_request(enrolment.enroll(tmp_path, "north"))
    assert first["node_key"] == again["node_key"]
    assert first["ledger_key"] == again["ledger_key"]


@pytest.mark.parametrize("field", ["name", "node_key", "ledger_key", "version", "made_at"])
def test_a_changed_request_is_refused(tmp_path: Path, field: str) -> None:
    """Every field is signed by both keys; another node's key does not fit."""
    request = enrolment.enroll(tmp_path / "north", "north")
    other = enrolment.read_request(enrolment.enroll(tmp_path / "south", "south"))
    values = json.loads(request.read_text())
    values[field] = other[field] if other[field] != values[field] else "x"
    request.write_text(json.dumps(values))
    with pytest.raises(RunError, match=r"request|signature"):
        enrolment.read_request(request)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"signatures": 1}', "x" * 100_000])
def test_what_is_no_request_is_refused(tmp_path: Path, content: str) -> None:
    """With an error of ours."""
    path = tmp_path / "request.json"
    path.write_text(content)
    with pytest.raises(RunError, match="no enrolment request"):
        enrolment.read_request(path)


def test_names_and_keys_are_taken_once(server: Path, tmp_path: Path, register: Any) -> None:
    """A second node of the same name, or the same key under another name, is refused."""
    request = enrolment.enroll(tmp_path / "north", "north")
    enrolment.admit(server, request, register)
    with pytest.raises(RunError, match="name, node_key, ledger_key of node 'north'"):
        enrolment.admit(server, request, register)
    with pytest.raises(RunError, match="refused: name"):
        enrolment.admit(server, enrolment.enroll(tmp_path / "other", "north"), register)
    with pytest.raises(RunError, match="refused: node_key, ledger_key"):
        enrolment.admit(server, enrolment.enroll(tmp_path / "north", "renamed"), register)


def test_a_revoked_node_stays_out_and_its_place_is_free(
    server: Path, tmp_path: Path, register: Any
) -> None:
    """Its key is never admitted again; the next node takes its index."""
    requests = [enrolment.enroll(tmp_path / name, name) for name in ("a", "b")]
    for request in requests:
        enrolment.admit(server, request, register)
    gone: list[int] = []
    assert enrolment.revoke(server, "a", gone.append).revoked
    assert gone == [100]
    with pytest.raises(RunError, match="its key was revoked"):
        enrolment.admit(server, requests[0], register)
    node, _ = enrolment.admit(server, enrolment.enroll(tmp_path / "c", "c"), register)
    assert node.client == 0
    with pytest.raises(RunError, match="no admitted node 'a'"):
        enrolment.revoke(server, "a", gone.append)


def test_an_admission_is_for_one_node(server: Path, tmp_path: Path, register: Any) -> None:
    """Another node cannot take it; a key that others can read is not used."""
    _, admission = enrolment.admit(server, enrolment.enroll(tmp_path / "north", "north"), register)
    enrolment.enroll(tmp_path / "south", "south")
    with pytest.raises(RunError, match="another node's key"):
        enrolment.accept(tmp_path / "south", admission)
    (tmp_path / "north" / enrolment.NODE_KEY).chmod(0o644)
    with pytest.raises(RunError, match="can be read by others"):
        enrolment.accept(tmp_path / "north", admission)


@pytest.mark.parametrize(
    "name", ["", "..", ".", "../../x", "/x/y", "a b", "a\nb", "a" * 65, "[/x]", "ä"]
)
def test_a_name_is_a_name(server: Path, tmp_path: Path, register: Any, name: str) -> None:
    """A name becomes a file's: neither the node nor the server takes one that could be a path."""
    with pytest.raises(RunError, match="letters, digits"):
        enrolment.enroll(tmp_path / "north", name)
    request = signed_by_hand(tmp_path / "north", name=name)
    before = sorted(server.rglob("*"))
    with pytest.raises(RunError, match="letters, digits"):
        enrolment.admit(server, request, register)
    assert sorted(server.rglob("*")) == before


@pytest.mark.parametrize("key", ["/dev/zero", "ledger-key.pub.pem", "AB" * 32, "ab" * 31])
def test_a_ledger_key_is_its_digits(server: Path, tmp_path: Path, register: Any, key: str) -> None:
    """A request cannot have the server's operator read a file, or write one key in two ways."""
    request = signed_by_hand(tmp_path / "north", ledger_key=key)
    with pytest.raises(RunError, match="64 hexadecimal digits"):
        enrolment.admit(server, request, register)


def test_a_node_key_is_written_in_one_way(server: Path, tmp_path: Path, register: Any) -> None:
    """A comment makes no second key of a key that was admitted."""
    enrolment.enroll(tmp_path / "north", "north")
    text = enrolment.public_text(enrolment.node_key(tmp_path / "north"))
    request = signed_by_hand(tmp_path / "north", node_key=f"{text} again")
    with pytest.raises(RunError, match="not as `fedslm node enroll` writes it"):
        enrolment.admit(server, request, register)


def signed_by_hand(directory: Path, **changes: str) -> Path:
    """A request with other values, which its sender has signed with both keys."""
    path = enrolment.enroll(directory, "north")
    values = {key: value for key, value in json.loads(path.read_text()).items() if key != "signatures"}
    values |= changes
    node, ledger = enrolment.node_key(directory), keys.signing_key(directory)
    signatures = {
        "node": node.sign(enrolment._canonical(values), ec.ECDSA(hashes.SHA384())).hex(),
        "ledger": keys.signature_of(ledger, values),
    }
    path.write_text(json.dumps({**values, "signatures": signatures}))
    return path


def test_another_authority_needs_a_word(server: Path, tmp_path: Path, register: Any) -> None:
    """Anybody can write an admission: a fingerprint holds it, and another authority replaces none."""
    node = tmp_path / "north"
    _, admission = enrolment.admit(server, enrolment.enroll(node, "north"), register)
    right = enrolment.fingerprint((server / authority.AUTHORITY).read_text())
    with pytest.raises(RunError, match=f"fingerprint is {right}"):
        enrolment.accept(node, admission, expected="0000-0000-0000-0000")
    enrolment.accept(node, admission, expected=right)
    forged = tmp_path / "forged.json"
    forged.write_text(json.dumps({**json.loads(admission.read_text()), "authority": "mine"}))
    with pytest.raises(RunError, match="another authority"):
        enrolment.accept(node, forged)
    assert enrolment.accept(node, forged, replaces=True).authority == "mine"


@pytest.mark.parametrize(
    "changes",
    [{"client": "0/../x"}, {"client": -1}, {"client": True}, {"address": "[::1"}, {"version": 1}],
)
def test_an_admission_has_the_right_types(
    server: Path, tmp_path: Path, register: Any, changes: dict[str, Any]
) -> None:
    """A number that is a path, or an address that is none, is no admission."""
    _, admission = enrolment.admit(server, enrolment.enroll(tmp_path / "north", "north"), register)
    admission.write_text(json.dumps({**json.loads(admission.read_text()), **changes}))
    with pytest.raises(RunError, match="is no admission"):
        enrolment.accept(tmp_path / "north", admission)
