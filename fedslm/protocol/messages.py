"""Requests and replies, and their conversion to and from Flower records."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from flwr.app import ConfigRecord, RecordDict

from fedslm.aggregation.compression import WHOLE, Packing
from fedslm.errors import FederationError
from fedslm.privacy.encoding import Words
from fedslm.privacy.merkle import MOST_HASHES, MOST_SEEN
from fedslm.privacy.statement import LONGEST_STATEMENT
from fedslm.protocol import bounds
from fedslm.protocol.envelopes import seen_of
from fedslm.protocol.legs import BODY, LEG_VALUES, MOST_ANSWER, Leg, body_of, leg_of
from fedslm.protocol.lifetime import DAY_SECONDS
from fedslm.protocol.setup import Setup
from fedslm.protocol.tensors import arrays_of, from_arrays, record_of
from fedslm.records import AdapterState

_LARGEST_METRIC = 1e12
_KEY_BYTES, _STATES = 32, ("adapter", "control", "frozen")
_LONGEST_EXTENSION = 64 * 1024
HELLO = "query.hello"
TRAIN = "train"
MEASURE = "evaluate"
Status = Literal["ok", "refused", "failed", "rolled-back", "needs-frozen", "needs-time"]
_STATUSES = frozenset(get_args(Status))

_LONGEST_NAME, _LONGEST_HASH = 200, 64
_REPLY_KEYS = frozenset(
    {
        "status",
        "round",
        "reason",
        "delta_sha256",
        "base_sha256",
        "weight",
        "statement",
        "extension",
        "salt",
    }
)
_REPLY_PERHAPS = ("metric", "answer_after_seconds", BODY)
_NOTHING = AdapterState({})
_WORDS = "words"


@dataclass(frozen=True)
class Request:
    """The request to a client in one round.

    Attributes:
        setup: The constants of the run.
        round: Counts from 1.
        adapter: The server's moving tensors, from which training starts.
        turn: Determines which factors are trained: number of rounds that moved the adapter, plus one.
        control: SCAFFOLD's server control variate; empty without SCAFFOLD.
        frozen: The tensors that no round changes, for a node that may not have them; otherwise empty.
        seen: What the server has seen of the node's ledger (lines, Merkle root): the reply proves that
            the ledger extends it.
        leg: What secure aggregation asks; None in a round without it.
    """

    setup: Setup
    round: int
    adapter: AdapterState
    turn: int = 1
    control: AdapterState = _NOTHING
    frozen: AdapterState = _NOTHING
    seen: tuple[tuple[int, str], ...] = ()
    leg: Leg | None = None

    def to_records(self) -> RecordDict:
        """Packs the request.

        Flower names objects by their hashes, and trusts whoever announces a name first: so each packing
        has a separate key, and no hash can be known before the message is sent.
        """
        key = secrets.token_bytes(_KEY_BYTES)
        values = ConfigRecord({"setup": self.setup.to_json(), "round": self.round, "turn": self.turn})
        values["key"] = key.hex()
        if self.leg is not None:
            values.update(self.leg.values())
        records = RecordDict({"request": values})
        for name in _STATES:
            if state := getattr(self, name):
                records[name] = record_of(state.tensors, (key, name))
        return records

    @classmethod
    def from_records(cls, records: RecordDict) -> Request:
        """Unpacks a request.

        Raises:
            FederationError: Its records or values are not those of a request, or are out of bounds.
        """
        bounds.records(records, configs=("request",), arrays=(), perhaps=_STATES)
        values, arrays = records.config_records["request"], records.array_records
        needed = ("setup", "round", "turn", "key")
        bounds.exactly(values, needed, "the request", perhaps=LEG_VALUES)
        key = _key_of(values)
        states = {
            name: from_arrays(arrays[name], (key, name)) if name in arrays else _NOTHING
            for name in _STATES
        }
        return cls(
            Setup.from_json(bounds.text(values, "setup", bounds.MOST_SETUP_BYTES)),
            bounds.count(values, "round", 1, bounds.MOST_ROUNDS),
            states["adapter"],
            bounds.count(values, "turn", 1, bounds.MOST_ROUNDS),
            states["control"],
            states["frozen"],
            seen_of(records),
            leg_of(values),
        )

    @property
    def packing(self) -> Packing:
        """The encoding of this round's updates."""
        compression = self.setup.compression
        return Packing(compression.upload, compression.keep_fraction, (self.setup.seed, self.round))

    @property
    def num_bytes(self) -> int:
        """Bytes of tensors, and of a leg, that a client downloads."""
        leg = 0 if self.leg is None else self.leg.num_bytes
        return self.adapter.num_bytes + self.control.num_bytes + self.frozen.num_bytes + leg


@dataclass(frozen=True)
class Reply:
    """The reply of a client.

    Attributes:
        status: ok, refused (budget, policy, version), failed, rolled-back (the node's ledger lacks
            lines that the server has seen), needs-frozen (the node lacks the frozen tensors; the
            next request contains them), or needs-time (the request leaves less time than the node's
            policy takes; the server may leave more).
        round: The round of the request.
        reason: Why the status is not ok; coarse under privacy.
        delta: The sent tensors: their values after training minus those before; None unless ok.
        delta_sha256: Hash of ``delta``, or of ``words``.
        base_sha256: Hash of the base model that the client used.
        weight: Weight in the mean; 1 under privacy.
        statement: Signed spend statement (JSON); empty without privacy.
        extension: Proofs that the node's ledger extends what the server has seen of it, one for each
            of the request's ``seen``.
        metric: Noisy (sum of scores, number of units) on the client's data; None if none was requested.
        answer_after_seconds: The time after which the node answers, in (0, 86,400]; only with
            needs-time.
        num_bytes: Bytes of tensors that were received; 0 at the client.
        words: Instead of ``delta``: the client's part of a sum over clients, modulo 2^32; all trained
            values in the sorted order of their keys.
        body: The protocol's answer to a leg of secure aggregation; empty without one.
    """

    status: Status
    round: int
    reason: str = ""
    delta: AdapterState | None = None
    delta_sha256: str = ""
    base_sha256: str = ""
    weight: float = 1.0
    statement: str = ""
    extension: tuple[tuple[str, ...], ...] = ()
    metric: tuple[float, float] | None = None
    answer_after_seconds: float | None = None
    num_bytes: int = 0
    words: Words | None = None
    body: bytes = b""

    def to_records(self, packing: Packing = WHOLE) -> RecordDict:
        """Packs the reply."""
        values = ConfigRecord(
            {
                "status": self.status,
                "round": self.round,
                "reason": bounds.cut(self.reason, bounds.LONGEST_REASON - 1),
                "delta_sha256": self.delta_sha256,
                "base_sha256": self.base_sha256,
                "weight": self.weight,
                "statement": self.statement,
                "extension": json.dumps(self.extension),
                "salt": secrets.token_hex(16),  # no other node can predict a refusal's hash
            }
        )
        if self.metric is not None:
            values["metric"] = list(self.metric)
        if self.answer_after_seconds is not None:
            values["answer_after_seconds"] = float(self.answer_after_seconds)
        if self.body:
            values[BODY] = self.body
        records = RecordDict({"reply": values})
        if self.delta is not None:
            records["delta"] = record_of(packing.pack(self.delta))
        if self.words is not None:
            records[_WORDS] = record_of({_WORDS: self.words})
        return records

    @classmethod
    def from_records(
        cls,
        records: RecordDict,
        packing: Packing = WHOLE,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
    ) -> Reply:
        """Unpacks a reply.

        Args:
            records: The content of the message.
            packing: The encoding of updates.
            shapes: The expected tensors; required unless they are packed whole.

        Raises:
            FederationError: It is not a reply.
        """
        try:
            return cls._from(records, packing, shapes)
        except Exception as error:  # bytes from outside: on any error, they are not a reply
            reason = bounds.cut(f"{type(error).__name__}: {error}")
            raise FederationError(f"the reply cannot be read: {reason}") from error

    @classmethod
    def _from(
        cls, records: RecordDict, packing: Packing, shapes: Mapping[str, tuple[int, ...]] | None
    ) -> Reply:
        """Unpacks a reply; may raise any exception."""
        bounds.records(records, configs=("reply",), arrays=(), perhaps=("delta", _WORDS))
        values, packed = records.config_records["reply"], records.array_records.get("delta")
        bounds.exactly(values, _REPLY_KEYS, "the reply", perhaps=_REPLY_PERHAPS)
        status, metric = bounds.text(values, "status", _LONGEST_NAME), values.get("metric")
        if status not in _STATUSES:
            raise ValueError(f"unknown status {status!r}")
        most = None if shapes is None else most_bytes(packing, shapes)
        delta, received = None, 0
        if packed is not None and packing.is_whole:
            delta = from_arrays(packed, most_bytes=most)
            received = delta.num_bytes
        elif packed is not None:
            arrays = arrays_of(packed, packing.number_types, most)
            delta = packing.unpack(arrays, shapes)
            received = sum(each.nbytes for each in arrays.values())
        words = _words_of(records, most)
        received = received if words is None else words.nbytes
        if not _is_moderate(values["weight"]):
            raise ValueError("weight must be a number up to 10^12")
        if (status == "needs-time") != ("answer_after_seconds" in values):
            raise ValueError("answer_after_seconds goes with the status needs-time")
        return cls(
            status=status,  # type: ignore[arg-type]
            round=bounds.count(values, "round", 0, bounds.MOST_ROUNDS),
            reason=bounds.text(values, "reason", bounds.LONGEST_REASON),
            delta=delta,
            delta_sha256=bounds.text(values, "delta_sha256", _LONGEST_HASH),
            base_sha256=bounds.text(values, "base_sha256", _LONGEST_HASH),
            weight=float(values["weight"]),  # type: ignore[arg-type]
            statement=bounds.text(values, "statement", LONGEST_STATEMENT),
            extension=proofs_of(values["extension"]),
            metric=None if metric is None else _pair(metric),
            answer_after_seconds=_period(values.get("answer_after_seconds")),
            num_bytes=received,
            words=words,
            body=body_of(values, MOST_ANSWER),
        )


def _words_of(records: RecordDict, most: int | None) -> Words | None:
    """Reads a part of a sum: one axis of whole numbers modulo 2^32; None if there is none."""
    if _WORDS not in records.array_records:
        return None
    if "delta" in records.array_records:
        raise ValueError("a reply has an update, or a part of a sum, and not both")
    arrays = arrays_of(records.array_records[_WORDS], ("U32",), most)
    bounds.exactly(arrays, (_WORDS,), "a part of a sum")
    if arrays[_WORDS].ndim != 1:
        raise ValueError("a part of a sum has one axis")
    return arrays[_WORDS]


def most_bytes(packing: Packing, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Largest number of bytes of a reply's tensors with these shapes."""
    values = sum(packing.bytes_of(math.prod(shape)) for shape in shapes.values())
    return bounds.most_tensor_bytes(packing.keys_of(shapes), values)


def round_of(records: RecordDict) -> int:
    """The round that a request names, for the log and for a refusal; 0 if it names none that can be."""
    values = records.config_records.get("request")
    number = None if values is None else values.get("round")
    return number if type(number) is int and 0 < number <= bounds.MOST_ROUNDS else 0


def status_of_reply(records: RecordDict) -> str:
    """The status of a reply, such as "ok"; "other" if it does not answer a training request."""
    values = records.config_records.get("reply")
    return "other" if values is None else str(values.get("status", "other"))


def _key_of(values: Mapping[str, Any]) -> bytes:
    """The key of a request's tensors."""
    try:
        key = bytes.fromhex(bounds.text(values, "key", 2 * _KEY_BYTES))
    except ValueError as error:
        raise FederationError("key must be hexadecimal digits") from error
    if len(key) != _KEY_BYTES:
        raise FederationError(f"key must have {_KEY_BYTES} bytes")
    return key


def proofs_of(text: object) -> tuple[tuple[str, ...], ...]:
    """Reads what :class:`Reply` writes for ``extension``."""
    found = bounds.parsed(text, _LONGEST_EXTENSION, "extension")
    if type(found) is not list or len(found) > MOST_SEEN:
        raise FederationError(f"extension must be at most {MOST_SEEN} proofs")
    return tuple(
        bounds.texts({"extension": proof}, "extension", MOST_HASHES, _LONGEST_HASH) for proof in found
    )


def _is_moderate(value: object) -> bool:
    """True for a number whose sums do not overflow."""
    return type(value) in (int, float) and abs(value) <= _LARGEST_METRIC  # type: ignore[arg-type]


def _period(value: object) -> float | None:
    """Reads a time of at most a day, or None."""
    if value is None:
        return None
    if type(value) is not float or not 0 < value <= DAY_SECONDS:
        raise ValueError(f"answer_after_seconds must be a number in (0, {DAY_SECONDS:g}]")
    return value


def _pair(values: object) -> tuple[float, float]:
    """Reads two finite numbers."""
    if not isinstance(values, list) or len(values) != 2 or not all(map(_is_moderate, values)):
        raise ValueError("a metric is two numbers up to 10^12")
    return float(values[0]), float(values[1])
