"""A node's connection to a hostile server: each answer is bounded before it is read, and nothing ends the node."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.fab_pb2 import Fab, GetFabResponse
from flwr.proto.fleet_pb2 import ActivateNodeResponse, PullMessagesResponse
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatResponse
from flwr.proto.message_pb2 import Message as Sent
from flwr.proto.message_pb2 import ObjectTree, PullObjectResponse
from flwr.proto.node_pb2 import Node
from flwr.supercore.error import ApiErrorCode
from flwr.supercore.run import RunNotRunningException
from support.places import certified

from fedslm.deployment import fleet
from fedslm.errors import FederationError

MIB = 1 << 20
NO_SUCH_RUN = json.dumps({"code": int(ApiErrorCode.FLEET_GET_RUN_FAILED), "detail": "x"}).encode()
KEY = ec.generate_private_key(ec.SECP384R1())
Served = tuple[int, dict[str, str], bytes | int]  # status, headers, and content or so many MiB of zeros


class Hostile:
    """A server over TLS that answers what a test says, and notes the paths that it was asked."""

    def __init__(self) -> None:
        self.answers: dict[str, Served] = {
            "activate-node": (200, {}, ActivateNodeResponse(node_id=7).SerializeToString()),
            "send-node-heartbeat": (
                200,
                {},
                SendNodeHeartbeatResponse(success=True).SerializeToString(),
            ),
        }
        self.asked: list[str] = []
        self.date = ""
        self.address = ""

    def handler(self) -> type[BaseHTTPRequestHandler]:
        """Answers each request."""
        hostile = self

        class Handler(BaseHTTPRequestHandler):
            """One connection."""

            def date_time_string(self, timestamp: float | None = None) -> str:
                """What the server's clock shows."""
                return hostile.date or super().date_time_string(timestamp)

            def do_POST(self) -> None:
                """Answers a call."""
                self.rfile.read(int(self.headers["content-length"]))
                hostile.asked.append(self.path)
                status, headers, content = hostile.answers.get(
                    self.path.rpartition("/")[2], (200, {}, b"")
                )
                self.send_response(status)
                for key, value in headers.items():
                    self.send_header(key, value)
                if isinstance(content, bytes):
                    self.send_header("content-length", str(len(content)))
                self.end_headers()
                try:
                    for _ in range(content if isinstance(content, int) else 0):
                        self.wfile.write(bytes(MIB))
                    self.wfile.write(content if isinstance(content, bytes) else b"")
                except OSError:  # the node hung up, as it should
                    hostile.asked.append("hung up")

            def log_message(self, *_: Any) -> None:
                """Says nothing."""

        return Handler


@contextmanager
def serving(directory: Path) -> Iterator[tuple[Hostile, bytes]]:
    """A hostile server; gives its authority as well."""
    authority, context = certified(directory)
    hostile = Hostile()
    server = ThreadingHTTPServer(("127.0.0.1", 0), hostile.handler())
    server.socket = context.wrap_socket(server.socket, server_side=True)
    hostile.address = f"127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hostile, authority.encode()
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Hostile, bytes]]:
    """One hostile server for this file."""
    with serving(tmp_path_factory.mktemp("hostile") / "server") as made:
        yield made


@contextmanager
def calls(site: tuple[Hostile, bytes], **answers: Served) -> Iterator[tuple[Any, ...]]:
    """A node's calls to a server that answers some of them in its own way."""
    hostile, authority = site
    usual = dict(hostile.answers)
    hostile.answers |= {name.replace("_", "-"): answer for name, answer in answers.items()}
    hostile.asked.clear()
    try:
        with fleet.connected(hostile.address, authority, KEY) as (node_id, functions):
            assert node_id == 7
            yield functions
    finally:
        hostile.answers = usual


LONG: dict[str, tuple[int, int, Callable[[tuple[Any, ...]], object]]] = {
    "pull_messages": (0, 1, lambda call: call[0]()),
    "get_run": (2, 1, lambda call: call[2](1)),
    "get_fab": (3, 11, lambda call: call[3]("x", 1)),
    "pull_object": (4, 6, lambda call: call[4](1, "x")),
    "push_object": (5, 1, lambda call: call[5](1, "x", "x", b"x")),
    "confirm_message_received": (6, 1, lambda call: call[6](1, "x")),
}


@pytest.mark.parametrize("name", LONG)
def test_a_long_answer_is_not_read_to_its_end(site: tuple[Hostile, bytes], name: str) -> None:
    """An answer of 64 MiB, with and without its length, is refused at the limit of its call."""
    _, most, call = LONG[name]
    for headers in ({}, {"content-length": str(64 * MIB)}):
        with (
            calls(site, **{name: (200, headers, 64)}) as functions,
            pytest.raises(FederationError, match=f"has more than {most * MIB} bytes"),
        ):
            call(functions)


def test_honest_answers_fit(site: tuple[Hostile, bytes]) -> None:
    """A piece of 5 MiB and a bundle of 10 MB come whole."""
    piece = PullObjectResponse(
        object_found=True, object_available=True, object_content=bytes(5 * MIB + 999)
    )
    fab = GetFabResponse(fab=Fab(hash_str="x", content=bytes(10 * MIB)))
    answers: dict[str, Served] = {
        "pull_object": (200, {}, piece.SerializeToString()),
        "get_fab": (200, {}, fab.SerializeToString()),
    }
    with calls(site, **answers) as functions:
        assert len(functions[4](1, "x")) == 5 * MIB + 999
        assert len(functions[3]("x", 1).content) == 10 * MIB


def test_a_compressed_answer_is_not_unpacked(site: tuple[Hostile, bytes]) -> None:
    """A few kB that unpack to 64 MiB stay packed."""
    bomb = gzip.compress(bytes(64 * MIB))
    with (
        calls(site, pull_object=(200, {"content-encoding": "gzip"}, bomb)) as functions,
        pytest.raises(FederationError, match="is compressed"),
    ):
        functions[4](1, "x")


def test_a_redirect_is_not_followed(site: tuple[Hostile, bytes]) -> None:
    """A node sends its signed requests to its server alone."""
    hostile, _ = site
    headers = {"location": f"https://{hostile.address}/elsewhere"}
    with calls(site, get_run=(307, headers, b"")) as functions:
        with pytest.raises(FederationError, match="answers 307 to GetRun"):
            functions[2](1)
        assert "/elsewhere" not in hostile.asked


@pytest.mark.parametrize(
    ("status", "expected", "text"),
    [
        (401, fleet.NotKnown, "it was revoked, or never admitted"),
        (403, FederationError, "answers 403"),
        (404, FederationError, "answers 404"),
        (500, httpx.TransportError, "answers 500"),
        (503, httpx.TransportError, "answers 503"),
    ],
)
def test_an_error_is_an_exception(
    site: tuple[Hostile, bytes], status: int, expected: type[BaseException], text: str
) -> None:
    """No answer ends or interrupts the process; the text of an error is short."""
    with calls(site, get_run=(status, {}, b"\x00\xff" * 1000)) as functions:
        with pytest.raises(expected, match=text) as caught:
            functions[2](1)
        assert len(str(caught.value)) < 900


NO_ANSWERS: dict[str, tuple[Served, str, bool]] = {
    "deep": ((403, {}, b"[" * 500_000), "", False),
    "no message": ((200, {}, b"\xff"), "", False),
    "no date": ((401, {}, b""), f"Mon, 01 Jan 2020 00:00:00 +{'9' * 20}", True),
}


@pytest.mark.parametrize("name", NO_ANSWERS)
def test_no_answer_ends_the_heartbeats(site: tuple[Hostile, bytes], name: str) -> None:
    """Whatever is answered to one, the next follows: a server sees a node only by them."""
    (hostile, authority), (answer, date, expected) = site, NO_ANSWERS[name]
    usual = dict(hostile.answers)
    hostile.answers["send-node-heartbeat"], hostile.date = answer, date
    try:
        with fleet._client(hostile.address, authority, KEY) as client:
            assert fleet.Calls(client, Node(node_id=7)).heartbeat() is expected
    finally:
        hostile.answers, hostile.date = usual, ""


def test_a_deep_error_is_an_error(site: tuple[Hostile, bytes]) -> None:
    """JSON nested 5 x 10^5 times is not Flower's word that a run is over."""
    with (
        calls(site, get_run=(403, {}, b"[" * 500_000)) as functions,
        pytest.raises(FederationError, match="answers 403 to GetRun"),
    ):
        functions[2](1)


def test_a_run_that_is_over(site: tuple[Hostile, bytes]) -> None:
    """Flower's own 403 says so."""
    with (
        calls(site, get_run=(403, {}, NO_SUCH_RUN)) as functions,
        pytest.raises(RunNotRunningException),
    ):
        functions[2](1)


def test_one_message_at_a_time(site: tuple[Hostile, bytes]) -> None:
    """Several messages in an answer, or one without its tree, are refused."""
    for messages, trees in ((2, 2), (1, 0), (1, 2)):
        answer = PullMessagesResponse(
            messages_list=[Sent()] * messages, message_object_trees=[ObjectTree()] * trees
        )
        with (
            calls(site, pull_messages=(200, {}, answer.SerializeToString())) as functions,
            pytest.raises(FederationError, match=f"{messages} messages and {trees} trees"),
        ):
            functions[0]()
    with calls(site) as functions:
        assert functions[0]() is None


def test_whether_a_key_is_known(site: tuple[Hostile, bytes], tmp_path: Path) -> None:
    """Flower's 403 means yes, 401 no or a wrong clock; any other answer, or authority, is an error."""
    hostile, authority = site
    usual, late = dict(hostile.answers), formatdate(time.time() + 900, usegmt=True)
    try:
        hostile.answers["get-run"] = (403, {}, NO_SUCH_RUN)
        fleet.check_key(hostile.address, authority, KEY, 7)
        for status, date, kind, reason in (
            (401, "", fleet.NotKnown, fleet.UNKNOWN_KEY),
            (401, late, fleet.NotKnown, "set it by NTP"),
            (403, "", FederationError, "403"),
            (404, "", FederationError, "404"),
            (500, "", FederationError, "does not say"),
            (200, "", FederationError, "does not say"),
        ):
            hostile.answers["get-run"], hostile.date = (status, {}, b""), date
            with pytest.raises(kind, match=reason):
                fleet.check_key(hostile.address, authority, KEY, 7)
    finally:
        hostile.answers, hostile.date = usual, ""
    stranger, _ = certified(tmp_path / "stranger")
    with pytest.raises(FederationError, match="certificate"):
        fleet.check_key(hostile.address, stranger.encode(), KEY, 7)


def test_a_node_that_is_not_known_does_not_connect(site: tuple[Hostile, bytes], tmp_path: Path) -> None:
    """A revoked node, and one that knows another authority, get one clear error."""
    hostile, _ = site
    with pytest.raises(fleet.NotKnown), calls(site, activate_node=(401, {}, b"")):
        pass
    stranger, _ = certified(tmp_path / "stranger")
    with (
        pytest.raises(FederationError, match="is not trusted"),
        fleet.connected(hostile.address, stranger.encode(), KEY),
    ):
        pass


def measure(address: str, authority: str) -> None:
    """Prints how much memory an endless answer to each call takes, in MB."""
    from support.peaks import growth_of

    def pull(functions: tuple[Any, ...], index: int) -> None:
        with pytest.raises(FederationError):
            functions[index](*((1, "x") if index == 4 else ()))

    with fleet.connected(address, Path(authority).read_bytes(), KEY) as (_, functions):
        found = {str(index): growth_of(lambda index=index: pull(functions, index)) for index in (0, 4)}
    print(json.dumps(found))


def test_a_long_answer_takes_little_memory(tmp_path: Path) -> None:
    """A server that answers with 512 MiB costs a node the limit of the call, twice over at most."""
    with serving(tmp_path / "server") as (hostile, authority):
        hostile.answers["pull-object"] = hostile.answers["pull-messages"] = (200, {}, 512)
        (tmp_path / "ca.crt").write_bytes(authority)
        paths = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
        code = (
            f"import sys; sys.path[:0] = {paths!r}; import test_fleet; "
            f"test_fleet.measure({hostile.address!r}, {str(tmp_path / 'ca.crt')!r})"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
            env=dict(os.environ),
        )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["0"] < 8, found
    assert found["4"] < 24, found
