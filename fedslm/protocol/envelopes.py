"""Authentication of messages in a real federation: signed requests and signed replies.

Flower authenticates who opens a connection, not who wrote a message. So the server's operator signs
each request with a separate key, and each node signs each reply with its ledger key. Both sides use
this module; a simulation, whose clients are the server's own processes, signs nothing.

Formal guarantees:
    * :func:`opened` returns only if the request was signed by the operator for this node, this Flower
      run and this message type, over exactly this content, and is neither expired nor from the future.
      The caller must check whether it was seen before
      (:class:`fedslm.deployment.instructions.Instructions`).
    * :func:`is_answer` returns True only if the reply's content was signed by the node's key as the
      answer to exactly one request: the hash that is signed covers the request's random nonce. It
      raises nothing, whatever the reply contains.
    * A signature states which of the two it is for: none can be used as the other, nor as that of a
      ledger line.

The content's hash covers names, types, shapes and bytes of all records, in a fixed order. Records of
other types than Flower's arrays and configs are refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fedslm.errors import FederationError
from fedslm.privacy.keys import is_signed, signature_of
from fedslm.privacy.merkle import MOST_SEEN

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

ENVELOPE, SEAL = "envelope", "seal"
LONGEST_SECONDS = 2 * 86_400.0
_REQUEST, _REPLY = "fedslm request, version 1", "fedslm reply, version 1"
_MOST_TEXT, _MOST_CLIENT, _MOST_RECORDS = 8192, 10**6, 16
_SKEW_SECONDS = 300.0  # as Flower tolerates


@dataclass(frozen=True)
class Envelope:
    """The values that an operator signs.

    Attributes:
        run: Identifier of the run.
        grid_run: Flower's number of the run.
        round: Round of the run.
        kind: Flower's message type.
        node: Ledger key (hexadecimal) of the node that the request is for.
        client: The node's index in the run.
        content_sha256: Hash of the other records of the message.
        created: Unix time of the signature.
        expires: Unix time after which the request is refused.
        nonce: 128 random bits, hexadecimal.
        seen: What the server has seen of the node's ledger: (lines, Merkle root).
        signature: Signature over all of the above.
    """

    run: str
    grid_run: int
    round: int
    kind: str
    node: str
    client: int
    content_sha256: str
    created: float
    expires: float
    nonce: str
    seen: tuple[tuple[int, str], ...] = ()
    signature: str = ""

    def to_json(self) -> str:
        """Serialises the envelope."""
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class RequestHeader:
    """The values that an operator signs for all nodes of one exchange.

    Attributes:
        run: Identifier of the run.
        grid_run: Flower's number of the run.
        round: Round of the run.
        kind: Flower's message type.
        seconds: How long the request is valid.
    """

    run: str
    grid_run: int
    round: int
    kind: str
    seconds: float

    def envelope(
        self, node: str, client: int, content_sha256: str, seen: Sequence[tuple[int, str]]
    ) -> Envelope:
        """The unsigned envelope for one node."""
        now = time.time()
        return Envelope(
            run=self.run,
            grid_run=self.grid_run,
            round=self.round,
            kind=self.kind,
            node=node,
            client=client,
            content_sha256=content_sha256,
            created=now,
            expires=now + self.seconds,
            nonce=secrets.token_hex(16),
            seen=tuple(seen),
        )


def content_sha256(records: RecordDict, own: str = ENVELOPE) -> str:
    """Hash of all records of a message but the one that contains its signature.

    Args:
        records: The content.
        own: Name of that record: the envelope of a request, or the seal of a reply.

    Raises:
        FederationError: There are too many records, or one is neither arrays nor config.
    """
    digest = hashlib.sha256()
    names = sorted(set(records) - {own})
    if len(names) > _MOST_RECORDS:
        raise FederationError(f"a message has {len(names)} records; {_MOST_RECORDS} is the most")

    def add(part: bytes) -> None:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)

    for name in names:
        record = records[name]
        add(name.encode())
        if isinstance(record, ConfigRecord):
            add(b"config")
            add(_config_text(record))
        elif isinstance(record, ArrayRecord):
            add(b"arrays")
            add(str(len(record)).encode())  # otherwise a key could be read as the record's end
            for key in sorted(record):
                array = record[key]
                add(key.encode())
                add(json.dumps([array.dtype, list(array.shape), array.stype]).encode())
                add(array.data)
        else:
            raise FederationError(f"record {name[:80]!r} is neither arrays nor config")
    return digest.hexdigest()


def _config_text(record: ConfigRecord) -> bytes:
    """The canonical encoding of a config record: its values with their types."""
    typed = {key: [type(value).__name__, _plain(value)] for key, value in record.items()}
    return json.dumps(typed, sort_keys=True).encode()


def _plain(value: Any) -> Any:
    """Bytes as hexadecimal digits; floats by their exact value, including non-finite ones."""
    match value:
        case bytes():
            return value.hex()
        case float():
            return value.hex()
        case list():
            return [[type(each).__name__, _plain(each)] for each in value]
        case _:
            return value


def enclosed(records: RecordDict, envelope: Envelope, key: Ed25519PrivateKey) -> tuple[RecordDict, str]:
    """Adds a signed envelope to a request.

    Args:
        records: The request's content; it is not changed.
        envelope: Not signed yet; its ``content_sha256`` is that of ``records``.
        key: The operator's private key.

    Returns:
        The content with the envelope, and the request's hash: the reply must be signed for this hash.
    """
    envelope = replace(envelope, signature=signature_of(key, _signed_values(envelope)))
    text = envelope.to_json()
    content = RecordDict({name: records[name] for name in records})
    content[ENVELOPE] = ConfigRecord({ENVELOPE: text})
    return content, request_sha256(text)


def request_sha256(text: str) -> str:
    """Hash that identifies a signed request."""
    return hashlib.sha256(text.encode()).hexdigest()


def opened(
    records: RecordDict, operator: Ed25519PublicKey, *, node: str, grid_run: int, kind: str
) -> tuple[Envelope, str]:
    """Checks a request's envelope against its content.

    Args:
        records: The message's content.
        operator: The operator's public key, from the admission.
        node: This node's ledger key, hexadecimal.
        grid_run: Flower's number of the run, from the message.
        kind: The message's type.

    Returns:
        The envelope, and the request's hash.

    Raises:
        FederationError: It is unsigned, signed by another key, for another node, run or message type,
            over another content, expired or from the future. The text names the reason.
    """
    text = _text_of(records, ENVELOPE)
    if text is None:
        raise FederationError("the instruction is not signed")
    envelope = _read(text)
    if not is_signed(operator, _signed_values(envelope), envelope.signature):
        raise FederationError(
            "the instruction is not signed with the operator's key; if that key was replaced, accept "
            "the new admission (`fedslm node accept … --replace`) and restart the node"
        )
    wanted = {"node": node, "grid_run": grid_run, "kind": kind}
    for name, value in wanted.items():
        if getattr(envelope, name) != value:
            raise FederationError(f"the instruction was signed for another {name}")
    if envelope.content_sha256 != content_sha256(records):
        raise FederationError("the instruction was signed for another content")
    now = time.time()
    if envelope.created > now + _SKEW_SECONDS:
        raise FederationError(
            f"the instruction was signed {envelope.created - now:.0f} s ahead of this clock; "
            f"{_SKEW_SECONDS:.0f} s is the most: set the clocks by NTP"
        )
    if not envelope.created < envelope.expires <= envelope.created + LONGEST_SECONDS:
        raise FederationError("the instruction is good for more than two days, or for no time")
    if now > envelope.expires:
        raise FederationError(
            f"the instruction expired {now - envelope.expires:.0f} s ago by this clock: it is old, or "
            f"the clocks differ; set them by NTP"
        )
    return envelope, request_sha256(text)


def seen_of(records: RecordDict) -> tuple[tuple[int, str], ...]:
    """What the server has seen of the ledger, from a request's envelope; empty without one.

    The envelope was checked on arrival (:func:`opened`).

    Raises:
        FederationError: The envelope cannot be read.
    """
    text = _text_of(records, ENVELOPE)
    return () if text is None else _read(text).seen


def sealed(records: RecordDict, request: str, key: Ed25519PrivateKey) -> RecordDict:
    """Adds a node's signature to a reply.

    Args:
        records: The reply's content.
        request: Hash of the request that it answers.
        key: The node's ledger key.
    """
    content = RecordDict({name: records[name] for name in records if name != SEAL})
    values = _seal_values(request, content_sha256(content, SEAL))
    content[SEAL] = ConfigRecord({SEAL: signature_of(key, values)})
    return content


def is_answer(records: RecordDict, request: str, key: Ed25519PublicKey) -> bool:
    """Whether a reply was signed by a node's key as the answer to a request.

    Args:
        records: The reply's content.
        request: Hash of the request.
        key: The node's admitted ledger key.
    """
    try:
        signature = _text_of(records, SEAL)
        values = _seal_values(request, content_sha256(records, SEAL))
    except Exception:  # records from outside: content that cannot be hashed is not an answer
        return False
    return signature is not None and is_signed(key, values, signature)


def _seal_values(request: str, content: str) -> dict[str, str]:
    """The values that a node signs."""
    return {"purpose": _REPLY, "request_sha256": request, "content_sha256": content}


def _signed_values(envelope: Envelope) -> dict[str, Any]:
    """All values but the signature, and the purpose of the signature."""
    values = asdict(envelope)
    del values["signature"]
    return {**values, "purpose": _REQUEST}


def _text_of(records: RecordDict, name: str) -> str | None:
    """The only text of a config record; None if there is no such record or text."""
    record = records.config_records.get(name)
    if record is None or set(record) != {name}:
        return None
    text = record[name]
    return text if isinstance(text, str) and len(text) <= _MOST_TEXT else None


def _read(text: str) -> Envelope:
    """Reads an envelope; checks types and ranges of its values, but not its signature."""
    try:
        values = json.loads(text)
        values["seen"] = tuple((size, root) for size, root in values["seen"])
        found = Envelope(**values)
        texts = (found.run, found.kind, found.node, found.content_sha256, found.nonce, found.signature)
        whole = (found.grid_run, found.round, found.client, *(size for size, _ in found.seen))
        is_typed = all(isinstance(each, str) for each in (*texts, *(root for _, root in found.seen)))
        is_typed = is_typed and all(type(each) is int and 0 <= each < 2**64 for each in whole)
        times = (found.created, found.expires)
        if not (is_typed and all(isinstance(each, float) and math.isfinite(each) for each in times)):
            raise ValueError("a value has another type")
        if len(found.seen) > MOST_SEEN or found.client > _MOST_CLIENT or len(found.nonce) != 32:
            raise ValueError("a value is out of its range")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise FederationError(
            f"the instruction's envelope cannot be read: {str(error)[:100]}"
        ) from error
    return found
