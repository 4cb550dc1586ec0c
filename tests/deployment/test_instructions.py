"""Which instructions a node believes: the operator's, once."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import ConfigRecord, Error, Message, RecordDict

from fedslm.deployment.admission import Admission
from fedslm.deployment.instructions import NONCES, Instructions
from fedslm.engines.local import LocalGrid
from fedslm.errors import FederationError
from fedslm.privacy.keys import public_hex, signing_key
from fedslm.protocol.envelopes import RequestHeader, content_sha256, enclosed, is_answer
from fedslm.workers import InlinePool

OPERATOR = Ed25519PrivateKey.from_private_bytes(bytes([1] * 32))
RUN = 5


@pytest.fixture
def node(tmp_path: Path) -> Instructions:
    """A node that was admitted."""
    return admitted(tmp_path)


def admitted(directory: Path) -> Instructions:
    """The node in a directory."""
    key = public_hex(OPERATOR.public_key())
    admission = Admission("f", "127.0.0.1:1", "authority", key, 7, "node", "bundle", "0")
    return Instructions(directory, admission)


def instruction(directory: Path, seconds: float = 60.0, key: Ed25519PrivateKey = OPERATOR) -> Message:
    """A signed instruction for the node in a directory."""
    LocalGrid(1, InlinePool())  # tells Flower who sends
    own = public_hex(signing_key(directory).public_key())
    content = RecordDict({"request": ConfigRecord({"round": 1})})
    asked = RequestHeader("run", RUN, 1, "train", seconds)
    made = asked.envelope(own, 2, content_sha256(content), ())
    return Message(enclosed(content, made, key)[0], 7, "train", ttl=seconds)


def test_an_instruction_is_believed_once(tmp_path: Path, node: Instructions) -> None:
    """Not a second time, and not by the same node when it is started again."""
    first, second = instruction(tmp_path), instruction(tmp_path)
    assert node.believed(first, RUN).envelope.client == 2
    with pytest.raises(FederationError, match="given before"):
        node.believed(first, RUN)
    again = admitted(tmp_path)
    with pytest.raises(FederationError, match="given before"):
        again.believed(first, RUN)
    assert again.believed(second, RUN).envelope.run == "run"


def test_other_runs_keys_and_errors_are_refused(tmp_path: Path, node: Instructions) -> None:
    """Another Flower run, another operator, no content; none of them is taken note of."""
    with pytest.raises(FederationError, match="grid_run"):
        node.believed(instruction(tmp_path), RUN + 1)
    other = Ed25519PrivateKey.generate()
    with pytest.raises(FederationError, match="operator's key"):
        node.believed(instruction(tmp_path, key=other), RUN)
    asked = instruction(tmp_path)
    with pytest.raises(FederationError, match="no content"):
        node.believed(Message(Error(1, "x"), reply_to=asked), RUN)
    assert not (tmp_path / NONCES).exists()


def test_nonces_are_forgotten_when_they_are_of_no_use(tmp_path: Path, node: Instructions) -> None:
    """Long after they have expired; the file does not grow for ever."""
    node.believed(instruction(tmp_path), RUN)
    (nonce,) = json.loads((tmp_path / NONCES).read_text())
    (tmp_path / NONCES).write_text(json.dumps({nonce: time.time() - 10**6, "x": time.time()}))
    node.believed(instruction(tmp_path), RUN)
    kept = json.loads((tmp_path / NONCES).read_text())
    assert nonce not in kept
    assert len(kept) == 2


@pytest.mark.parametrize("content", ["", "[]", "{", '{"a": "b"}'])
def test_a_node_that_forgot_believes_nothing(tmp_path: Path, node: Instructions, content: str) -> None:
    """If what was given before cannot be read, anything may be a repetition."""
    (tmp_path / NONCES).write_text(content)
    with pytest.raises(FederationError, match="cannot be read"):
        node.believed(instruction(tmp_path), RUN)


def test_a_full_list_refuses(tmp_path: Path, node: Instructions) -> None:
    """Nobody makes a node's list of nonces grow without bound."""
    later = time.time() + 1000
    (tmp_path / NONCES).write_text(json.dumps({str(n): later for n in range(20_000)}))
    with pytest.raises(FederationError, match="20000 instructions"):
        node.believed(instruction(tmp_path), RUN)


def test_replies_are_signed_for_their_request(tmp_path: Path, node: Instructions) -> None:
    """The server can tell whose reply it is, and to what; an error stays as it is."""
    asked = instruction(tmp_path)
    believed = node.believed(asked, RUN)
    asked.metadata.__dict__["_message_id"] = "1"
    reply = Message(RecordDict({"reply": ConfigRecord({"status": "ok"})}), reply_to=asked)
    signed = node.signed(reply, asked, believed)
    public = signing_key(tmp_path).public_key()
    assert is_answer(signed.content, believed.request_sha256, public)
    assert not is_answer(signed.content, "another", public)
    failed = Message(Error(8, "died"), reply_to=asked)
    assert node.signed(failed, asked, believed) is failed
