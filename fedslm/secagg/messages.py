"""The messages of the protocol: strict, bounded, and each in one encoding only.

Formal guarantees of :func:`decode`, whatever the bytes are:
    * It parses at most 256 KiB, and returns only a message whose every field has its type and is
      within its bounds; anything else is a FederationError.
    * The same message has the same bytes: text with other spaces, key orders, doubled or further keys,
      or another version is refused.

A masked vector is sent next to its message, as raw little-endian uint32.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, TypeVar

from fedslm.errors import FederationError
from fedslm.privacy.keys import sha256_of
from fedslm.secagg.cohort import MOST_CLIENT, MOST_NODES, Cohort, check_count, is_ascending
from fedslm.secagg.shamir import SHARE_BYTES

VERSION = 1
MOST_MESSAGE_BYTES = 1 << 18
NONCE_BYTES, TAG_BYTES = 12, 16
BOX_BYTES = NONCE_BYTES + 2 * SHARE_BYTES + TAG_BYTES
_HASH_BYTES, _KEY_BYTES, _SIGNATURE_BYTES = 32, 32, 64


def _hexadecimal(num_bytes: int) -> Any:
    """A field of a certain number of bytes."""
    return field(metadata={"read": lambda value: _hex(value, num_bytes)})


def _by_client(num_bytes: int) -> Any:
    """A field with some bytes for each of several clients."""
    return field(metadata={"read": lambda value: _map(value, num_bytes)})


def _read_with(read: Callable[[Any], Any]) -> Any:
    """A field that a function reads."""
    return field(metadata={"read": read})


def _hex(value: Any, num_bytes: int) -> str:
    """Reads lower-case hexadecimal digits."""
    if type(value) is not str or not re.fullmatch(f"[0-9a-f]{{{2 * num_bytes}}}", value):
        raise FederationError(f"a value must have {2 * num_bytes} hexadecimal digits")
    return value


def _client(value: Any) -> int:
    """Reads a client's number."""
    check_count("client", value, 0, MOST_CLIENT)
    return int(value)


def _clients(value: Any) -> tuple[int, ...]:
    """Reads clients in ascending order."""
    if type(value) is not list or len(value) > MOST_NODES:
        raise FederationError(f"a message names at most {MOST_NODES} clients, in a list")
    found = tuple(map(_client, value))
    if not is_ascending(found):
        raise FederationError("a message names each client once, in ascending order")
    return found


def _map(value: Any, num_bytes: int) -> dict[int, str]:
    """Reads pairs of a client and bytes, in ascending order of clients."""
    if type(value) is not list or not all(type(pair) is list and len(pair) == 2 for pair in value):
        raise FederationError("a message holds a list of pairs of a client and a value")
    clients = _clients([client for client, _ in value])
    return dict(zip(clients, (_hex(each, num_bytes) for _, each in value), strict=True))


@dataclass(frozen=True)
class PublicKeys:
    """A node's keys for one attempt: its reply to the first leg.

    Attributes:
        client: The node.
        share_key: X25519 key for the encryption of shares.
        mask_key: X25519 key for masks.
        commitment: Hash of the self mask's seed.
        signature: Signature with the ledger key.
    """

    kind: ClassVar[str] = "keys"
    client: int = _read_with(_client)
    share_key: str = _hexadecimal(_KEY_BYTES)
    mask_key: str = _hexadecimal(_KEY_BYTES)
    commitment: str = _hexadecimal(_HASH_BYTES)
    signature: str = _hexadecimal(_SIGNATURE_BYTES)


def _cohort(value: Any) -> Cohort:
    """Reads a cohort."""
    if type(value) is not dict or set(value) != {each.name for each in fields(Cohort)}:
        raise FederationError("a cohort has other values")
    clients = _clients(value["clients"])
    return Cohort(**{**value, "clients": clients})


def _keys(value: Any) -> tuple[PublicKeys, ...]:
    """Reads the keys of several nodes."""
    if type(value) is not list or len(value) > MOST_NODES:
        raise FederationError(f"a message holds the keys of at most {MOST_NODES} nodes, in a list")
    found = tuple(_values_of(PublicKeys, each) for each in value)
    _clients([each.client for each in found])
    return found


@dataclass(frozen=True)
class KeysRequest:
    """The server names the cohort."""

    kind: ClassVar[str] = "keys-request"
    cohort: Cohort = field(metadata={"read": _cohort})


@dataclass(frozen=True)
class SharesRequest:
    """The server gives everybody's keys.

    Attributes:
        context: Hash of the cohort.
        keys: Keys of the nodes that answered.
    """

    kind: ClassVar[str] = "shares-request"
    context: str = _hexadecimal(_HASH_BYTES)
    keys: tuple[PublicKeys, ...] = _read_with(_keys)


@dataclass(frozen=True)
class Shares:
    """A node gives its encrypted shares.

    Attributes:
        context: :func:`keys_context`.
        client: The node.
        boxes: Receiver to ciphertext.
    """

    kind: ClassVar[str] = "shares"
    context: str = _hexadecimal(_HASH_BYTES)
    client: int = _read_with(_client)
    boxes: Mapping[int, str] = _by_client(BOX_BYTES)


@dataclass(frozen=True)
class InputRequest:
    """The server gives a node the shares that its peers encrypted for it.

    Attributes:
        context: :func:`keys_context`.
        boxes: Sender to ciphertext; the senders and the node itself are those who are masked for.
    """

    kind: ClassVar[str] = "input-request"
    context: str = _hexadecimal(_HASH_BYTES)
    boxes: Mapping[int, str] = _by_client(BOX_BYTES)


@dataclass(frozen=True)
class InputHead:
    """What a node sends next to its masked vector.

    Attributes:
        context: :func:`sharers_context`.
        client: The node.
        unreadable: Peers whose shares it could not decrypt.
    """

    kind: ClassVar[str] = "input"
    context: str = _hexadecimal(_HASH_BYTES)
    client: int = _read_with(_client)
    unreadable: tuple[int, ...] = _read_with(_clients)


@dataclass(frozen=True)
class SurvivorsRequest:
    """The server names those who sent a masked input.

    Attributes:
        context: :func:`sharers_context`.
        survivors: Who they are.
    """

    kind: ClassVar[str] = "survivors-request"
    context: str = _hexadecimal(_HASH_BYTES)
    survivors: tuple[int, ...] = _read_with(_clients)


@dataclass(frozen=True)
class SurvivorsSignature:
    """A node signs who they are.

    Attributes:
        context: :func:`survivors_context`.
        client: The node.
        signature: Signature with the ledger key.
    """

    kind: ClassVar[str] = "survivors"
    context: str = _hexadecimal(_HASH_BYTES)
    client: int = _read_with(_client)
    signature: str = _hexadecimal(_SIGNATURE_BYTES)


@dataclass(frozen=True)
class UnmaskRequest:
    """The server proves that the threshold of survivors signed the same set.

    Attributes:
        context: :func:`survivors_context`.
        signatures: Survivor to signature.
    """

    kind: ClassVar[str] = "unmask-request"
    context: str = _hexadecimal(_HASH_BYTES)
    signatures: Mapping[int, str] = _by_client(_SIGNATURE_BYTES)


@dataclass(frozen=True)
class Unmask:
    """A node gives one share of each peer.

    Attributes:
        context: :func:`survivors_context`.
        client: The node.
        seeds: Survivor to a share of its seed.
        mask_keys: Dropped node to a share of its mask key.
    """

    kind: ClassVar[str] = "unmask"
    context: str = _hexadecimal(_HASH_BYTES)
    client: int = _read_with(_client)
    seeds: Mapping[int, str] = _by_client(SHARE_BYTES)
    mask_keys: Mapping[int, str] = _by_client(SHARE_BYTES)


M = TypeVar("M")


def encode(message: Any) -> bytes:
    """The only encoding of a message.

    >>> encode(SurvivorsRequest("00" * 32, (1, 2)))[:39]
    b'{"context":"000000000000000000000000000'
    """
    values = {"version": VERSION, "kind": message.kind, **_plain(asdict(message))}
    return json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def decode(expected: type[M], content: bytes) -> M:
    """Reads a message from outside.

    Args:
        expected: Class of the message.
        content: Any bytes.

    Raises:
        FederationError: It is not a message of this class, or a value is out of its bounds.
    """
    if type(content) is not bytes or len(content) > MOST_MESSAGE_BYTES:
        raise FederationError(f"a message must be at most {MOST_MESSAGE_BYTES} bytes")
    kind = getattr(expected, "kind", "")
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise FederationError(f"the message {kind!r} cannot be read: {str(error)[:100]}") from error
    if type(values) is not dict or values.pop("kind", None) != kind:
        raise FederationError(f"the message is not of the kind {kind!r}")
    if values.pop("version", None) != VERSION:
        raise FederationError(
            f"the message {kind!r} must have version {VERSION}: use one release of fedslm"
        )
    message = _values_of(expected, values)
    if encode(message) != content:
        raise FederationError(f"the message {kind!r} is not in its only encoding")
    return message


def keys_context(cohort: Cohort, keys: Iterable[PublicKeys]) -> str:
    """Hash of the cohort and of the keys of all who answered the first leg."""
    return sha256_of({"cohort_sha256": cohort.sha256, "keys": [asdict(each) for each in keys]})


def sharers_context(context: str, sharers: Iterable[int]) -> str:
    """Hash of :func:`keys_context` and of who sent shares."""
    return sha256_of({"context": context, "sharers": sorted(sharers)})


def survivors_context(context: str, survivors: Iterable[int]) -> str:
    """Hash of :func:`sharers_context` and of who sent a masked input."""
    return sha256_of({"context": context, "survivors": sorted(survivors)})


def _values_of(expected: type[M], values: Any) -> M:
    """An object of a message's class, each field read."""
    known = {each.name: each.metadata["read"] for each in fields(expected)}  # type: ignore[arg-type]
    if type(values) is not dict or set(values) != set(known):
        raise FederationError(f"a message must have exactly the values {', '.join(known)}")
    return expected(**{name: read(values[name]) for name, read in known.items()})


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of JSON: what has a value for each client becomes a list of pairs."""
    return {
        name: sorted(value.items()) if type(value) is dict and _is_by_client(value) else value
        for name, value in values.items()
    }


def _is_by_client(values: Mapping[Any, Any]) -> bool:
    """Whether all keys are clients."""
    return all(type(key) is int for key in values)
