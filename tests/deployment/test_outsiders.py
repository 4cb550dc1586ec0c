"""Who does not belong is kept out with a reason, and an admitted node that lies is not believed."""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Array, ArrayRecord, Message, RecordDict
from support.sites import Site, change_admission, eventually, federation, fedslm, moving, rounds_of

from fedslm.config import Config
from fedslm.deployment import authority, control
from fedslm.deployment.enrolment import node_key
from fedslm.deployment.fleet import connected
from fedslm.deployment.instructions import Instructions
from fedslm.deployment.link import Link
from fedslm.deployment.node import import_records, open_node
from fedslm.engines.local import handle
from fedslm.privacy.keys import signature_of, signing_key
from fedslm.protocol.messages import Reply
from fedslm.records import AdapterState
from fedslm.storage import load_adapter

pytestmark = [pytest.mark.federation, pytest.mark.slow]
MakeConfig = Callable[..., Config]
Lie = Callable[[Ed25519PrivateKey, dict[int, RecordDict]], RecordDict]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A server and three nodes; west is not, so that a test can take its place."""
    with federation(tmp_path_factory.mktemp("site"), held="west") as made:
        yield made


@contextmanager
def lying(site: Site, lie: Lie) -> Iterator[None]:
    """West answers with its own key, trains as it should, and then sends something else."""
    ready, stop = open_node(site.root / "west"), threading.Event()
    import_records(ready)
    ledger_key = signing_key(ready.directory)
    sent: dict[int, RecordDict] = {}

    def serve() -> None:
        key, pem = node_key(ready.directory), ready.admission.authority.encode()
        with connected(ready.admission.address, pem, key) as found:
            link = Link(*found, ready.approved, 1 << 30)
            instructions = Instructions(ready.directory, ready.admission)

            def answer(message: Message, run: int) -> Message:
                believed = instructions.believed(message, run)
                context = ready.context(link.node_id, run, believed.envelope.client)
                content = handle(message, context).content
                sent[len(sent) + 1] = content
                reply = Message(lie(ledger_key, sent), reply_to=message)
                return instructions.signed(reply, message, believed)

            link.serve(answer, lambda seconds: not stop.wait(seconds), 0.2)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        eventually(lambda: site.online("west"), "the liar is online")
        yield
    finally:
        stop.set()
        thread.join(60)
    assert not thread.is_alive()


def with_delta(
    ledger_key: Ed25519PrivateKey, content: RecordDict, change: Callable[[np.ndarray], np.ndarray]
) -> RecordDict:
    """A reply with its tensors changed, and a hash and a signed statement that fit, as a careful liar's."""
    reply = Reply.from_records(content)
    assert reply.delta is not None
    delta = AdapterState({key: change(value) for key, value in reply.delta.tensors.items()})
    values = {**json.loads(reply.statement), "release_sha256": delta.sha256()}
    del values["signature"]
    statement = json.dumps({**values, "signature": signature_of(ledger_key, values)})
    changes = {"delta": delta, "delta_sha256": delta.sha256(), "statement": statement}
    return replace(reply, **changes).to_records()


def bomb(content: RecordDict) -> RecordDict:
    """A reply of 300 kB that names its one piece 100,000 times: Flower would join them to gigabytes."""
    usual = content.array_records["delta"]["tensors"]

    class Bomb(Array):
        """Lists its one piece again and again."""

        def deflate(self) -> bytes:
            """The array's object."""
            head, _, body = super().deflate().partition(b"\0")
            values = {**json.loads(body), "arraychunk_ids": [0] * 100_000}
            body = json.dumps(values).encode()
            return head.rpartition(b" ")[0] + b" %d\0" % len(body) + body

    Bomb.__qualname__ = "Array"
    record = ArrayRecord()  # which copies what it is made of, but not what is put in
    record["tensors"] = Bomb(usual.dtype, usual.shape, usual.stype, usual.data)
    return RecordDict({**content, "delta": record})


LIES: dict[str, tuple[Lie, str]] = {
    "bomb": (lambda _, sent: bomb(sent[len(sent)]), "the reply is larger than"),
    "nan": (
        lambda key, sent: with_delta(key, sent[len(sent)], lambda each: np.full_like(each, np.nan)),
        "NaN",
    ),
    "shape": (
        lambda key, sent: with_delta(key, sent[len(sent)], lambda each: np.zeros(3, np.float32)),
        "shapes",
    ),
    "replay": (lambda _, sent: sent[1], "provision readmit west"),
    "empty": (lambda _, sent: RecordDict({}), "cannot be read"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_lying_node_is_not_in_the_aggregate(site: Site, make: MakeConfig, name: str) -> None:
    """NaN, another shape, an old reply and no reply at all count as failed; the others go on."""
    lie, reason = LIES[name]
    with lying(site, lie):
        status, directory = site.run(make(f"lie-{name}"))
    assert status == control.COMPLETED
    line = rounds_of(directory)[-1]
    assert (line["completed"], line["failed"]) == (2, 1)
    assert reason in line["reasons"][0]
    assert line["reasons"][0].startswith("west: ")
    assert line["left_out"] == [2]
    if name == "replay":  # its statement is an old one, signed with the ledger's key
        fedslm("provision", "readmit", "west", "--server", site.server, "--reason", "a test")


def test_a_giant_is_bounded(site: Site, make: MakeConfig) -> None:
    """A node that sends a hundred times its update moves the adapter no further than the norm bound."""

    def scaled(factor: float) -> Path:
        def lie(key: Ed25519PrivateKey, sent: dict[int, RecordDict]) -> RecordDict:
            return with_delta(key, sent[len(sent)], lambda each: (each * factor).astype(each.dtype))

        with lying(site, lie):
            status, directory = site.run(make(f"times-{factor:g}", federation={"rounds": 1}))
        assert status == control.COMPLETED
        assert rounds_of(directory)[0]["completed"] == 3
        return moving(directory)

    honest, giant = (moved(scaled(factor)) for factor in (1.0, 100.0))
    assert giant < 3 * honest


def moved(path: Path) -> float:
    """How far the first round moved: B starts at zero."""
    state = load_adapter(path)
    return state.select({key for key in state if "lora_B" in key}).norm()


def test_another_authority_is_refused(site: Site, tmp_path: Path) -> None:
    """A node that knows another authority talks to nobody: check and up say why."""
    authority.create_authority(tmp_path, "other", 10)
    with changed(site, authority=(tmp_path / authority.AUTHORITY).read_text()):
        refused(site)


def test_an_expired_certificate_is_refused(site: Site, tmp_path: Path) -> None:
    """A server whose certificate has expired is refused by nodes, and does not start itself."""
    expire(site.server, tmp_path)
    handler = type("Silent", (BaseHTTPRequestHandler,), {"log_message": lambda *_: None})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / authority.SERVER, tmp_path / authority.SERVER_KEY)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with changed(site, address=f"127.0.0.1:{server.server_address[1]}"):
            refused(site)
    finally:
        server.shutdown()
        server.server_close()
    for name in ("federation.toml", authority.AUTHORITY):
        (tmp_path / name).write_bytes((site.server / name).read_bytes())
    said = fedslm("server", "up", tmp_path, code=1)
    assert "expired" in said
    assert "fedslm provision renew" in said


@contextmanager
def changed(site: Site, **values: str) -> Iterator[None]:
    """West was told something else."""
    path = site.root / "west" / "admission.json"
    usual = path.read_text()
    change_admission(site.root / "west", **values)
    try:
        yield
    finally:
        path.write_text(usual)


def refused(site: Site) -> None:
    """West's check names the certificate, and west ends by itself with the reason in its log."""
    said = fedslm("node", "check", site.root / "west", code=1)
    (line,) = [each for each in said.splitlines() if "server and clock ... NO: " in each]
    assert "certificate" in line.lower()
    site.start("outsider", "node", "up", site.root / "west")
    eventually(lambda: site.processes["outsider"].poll() is not None, "the node ends")
    assert site.processes.pop("outsider").returncode != 0
    assert "certificate" in site.log("outsider").lower()
    assert "connected to" not in site.log("outsider")
    (site.root / "outsider.log").unlink()


def expire(server: Path, into: Path) -> None:
    """Writes a certificate of the server's authority that ended yesterday."""
    key = ec.generate_private_key(ec.SECP384R1())
    signer = serialization.load_pem_private_key((server / authority.AUTHORITY_KEY).read_bytes(), None)
    usual = authority.read_certificate(server / authority.SERVER)
    now = datetime.now(UTC)
    names = usual.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    made = (
        x509.CertificateBuilder(usual.issuer, usual.subject, key.public_key(), usual.serial_number + 1)
        .not_valid_before(now - timedelta(days=9))
        .not_valid_after(now - timedelta(days=1))
        .add_extension(names.value, critical=False)
        .sign(signer, hashes.SHA384())  # type: ignore[arg-type]
    )
    (into / authority.SERVER).write_bytes(made.public_bytes(serialization.Encoding.PEM))
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (into / authority.SERVER_KEY).write_bytes(pem)
