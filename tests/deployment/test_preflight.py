"""What `fedslm node check` finds: on a node in order everything is well, and each fault is named."""

from __future__ import annotations

import json
import re
import shutil
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta, tzinfo
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from support.commands import run

import fedslm
from fedslm import layout
from fedslm.attestations import keep, places_of_node
from fedslm.deployment import authority, enrolment
from fedslm.deployment import preflight as preflight_module
from fedslm.deployment.admission import Admission
from fedslm.deployment.authority import AUTHORITY, SERVER, SERVER_KEY, certify
from fedslm.deployment.bundle import bundle, sha256_of
from fedslm.deployment.certificates import node_warnings, server_warnings
from fedslm.deployment.node import Ready, open_node
from fedslm.deployment.preflight import Check, preflight
from fedslm.privacy.keys import signing_key
from fedslm.privacy.ledger import Ledger
from fedslm.privacy.limits import Limits
from fedslm.privacy.lines import ADAPTER, Charge, Unprotected
from fedslm.privacy.policy import EXAMPLE
from fedslm.records import Event
from fedslm.verification.self_test import kernels


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A server's directory with certificates."""
    directory = tmp_path_factory.mktemp("server")
    (directory / "federation.toml").write_text('name = "test"\nhost = "127.0.0.1"\n')
    certify(directory)
    return directory


@contextmanager
def answering(directory: Path, skew: timedelta) -> Iterator[int]:
    """Something that answers over the server's TLS, with a clock of its own; gives its port."""

    class Forbids(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response_only(403)
            self.send_header("Date", format_datetime(datetime.now(UTC) + skew, usegmt=True))
            self.end_headers()

        def do_POST(self) -> None:
            self.do_GET()

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Forbids)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / SERVER, directory / SERVER_KEY)
    listening.socket = context.wrap_socket(listening.socket, server_side=True)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    try:
        yield int(listening.server_address[1])
    finally:
        listening.shutdown()
        listening.server_close()


@pytest.fixture
def node(server: Path, tmp_path: Path) -> Iterator[Ready]:
    """An admitted node in order, and its server."""
    directory = tmp_path / "north"
    directory.mkdir()
    rows = [{"text": f"note {n}", "label": "a", "patient": f"p{n}"} for n in range(4)]
    (directory / "notes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "node.toml").write_text(
        f'name = "north"\nsource = "{directory}/notes.jsonl"\ncolumns = ["text", "label", "patient"]\n'
    )
    (directory / "policy.toml").write_text(EXAMPLE)
    enrolment.enroll(directory, "north")
    with answering(server, timedelta(0)) as port:
        admission = Admission(
            federation="test",
            address=f"127.0.0.1:{port}",
            authority=(server / AUTHORITY).read_text(),
            operator_key="ab" * 32,
            node_id=7,
            node_key=enrolment.public_text(enrolment.node_key(directory)),
            bundle_sha256=sha256_of(bundle()),
            version=fedslm.__version__,
        )
        (directory / "admission.json").write_text(json.dumps(vars(admission)))
        yield open_node(directory)


def checks(node: Ready, last: str = "server and clock") -> dict[str, Check]:
    """Checks by name, up to one: the self-test has tests of its own, and a key is asked of a real server."""
    found = {}
    for check in preflight(node):
        found[check.name] = check
        if check.name == last:
            break
    return found


def test_a_node_in_order(node: Ready) -> None:
    """Every check is well, and says what it found."""
    found = checks(node)
    assert [check for check in found.values() if not check.is_good] == []
    assert found["records"].detail == "4 records can be read, with text, label, patient"
    assert "ε = 8" in found["policy"].detail


@pytest.mark.slow  # a worker imports torch
def test_the_self_test_counts_for_the_process_that_trains(node: Ready) -> None:
    """It is looked at in a worker with the node's threads, not with those of the command."""
    torch.set_num_threads(1)
    places = places_of_node(node.directory)
    keep(places, "self-test", {"kernels": kernels()}, {"checks": {}})
    torch.set_num_threads(2)
    assert preflight_module._self_test(node) == "passed"
    assert len(list(places[0].glob("*.json"))) == 1  # no new one was needed


def changed(old: str, new: str, name: str) -> Callable[[Ready], Ready]:
    """Changes a file of the node."""

    def change(node: Ready) -> Ready:
        path = node.directory / name
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))
        return open_node(node.directory)

    return change


def without(name: str) -> Callable[[Ready], Ready]:
    """Removes a file of the node."""

    def change(node: Ready) -> Ready:
        (node.directory / name).unlink()
        return node

    return change


def readable(node: Ready) -> Ready:
    """Lets others read the ledger's key."""
    (node.directory / "ledger-key.pem").chmod(0o644)
    return node


def torn(node: Ready) -> Ready:
    """Writes something else into the ledger."""
    (node.directory / layout.LEDGER).write_text('{"index": 0}\n')
    return node


def floats(node: Ready) -> Ready:
    """Names patients by numbers with a fraction."""
    path = node.directory / "notes.jsonl"
    path.write_text(re.sub(r'"p(\d)"', r"\1.0", path.read_text()))
    return node


def skewed(node: Ready) -> Ready:
    """The server runs another version."""
    return replace(node, admission=replace(node.admission, version="9.9", bundle_sha256="b" * 64))


FAULTS: dict[str, tuple[Callable[[Ready], Ready], str, str]] = {
    "no policy": (without("policy.toml"), "policy", "policy.toml: no such file"),
    "bad policy": (
        changed('unit = "patient"', 'unit = "x"', "policy.toml"),
        "policy",
        'policy.toml: unit: value "x": should be',
    ),
    "no records": (without("notes.jsonl"), "records", "notes.jsonl"),
    "columns": (changed('"patient"]', '"ward"]', "node.toml"), "records", "columns=['ward']"),
    "floats": (floats, "records", "unit_column of policy.toml='patient' holds float64"),
    "key": (readable, "keys and ledger", "ledger-key.pem"),
    "ledger": (torn, "keys and ledger", "ledger"),
    "version": (skewed, "version and bundle", "the server runs fedslm 9.9"),
    "base": (
        changed('base_models = ["any"]', f'base_models = ["{"c" * 64}"]', "policy.toml"),
        "base models",
        "not among base_models",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named(node: Ready, fault: str) -> None:
    """One fault, one check that says no, and why; the others still say yes."""
    change, name, reason = FAULTS[fault]
    if fault == "base":
        node = changed('base_names = ["any"]', 'base_names = ["demo"]', "policy.toml")(node)
        assert checks(node)["base models"].detail.startswith("demo ")
    found = checks(change(node))
    bad = {check.name: check.detail for check in found.values() if not check.is_good}
    assert name in bad
    assert reason in bad[name]
    assert set(bad) <= {name, "base models"}  # which reads the policy too


@pytest.mark.parametrize(("minutes", "is_good"), [(1, True), (10, False), (-10, False)])
def test_a_clock_that_is_off(node: Ready, server: Path, minutes: int, is_good: bool) -> None:
    """Beyond what the server takes it is a fault; a minute is only said."""
    with answering(server, timedelta(minutes=minutes)) as port:
        there = replace(node, admission=replace(node.admission, address=f"127.0.0.1:{port}"))
        check = checks(there)["server and clock"]
    assert check.is_good == is_good
    assert "NTP" in check.detail


def test_no_server(node: Ready) -> None:
    """A server that is not there is a fault that names its address."""
    gone = replace(node, admission=replace(node.admission, address="127.0.0.1:1"))
    check = checks(gone)["server and clock"]
    assert not check.is_good
    assert "127.0.0.1:1 cannot be reached" in check.detail


def test_each_check_is_named_before_it_begins(node: Ready) -> None:
    """Who watches knows what is waited for: a check is announced, then it runs, then its result comes."""
    said: list[str] = []
    node = without("notes.jsonl")(node)
    for check in preflight(node, lambda name: said.append(f"checking {name}")):
        said.append(check.name)
        if check.name == "records":
            break
    names = ("version and bundle", "policy", "keys and ledger", "roster", "records")
    assert said == [each for name in names for each in (f"checking {name}", name)]


@contextmanager
def clock_of_the_authority(days: int) -> Iterator[None]:
    """The authority's machine has another date, in whole days."""

    class Elsewhere(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:
            return datetime.now(tz) + timedelta(days=days)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(authority, "datetime", Elsewhere)
        yield


def issued(server: Path, directory: Path, clock: int, days: int) -> Path:
    """A copy of the server with a certificate that was made for so many days, by such a clock."""
    shutil.copytree(server, directory)
    with clock_of_the_authority(clock):
        authority.issue_server(directory, ["127.0.0.1"], days)
    return directory


@pytest.mark.parametrize(("days", "warns"), [(29, True), (32, False)])
def test_a_certificate_that_ends_soon(
    node: Ready, server: Path, tmp_path: Path, days: int, warns: bool
) -> None:
    """Thirty days before it ends, whoever relies on it is told: the node by its check, the server's operator."""
    directory = issued(server, tmp_path / "soon", 0, days)
    with answering(directory, timedelta(0)) as port:
        there = replace(node, admission=replace(node.admission, address=f"127.0.0.1:{port}"))
        check = checks(there, "certificates")["certificates"]
    assert (check.is_good, check.warns) == (True, warns)
    assert ("`fedslm provision renew`" in check.detail) == warns
    assert bool(server_warnings(directory)) == warns
    if warns:
        assert f"ends in {days - 1} days" in check.detail
        assert check.detail.split(":")[0] == server_warnings(directory)[0].split(":")[0]


def test_an_authority_that_ends_soon(tmp_path: Path) -> None:
    """The authority's end is warned of too, at both sides, and by `fedslm provision renew`."""
    directory = tmp_path / "server"
    directory.mkdir()
    text = 'name = "t"\nhost = "127.0.0.1"\nauthority_days = 20\n'
    (directory / "federation.toml").write_text(text)
    certify(directory)
    with answering(directory, timedelta(0)) as port:
        found = node_warnings(f"127.0.0.1:{port}", (directory / AUTHORITY).read_text())
    assert [each.split(" ends in ")[0] for each in found] == [
        "the server's certificate",
        "the authority's certificate",
    ]
    renewed = run("provision", "renew", "--server", str(directory))
    assert renewed.exit_code == 0
    for warning in server_warnings(directory):
        assert f"warning: {warning}" in renewed.stderr


@pytest.mark.parametrize(("clock", "days", "reason"), [(2, 9, "not yet valid"), (-40, 20, "expired")])
def test_a_clock_that_may_be_wrong(
    node: Ready, server: Path, tmp_path: Path, clock: int, days: int, reason: str
) -> None:
    """A certificate that is too young or too old: the error says that this clock may be wrong, and its time."""
    with answering(issued(server, tmp_path / "odd", clock, days), timedelta(0)) as port:
        there = replace(node, admission=replace(node.admission, address=f"127.0.0.1:{port}"))
        found = checks(there, "key at the server")
    for name in ("server and clock", "certificates", "key at the server"):
        assert not found[name].is_good
        assert reason in found[name].detail
        now = datetime.now(UTC)
        assert f"this machine's clock may be wrong: it says {now:%Y-%m-%d %H:}" in found[name].detail


def test_whoever_else_answers_says_nothing_of_the_key(node: Ready) -> None:
    """An answer that no SuperLink gives is no proof that the key is known: the check says no."""
    check = checks(node, "key at the server")["key at the server"]
    assert not check.is_good
    assert "the server answers 403 to GetRun" in check.detail


def charged(node: Ready, ahead: float = 0.0) -> Ledger:
    """The node's ledger with a round that was charged while the clock was ahead."""
    ledger = Ledger(node.directory / layout.LEDGER, signing_key(node.directory))
    values = dict.fromkeys(
        ("request_sha256", "base_sha256", "config_sha256", "dataset_commitment"), "x"
    )
    charge = Charge(
        Event(0.05, 3.0, 10), ADAPTER, 1.0, 1e-5, "run", 1, "plan", code_version="0", **values
    )
    now = time.time()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time", lambda: now + ahead)
        ledger.reserve([charge], Limits((9.0, 1e-5)))
    return ledger


def test_a_clock_that_had_jumped_is_said_and_lifted(node: Ready) -> None:
    """The check warns with the seconds and the command; the command lifts it, once, and needs a reason."""
    ledger = charged(node, 86_400)
    found = checks(node, "keys and ledger")["keys and ledger"]
    assert (found.is_good, found.warns) == (True, True)
    assert "s ahead of this machine's clock: rounds may be refused until then" in found.detail
    assert f"fedslm node clock {node.directory} --reason" in found.detail
    directory = str(node.directory)
    assert run("node", "clock", directory).exit_code != 0
    lifted = run("node", "clock", directory, "--reason", "NTP gave tomorrow")
    assert lifted.exit_code == 0, lifted.output
    assert not checks(node, "keys and ledger")["keys and ledger"].warns
    (entry,) = (each for each in ledger.read().entries if each.correction is not None)
    assert entry.correction is not None
    assert entry.correction.reason == "NTP gave tomorrow"
    again = run("node", "clock", directory, "--reason", "once more")
    assert again.exit_code == 2
    assert "nothing to correct" in again.stderr


def test_a_clock_of_1970_is_a_fault(node: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose clock cannot be right charges nothing, so the check says no."""
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    found = checks(node, "keys and ledger")["keys and ledger"]
    assert not found.is_good
    assert "clock says 1970-01-01" in found.detail


def test_releases_without_privacy_are_warned_of(node: Ready) -> None:
    """The operator learns that epsilon is infinite, and what follows."""
    ledger = charged(node)
    ledger.release_unprotected(Unprotected("open", 1, ADAPTER, "release"), Limits((9.0, 1e-5)))
    found = checks(node, "keys and ledger")["keys and ledger"]
    assert (found.is_good, found.warns) == (True, True)
    assert "1 release without privacy: epsilon is infinite" in found.detail
