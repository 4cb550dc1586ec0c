"""An admitted node that lies, and strangers, against a real server: TLS, proxy, guard and SuperLink."""

from __future__ import annotations

import http.client
import json
import queue
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Message
from flwr.proto.fleet_pb2 import PushMessagesResponse
from flwr.proto.message_pb2 import ObjectTree
from support.fleet_client import MIB, Sender, arrays, instruction
from support.sites import SECONDS, Site, eventually, federation, ledger_of, rounds_of
from support.tiny import PRIVATE

from fedslm import layout
from fedslm.config import Config
from fedslm.deployment import fleet_api
from fedslm.deployment.admission import read_admission
from fedslm.deployment.authority import AUTHORITY
from fedslm.deployment.enrolment import node_key
from fedslm.deployment.fleet import connected
from fedslm.deployment.link import Link
from fedslm.deployment.node import import_records, open_node
from fedslm.engines.local import handle

pytestmark = pytest.mark.federation
MakeConfig = Callable[..., Config]


@dataclass
class Scene:
    """A server and two nodes in round 1 of a private run: north answers; south's key is the test's.

    Attributes:
        liar: South's key, and a way through the proxy.
        asked: What south was asked, and does not answer.
    """

    site: Site
    liar: Sender
    asked: Message
    directory: Path

    @property
    def run(self) -> int:
        """The SuperLink's number of the run."""
        return self.asked.metadata.run_id

    @property
    def north(self) -> int:
        """The honest node's number."""
        return read_admission(self.site.root / "north" / "admission.json").node_id


@pytest.fixture(scope="module")
def scene(config_in: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """North and the server run as they do, north's self-test too; south does not answer the first round."""
    root = tmp_path_factory.mktemp("site")
    with federation(root, ("north", "south"), held="south", is_tested=False) as site:
        nodes = {"num_clients": 2, "rounds": 2}
        config = config_in(site.server / "runs" / "lied-to", federation=nodes, privacy=PRIVATE)
        key = node_key(root / "south")
        context = ssl.create_default_context(cafile=str(site.server / AUTHORITY))
        address = f"https://127.0.0.1:{site.settings['port']}"
        with httpx.Client(verify=context, base_url=address, timeout=30) as client, asked(root) as ask:
            liar = Sender(
                key,
                read_admission(root / "south" / "admission.json").node_id,
                lambda path, body, headers: client.post(path, content=body, headers=dict(headers)),
            )
            with site.running(config) as (run_directory, _):
                yield Scene(site, liar, ask(), run_directory)


@contextmanager
def asked(root: Path) -> Iterator[Callable[[], Message]]:
    """South is connected, and answers until it is asked to train; gives what waits for that."""
    ready, stop, found = open_node(root / "south"), threading.Event(), queue.Queue[Message]()
    import_records(ready)

    def serve() -> None:
        key, pem = node_key(ready.directory), ready.admission.authority.encode()
        with connected(ready.admission.address, pem, key) as connection:
            link = Link(*connection, ready.approved, 1 << 30)

            def answer(message: Message, run: int) -> Message:
                if message.metadata.message_type == "train":
                    found.put(message)
                    stop.wait(SECONDS)
                    raise TimeoutError("the liar answers by hand")
                content = handle(message, ready.context(link.node_id, run, 1)).content
                return Message(content, reply_to=message)

            link.serve(answer, lambda seconds: not stop.wait(seconds), 0.2)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield lambda: found.get(timeout=2 * SECONDS)
    finally:
        stop.set()
        thread.join(60)
    assert not thread.is_alive()


def charges(scene: Scene) -> int:
    """How often north was charged."""
    path = scene.site.root / "north" / layout.LEDGER
    return len(ledger_of(scene.site.root / "north").charges) if path.exists() else 0


def test_a_node_commands_nobody(scene: Scene) -> None:
    """An instruction to another node, under the server's name or one's own, is refused; nobody is charged."""
    eventually(lambda: charges(scene) == len(rounds_of(scene.directory)) + 1, "north has its charge")
    before = charges(scene)
    for source in (1, scene.liar.node_id):
        made = instruction(scene.run, scene.north, arrays(0.1))
        push = scene.liar.push(made)
        push.messages_list[0].metadata.src_node_id = source
        got = scene.liar.send("push-messages", push)
        assert got.status_code == 400, got.text
    time.sleep(3)  # north asks five times a second
    assert charges(scene) == before
    log = (scene.site.server / "logs" / "superlink.log").read_text()
    assert f"node {scene.liar.node_id}" in log
    assert "is refused" in log


def test_a_node_answers_for_nobody(scene: Scene) -> None:
    """A reply under another node's name, or to what another was asked, is refused."""
    push = scene.liar.push(scene.liar.reply(scene.asked))
    push.messages_list[0].metadata.src_node_id = scene.north
    got = scene.liar.send("push-messages", push)
    assert (got.status_code, "src_node_id" in got.text) == (400, True)
    push = scene.liar.push(scene.liar.reply(scene.asked))
    push.messages_list[0].metadata.reply_to_message_id = "0" * 64
    got = scene.liar.send("push-messages", push)
    assert (got.status_code, "reply_to_message_id" in got.text) == (403, True)


def test_a_tree_of_thousands_is_refused_at_once(scene: Scene) -> None:
    """3,000 objects cost the server no time, and a tree just beyond the bound neither."""
    for count, code in ((3000, 413), (fleet_api.most_objects(1024) + 1, 400)):
        push = scene.liar.push(scene.liar.reply(scene.asked))
        names = [ObjectTree(object_id=f"{index:064x}") for index in range(count - 1)]
        push.message_object_trees[0].ClearField("children")
        push.message_object_trees[0].children.extend(names)
        start = time.monotonic()
        got = scene.liar.send("push-messages", push)
        assert got.status_code == code, got.text
        assert time.monotonic() - start < 5


@pytest.mark.slow
def test_strangers_take_no_memory(scene: Scene) -> None:
    """Eight strangers who send on for half a minute leave the SuperLink as large as it was.

    It once kept 0.4 MB of each refused connection for 75 seconds.
    """
    size = resident(scene.site)
    sent = [0] * 8
    with strangers(scene, sent):
        deadline, most = time.monotonic() + 30, size
        while time.monotonic() < deadline:
            most = max(most, resident(scene.site))
            time.sleep(0.2)
    print(
        f"SuperLink: {size / MIB:.0f} MB before, {most / MIB:.0f} MB at most; sent {sum(sent) / MIB:.0f} MB"
    )
    assert sum(sent) > MIB
    assert most - size < 32 * MIB


def resident(site: Site) -> int:
    """Memory of the SuperLink."""
    status = Path(f"/proc/{site.pid_of_superlink()}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


@contextmanager
def strangers(scene: Scene, sent: list[int]) -> Iterator[None]:
    """Eight that send on and on: half of them in one piece of an allowed size, half beyond it."""
    stop = threading.Event()
    port, context = scene.site.settings["port"], ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    key = ec.generate_private_key(ec.SECP384R1())
    stranger = Sender(key, 5, scene.liar.post)

    def send(index: int) -> None:
        piece, size = b"x" * (1 << 16), (64 << 20) if index % 2 else fleet_api.MOST_REQUEST_BYTES
        while not stop.is_set():
            with (
                suppress(OSError),
                socket.create_connection(("127.0.0.1", port), 10) as plain,
                context.wrap_socket(plain) as secure,
            ):
                lines = [f"POST {fleet_api.PUSH_OBJECT} HTTP/1.1", "Host: a", f"Content-Length: {size}"]
                lines += [f"{key}: {value}" for key, value in stranger.headers().items()]
                secure.sendall("\r\n".join([*lines, "", ""]).encode())
                for _ in range(size >> 16):
                    if stop.wait(0.05 if index < 4 else 0):
                        break
                    secure.sendall(piece)
                    sent[index] += len(piece)
            stop.wait(0.05)

    threads = [threading.Thread(target=send, args=(index,), daemon=True) for index in range(8)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join(15)


TRICKS = [
    *("/v1/fleet/pull-messages%23", "/v1/fleet/pull-messages%3f", "/v1/fleet/pull-messages?x=1"),
    *("/v1/fleet/%70ull-messages", "/v1/fleet/pull-messages%2f", "/v1/fleet/pull-messages/"),
    *("/v1/fleet//pull-messages", "//v1/fleet/pull-messages", "/v1/fleet/./pull-messages"),
    *("/v1/fleet/x/../pull-messages", "/v1/fleet/x/%2e%2e/pull-messages", "/v1/fleet/pull-messages;x"),
    *(
        "/v1/fleet/../control/list-runs",
        "/v1/fleet/%2e%2e/control/list-runs",
        "/V1/FLEET/PULL-MESSAGES",
    ),
    *("/v1/fleet/pull-messages#", "/v1/fleet/pull-messages%00", "/v1/fleet/pull-messages%0a", "*"),
    *("/v1/control/list-runs%23/v1/fleet/pull-messages", "/v1/fleet/", "/v1/fleet", "/health", "/docs"),
    *(*fleet_api.REFUSED_PATHS, "https://other/v1/control/list-runs"),
]


def answer_of(scene: Scene, path: str, method: str = "POST") -> int:
    """The status of a request whose path is sent as it is written."""
    context = ssl.create_default_context(cafile=str(scene.site.server / AUTHORITY))
    connection = http.client.HTTPSConnection(
        "127.0.0.1", scene.site.settings["port"], context=context, timeout=20
    )
    try:
        connection.putrequest(method, path, skip_accept_encoding=True)
        for key, value in {**scene.liar.headers(), "content-length": "0"}.items():
            connection.putheader(key, value)
        connection.endheaders()
        return connection.getresponse().status
    finally:
        connection.close()


def test_the_proxy_passes_the_fleet_paths_alone(scene: Scene) -> None:
    """Whatever is not a Fleet path letter by letter is refused, with an admitted node's key as well."""
    for path in TRICKS:
        assert answer_of(scene, path) in (400, 403, 404), path
    for path in fleet_api.PATHS:
        assert answer_of(scene, path, "GET") in (403, 405), path
    assert answer_of(scene, fleet_api.PULL_MESSAGES) == 400  # an empty body names no node
    said = (scene.site.server / "logs" / "proxy.log").read_text()
    assert "%23" in said


@pytest.mark.slow
def test_a_stalled_connection_ends(scene: Scene) -> None:
    """Whoever does not finish their request's headers is cut off after ten seconds."""
    context = ssl.create_default_context(cafile=str(scene.site.server / AUTHORITY))
    with (
        socket.create_connection(("127.0.0.1", scene.site.settings["port"]), 30) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as secure,
    ):
        secure.sendall(b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: a\r\n")
        start, answer = time.monotonic(), b""
        with suppress(ConnectionResetError):
            answer = secure.recv(1000)
        assert 5 < time.monotonic() - start < 25
        assert not answer.startswith(b"HTTP/1.1 2")


@pytest.mark.parametrize("cipher", ["AES256-SHA", "ECDHE-ECDSA-AES256-SHA", "AES256-GCM-SHA384"])
def test_old_ciphers_are_refused(scene: Scene, cipher: str) -> None:
    """No key exchange without ephemeral keys, no cipher without authentication; TLS 1.2 with them, and 1.3."""

    def version(maximum: ssl.TLSVersion, ciphers: str) -> str | None:
        context = ssl.create_default_context(cafile=str(scene.site.server / AUTHORITY))
        context.maximum_version = maximum
        context.set_ciphers(f"{ciphers}:@SECLEVEL=0")
        with (
            socket.create_connection(("127.0.0.1", scene.site.settings["port"]), 20) as plain,
            context.wrap_socket(plain, server_hostname="127.0.0.1") as secure,
        ):
            return secure.version()

    with pytest.raises(ssl.SSLError):
        version(ssl.TLSVersion.TLSv1_2, cipher)
    assert version(ssl.TLSVersion.TLSv1_2, "ECDHE+AESGCM") == "TLSv1.2"
    assert version(ssl.TLSVersion.TLSv1_3, "ECDHE+AESGCM") == "TLSv1.3"


def test_an_honest_reply_still_counts(scene: Scene) -> None:
    """After all that a reply of the liar arrives, and counts as failed since it is not signed; north makes the round."""
    reply = scene.liar.reply(scene.asked)
    push = scene.liar.push(reply)
    got = scene.liar.send("push-messages", push)
    assert got.status_code == 200, got.text
    session = PushMessagesResponse.FromString(got.content).session_id
    for piece in scene.liar.pieces(reply, session):
        assert scene.liar.send("push-object", piece).status_code == 200
    eventually(lambda: len(rounds_of(scene.directory)) >= 1, "round 1 ends")
    line = rounds_of(scene.directory)[0]
    assert (line["completed"], line["failed"]) == (1, 1)
    assert "south: the reply is not signed for this request" in json.dumps(line["reasons"])
