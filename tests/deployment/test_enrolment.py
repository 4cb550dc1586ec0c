"""Tests of enrolment: keys stay at the node, requests prove them, admissions are for one node."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from fedslm import layout
from fedslm.deployment import admission, authority, enrolment
from fedslm.errors import FedslmError, RunError
from fedslm.federation import spends
from fedslm.federation.checkpoint import RunDirectory
from fedslm.federation.roster import chosen_nodes
from fedslm.federation.standings import Standing
from fedslm.privacy import keys


@pytest.fixture
def server(tmp_path: Path) -> Path:
    """A server's directory with an authority."""
    directory = tmp_path / "server"
    directory.mkdir()
    (directory / "federation.toml").write_text('name = "test"\nhost = "127.0.0.1"\n')
    authority.create_authority(directory, "test", 30)
    authority.rekey(directory)
    return directory


@pytest.fixture
def register() -> Callable[[str, str], int]:
    """Numbers nodes, as a SuperLink does."""
    numbers = iter(range(100, 200))
    return lambda key, name: next(numbers)


def test_a_node_gets_in(server: Path, tmp_path: Path, register: Any) -> None:
    """Enrol, admit, accept: the node knows the address, the authority and the operator's key."""
    request = enrolment.enroll(tmp_path / "north", "north")
    node, told = admission.admit(server, request, register)
    found = admission.accept(tmp_path / "north", told)
    assert (node.node_id, found.node_id) == (100, 100)
    assert found.operator_key == authority.operator_public(server)
    assert found.address == "127.0.0.1:8443"
    assert found.authority == (server / authority.AUTHORITY).read_text()
    assert [each.name for each in admission.admitted_nodes(server)] == ["north"]


def test_private_keys_stay_at_the_node(server: Path, tmp_path: Path, register: Any) -> None:
    """Neither the request, nor the admission, nor anything at the server holds one."""
    directory = tmp_path / "north"
    request = enrolment.enroll(directory, "north")
    _, told = admission.admit(server, request, register)
    secrets = [path for path in directory.iterdir() if b"PRIVATE" in path.read_bytes()]
    assert sorted(path.name for path in secrets) == ["ledger-key.pem", "node-key"]
    assert all(path.stat().st_mode & 0o077 == 0 for path in secrets)
    lines = {line for path in secrets for line in path.read_text().splitlines() if len(line) > 40}
    for path in (request, told, server / admission.NODES):
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
    with pytest.raises(RunError, match="not an enrolment request"):
        enrolment.read_request(path)


def test_names_and_keys_are_taken_once(server: Path, tmp_path: Path, register: Any) -> None:
    """A second node of the same name, or the same key under another name, is refused."""
    request = enrolment.enroll(tmp_path / "north", "north")
    admission.admit(server, request, register)
    with pytest.raises(RunError, match="'north' is admitted with the same name, node_key, ledger_key"):
        admission.admit(server, request, register)
    with pytest.raises(RunError, match="with the same name;"):
        admission.admit(server, enrolment.enroll(tmp_path / "other", "north"), register)
    with pytest.raises(RunError, match="with the same node_key, ledger_key;"):
        admission.admit(server, enrolment.enroll(tmp_path / "north", "renamed"), register)


def test_a_new_ledger_needs_a_reason(server: Path, tmp_path: Path, register: Any) -> None:
    """Revoked and enrolled again without its ledger: what it spent is not forgotten on the way."""
    first, _ = admission.admit(server, enrolment.enroll(tmp_path / "north", "north"), register)
    spent = Standing(ledger_id="a" * 32, charges=79, epsilon=5.0, delta=1e-5)
    register_of = server / spends.SPENDS
    spends._write(register_of, {first.ledger_key: spent})
    admission.revoke(server, "north", lambda number: None)
    fresh = enrolment.enroll(tmp_path / "fresh", "north")
    with pytest.raises(RunError, match="give a --reason"):
        admission.admit(server, fresh, register, reason=" ")
    second, _ = admission.admit(server, fresh, register, reason="its disk burnt")
    (again,) = spends.read_standings(register_of)[second.ledger_key].readmissions
    assert (again.reason, again.charges, again.epsilon) == ("its disk burnt", 79, 5.0)
    assert spends.read_standings(register_of)[first.ledger_key] == spent
    admission.revoke(server, "north", lambda number: None)
    (tmp_path / "north" / enrolment.NODE_KEY).unlink()
    kept = enrolment.enroll(tmp_path / "north", "north")
    assert admission.admit(server, kept, register)[0].ledger_key == first.ledger_key


def test_two_admissions_at_once(
    server: Path, tmp_path: Path, register: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody gets a ledger key that another admission, which waits for the SuperLink, is about to take."""
    monkeypatch.setattr(admission, "_LOCK_SECONDS", 0.1)
    first = enrolment.enroll(tmp_path / "north", "north")
    shutil.copytree(tmp_path / "north", tmp_path / "twin")
    (tmp_path / "twin" / enrolment.NODE_KEY).unlink()
    second = enrolment.enroll(tmp_path / "twin", "twin")

    def meanwhile(key: str, name: str) -> Any:
        with pytest.raises(RunError, match="in use by another process"):
            admission.admit(server, second, register)
        return register(key, name)

    admission.admit(server, first, meanwhile)
    with pytest.raises(RunError, match="with the same ledger_key;"):
        admission.admit(server, second, register)
    assert [node.name for node in admission.admitted_nodes(server)] == ["north"]


@pytest.mark.parametrize("digits", ["00" * 32, "01" + "00" * 31])
def test_a_ledger_key_that_anybody_can_sign_for_is_refused(
    server: Path, tmp_path: Path, register: Any, digits: str
) -> None:
    """Whoever is admitted with it could deny every statement: anybody could have made it."""
    request = enrolment.enroll(tmp_path / "north", "north")
    values = {**json.loads(request.read_text()), "ledger_key": digits}
    del values["signatures"]
    signed = enrolment.node_key(tmp_path / "north").sign(
        enrolment._canonical(values), ec.ECDSA(hashes.SHA384())
    )
    signatures = {"node": signed.hex(), "ledger": "01" + "00" * 63}
    request.write_text(json.dumps({**values, "signatures": signatures}))
    with pytest.raises(RunError, match="anybody can sign for this key"):
        admission.admit(server, request, register)


def test_a_revoked_node_stays_out_and_its_name_is_free(
    server: Path, tmp_path: Path, register: Any
) -> None:
    """Its key is never admitted again; another node may take its name."""
    requests = [enrolment.enroll(tmp_path / name, name) for name in ("a", "b")]
    for request in requests:
        admission.admit(server, request, register)
    gone: list[int] = []
    assert admission.revoke(server, "a", gone.append).revoked
    assert gone == [100]
    with pytest.raises(RunError, match="its key was revoked"):
        admission.admit(server, requests[0], register)
    node, _ = admission.admit(server, enrolment.enroll(tmp_path / "c", "a"), register)
    assert (node.name, node.revoked) == ("a", False)
    admission.revoke(server, "a", gone.append)
    with pytest.raises(RunError, match="no admitted node 'a'"):
        admission.revoke(server, "a", gone.append)


def test_an_admission_is_for_one_node(server: Path, tmp_path: Path, register: Any) -> None:
    """Another node cannot take it; a key that others can read is not used."""
    _, told = admission.admit(server, enrolment.enroll(tmp_path / "north", "north"), register)
    enrolment.enroll(tmp_path / "south", "south")
    with pytest.raises(RunError, match="another node's key"):
        admission.accept(tmp_path / "south", told)
    (tmp_path / "north" / enrolment.NODE_KEY).chmod(0o644)
    with pytest.raises(RunError, match="can be read by others"):
        admission.accept(tmp_path / "north", told)


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
        admission.admit(server, request, register)
    assert sorted(server.rglob("*")) == before


@pytest.mark.parametrize("key", ["/dev/zero", "ledger-key.pub.pem", "AB" * 32, "ab" * 31])
def test_a_ledger_key_is_its_digits(server: Path, tmp_path: Path, register: Any, key: str) -> None:
    """A request cannot have the server's operator read a file, or write one key in two ways."""
    request = signed_by_hand(tmp_path / "north", ledger_key=key)
    with pytest.raises(RunError, match="64 hexadecimal digits"):
        admission.admit(server, request, register)


def test_a_node_key_is_written_in_one_way(server: Path, tmp_path: Path, register: Any) -> None:
    """A comment makes no second key of a key that was admitted."""
    enrolment.enroll(tmp_path / "north", "north")
    text = enrolment.public_text(enrolment.node_key(tmp_path / "north"))
    request = signed_by_hand(tmp_path / "north", node_key=f"{text} again")
    with pytest.raises(RunError, match="not as `fedslm node enroll` writes it"):
        admission.admit(server, request, register)


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


def forged_by(other: Path, told: Path, **changes: str) -> Path:
    """An admission with other values, signed by another operator."""
    values = {
        **json.loads(told.read_text()),
        **changes,
        "operator_key": authority.operator_public(other),
    }
    del values["signature"]
    key = keys.private_key(other / layout.OPERATOR_KEY)
    signature = keys.signature_of(key, {**values, "purpose": "fedslm admission, version 1"})
    path = other / "forged.json"
    path.write_text(json.dumps({**values, "signature": signature}))
    return path


def test_another_federation_needs_a_word(server: Path, tmp_path: Path, register: Any) -> None:
    """Whoever has an operator's key can sign an admission: the fingerprint says whose it is."""
    node, other = tmp_path / "north", tmp_path / "other"
    _, told = admission.admit(server, enrolment.enroll(node, "north"), register)
    right = admission.federation_fingerprint(server)
    with pytest.raises(RunError, match="fingerprint is not 0000-0000-0000-0000"):
        admission.accept(node, told, expected="0000-0000-0000-0000")
    admission.accept(node, told, expected=right)
    other.mkdir()
    authority.rekey(other)
    forged = forged_by(other, told)
    with pytest.raises(RunError, match="another authority or operator's key"):
        admission.accept(node, forged)
    with pytest.raises(RunError, match="fingerprint is not"):
        admission.accept(node, forged, expected=right, replaces=True)
    accepted = admission.accept(node, forged, replaces=True)
    assert accepted.operator_key == authority.operator_public(other)


@pytest.mark.parametrize(
    "changes",
    [
        {"address": "elsewhere:1"},
        {"authority": "mine"},
        {"node_id": 5},
        {"bundle_sha256": "00"},
        {"operator_key": "0" * 64},
        {"signature": "00"},
    ],
    ids=str,
)
def test_an_admission_is_signed(
    server: Path, tmp_path: Path, register: Any, changes: dict[str, Any]
) -> None:
    """Nothing of an admission can be changed on its way."""
    _, told = admission.admit(server, enrolment.enroll(tmp_path / "north", "north"), register)
    told.write_text(json.dumps({**json.loads(told.read_text()), **changes}))
    with pytest.raises(RunError, match="not signed with the operator's key"):
        admission.accept(tmp_path / "north", told)


def test_a_new_operators_key_is_told(server: Path, tmp_path: Path, register: Any) -> None:
    """All admitted nodes get a new admission; a node takes it when its operator says so."""
    node = tmp_path / "north"
    _, told = admission.admit(server, enrolment.enroll(node, "north"), register)
    before = admission.accept(node, told)
    run = RunDirectory(server / "runs" / "living", "id")
    run.path.mkdir(parents=True)
    (run.path / "config.json").write_text("{}")
    with run.locked(), pytest.raises(RunError, match="in use by another process"):
        admission.rekey(server)
    (again,) = admission.rekey(server)
    with pytest.raises(RunError, match="--replace"):
        admission.accept(node, again)
    after = admission.accept(
        node, again, expected=admission.federation_fingerprint(server), replaces=True
    )
    assert after.operator_key == authority.operator_public(server) != before.operator_key


def test_confidential_files_are_their_owners_alone(server: Path, tmp_path: Path, register: Any) -> None:
    """The operator's key and both copies of an admission are their owners' alone, also where one was before."""
    node, told = admission.admit(server, enrolment.enroll(tmp_path / "north", "north"), register)
    accepted = tmp_path / "north" / admission.ADMISSION
    assert (server / layout.OPERATOR_KEY).stat().st_mode & 0o077 == 0
    for _ in range(2):
        admission.accept(tmp_path / "north", told)
        for path in (told, accepted):
            assert path.stat().st_mode & 0o777 == 0o600
            path.chmod(0o644)
        admission.write_admission(server, node)
    (server / layout.OPERATOR_KEY).chmod(0o644)
    with pytest.raises(RunError, match="chmod 600"):
        authority.operator_public(server)


@pytest.mark.parametrize(
    "changes",
    [{"node_id": "0/../x"}, {"node_id": -1}, {"node_id": True}, {"address": "[::1"}, {"version": 1}],
)
def test_an_admission_has_the_right_types(
    server: Path, tmp_path: Path, register: Any, changes: dict[str, Any]
) -> None:
    """A number that is a path, or an address that is none, is no admission."""
    _, told = admission.admit(server, enrolment.enroll(tmp_path / "north", "north"), register)
    told.write_text(json.dumps({**json.loads(told.read_text()), **changes}))
    with pytest.raises(RunError, match="is not an admission"):
        admission.accept(tmp_path / "north", told)


@pytest.mark.parametrize(
    "content",
    [" " * (1 << 16) + "{}", "[" * 50_000, '{"a":' * 10_000, "\xff", "7", '{"nodes": 7}', "9" * 10_000],
    ids=["long", "deep", "dig", "bytes", "number", "nodes", "digits"],
)
def test_a_file_that_another_wrote_is_read_up_to_a_limit(
    server: Path, tmp_path: Path, content: str
) -> None:
    """Admission, request and list of nodes: nonsense is an error of one line, and no more is read."""
    path = tmp_path / "file.json"
    path.write_bytes(content.encode("latin-1"))
    (server / admission.NODES).write_bytes(content.encode("latin-1"))
    for read in (
        lambda: admission.read_admission(path),
        lambda: enrolment.read_request(path),
        lambda: admission.admitted_nodes(server),
        lambda: chosen_nodes(server / admission.NODES, (), 1),
    ):
        with pytest.raises(FedslmError) as caught:
            read()
        assert len(str(caught.value)) < 600


def test_an_endless_file_is_not_read_to_its_end() -> None:
    """A path that gives zeros for ever is refused as too long."""
    for read in (admission.read_admission, enrolment.read_request):
        with pytest.raises(RunError, match="more than 65536 bytes"):
            read(Path("/dev/zero"))
