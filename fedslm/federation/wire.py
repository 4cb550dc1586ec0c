"""Records to Flower records and back: what a request and a reply hold."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray

from fedslm.aggregation.compression import WHOLE, Packing
from fedslm.aggregation.methods import method_of
from fedslm.config import (
    AggregationConfig,
    CompressionConfig,
    DataConfig,
    LoraConfig,
    MethodName,
    ModelConfig,
    PersonalizationConfig,
    TaskConfig,
    TrainingConfig,
)
from fedslm.errors import FederationError
from fedslm.records import AdapterState

_LARGEST_METRIC = 1e12
HELLO = "query.hello"
TRAIN = "train"
MEASURE = "evaluate"
_TENSORS = "tensors"
Status = Literal["ok", "refused", "failed"]

_SECTIONS = {
    "model": ModelConfig,
    "lora": LoraConfig,
    "data": DataConfig,
    "task": TaskConfig,
    "training": TrainingConfig,
    "aggregation": AggregationConfig,
    "compression": CompressionConfig,
    "personalization": PersonalizationConfig,
}
_NOTHING = AdapterState({})


@dataclass(frozen=True)
class Setup:
    """What stays the same over a run; every request repeats it, since a client may be new.

    Attributes:
        run_id: Identifier of the run.
        seed: The run's seed; private sampling and noise do not use it.
        directory: The run directory (simulation).
        version: fedslm's version at the server.
        aggregation: How adapters become one; the method is resolved.
        compression: What updates look like on the wire.
        personalization: What clients do for themselves after the last round.
        labels: Class names: public.
        plan: The calibrated plan, as :meth:`fedslm.privacy.plan.Plan.to_json` gives it.
        config_sha256: Hash of the run's config.
        base_sha256: Hash of the base model that the server uses.
        frozen_sha256: Hash of the frozen tensors that every client must use.
    """

    run_id: str
    seed: int
    directory: str
    version: str
    model: ModelConfig
    lora: LoraConfig
    data: DataConfig
    task: TaskConfig
    training: TrainingConfig
    aggregation: AggregationConfig
    compression: CompressionConfig
    personalization: PersonalizationConfig
    labels: tuple[str, ...]
    plan: str
    config_sha256: str = ""
    base_sha256: str = ""
    frozen_sha256: str = ""

    @property
    def method(self) -> MethodName:
        """The resolved method."""
        return method_of(self.aggregation)

    def to_json(self) -> str:
        """Serialises the setup."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for section in _SECTIONS:
            values[section] = values[section].model_dump(mode="json")
        return json.dumps(values)

    @classmethod
    def from_json(cls, text: str) -> Setup:
        """Reads what :meth:`to_json` wrote."""
        values = json.loads(text)
        for section, model in _SECTIONS.items():
            values[section] = model(**values[section])
        return cls(**{**values, "labels": tuple(values["labels"])})


@dataclass(frozen=True)
class Request:
    """What a client is asked in one round.

    Attributes:
        setup: What stays the same.
        round: Counts from 1.
        adapter: The server's moving tensors, to start from.
        turn: Which factors are trained: rounds that moved the adapter so far, and one.
        control: SCAFFOLD's server control variate; empty without it.
        frozen: The tensors that no round changes, for a node that may not have them; else empty.
    """

    setup: Setup
    round: int
    adapter: AdapterState
    turn: int = 1
    control: AdapterState = _NOTHING
    frozen: AdapterState = _NOTHING

    def to_records(self) -> RecordDict:
        """Packs the request."""
        values = ConfigRecord({"setup": self.setup.to_json(), "round": self.round, "turn": self.turn})
        return RecordDict(
            {
                "request": values,
                "adapter": to_arrays(self.adapter),
                "control": to_arrays(self.control),
                "frozen": to_arrays(self.frozen),
            }
        )

    @classmethod
    def from_records(cls, records: RecordDict) -> Request:
        """Unpacks a request."""
        values, arrays = records.config_records["request"], records.array_records
        return cls(
            Setup.from_json(str(values["setup"])),
            int(str(values["round"])),
            from_arrays(arrays["adapter"]),
            int(str(values["turn"])),
            from_arrays(arrays["control"]),
            from_arrays(arrays["frozen"]),
        )

    @property
    def packing(self) -> Packing:
        """What this round's updates look like on the wire."""
        compression = self.setup.compression
        return Packing(compression.upload, compression.keep_fraction, (self.setup.seed, self.round))

    @property
    def num_bytes(self) -> int:
        """Bytes of tensors that a client downloads."""
        return self.adapter.num_bytes + self.control.num_bytes + self.frozen.num_bytes


@dataclass(frozen=True)
class Reply:
    """What a client answers.

    Attributes:
        status: ok, refused (budget, policy, version) or failed.
        round: The round that was asked.
        reason: Why not ok; coarse under privacy.
        delta: What was trained and is sent, minus where it started; None unless ok.
        delta_sha256: Its hash.
        base_sha256: Hash of the base model that the client used.
        weight: Weight in the mean; 1 under privacy.
        statement: Signed spend statement (JSON); empty without privacy.
        metric: Noisy (sum of scores, number of units) on the client's data; None if none was asked.
        num_bytes: Bytes of tensors that came; 0 at the client.
    """

    status: Status
    round: int
    reason: str = ""
    delta: AdapterState | None = None
    delta_sha256: str = ""
    base_sha256: str = ""
    weight: float = 1.0
    statement: str = ""
    metric: tuple[float, float] | None = None
    num_bytes: int = 0

    def to_records(self, packing: Packing = WHOLE) -> RecordDict:
        """Packs the reply."""
        values = ConfigRecord(
            {
                "status": self.status,
                "round": self.round,
                "reason": self.reason,
                "delta_sha256": self.delta_sha256,
                "base_sha256": self.base_sha256,
                "weight": self.weight,
                "statement": self.statement,
            }
        )
        if self.metric is not None:
            values["metric"] = list(self.metric)
        records = RecordDict({"reply": values})
        if self.delta is not None:
            records["delta"] = _record(packing.pack(self.delta))
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
            packing: What updates look like on the wire.
            shapes: The tensors that are expected; needed unless they are packed whole.

        Raises:
            FederationError: It is not a reply.
        """
        try:
            values = dict(records.config_records["reply"])
            packed = records.array_records.get("delta")
            arrays = None if packed is None else _arrays(packed)
            status, metric = str(values["status"]), values.get("metric")
            if status not in ("ok", "refused", "failed"):
                raise ValueError(f"unknown status {status!r}")
            return cls(
                status=status,  # type: ignore[arg-type]
                round=int(str(values["round"])),
                reason=str(values["reason"]),
                delta=None if arrays is None else packing.unpack(arrays, shapes),
                delta_sha256=str(values["delta_sha256"]),
                base_sha256=str(values["base_sha256"]),
                weight=float(str(values["weight"])),
                statement=str(values["statement"]),
                metric=None if metric is None else _pair(metric),
                num_bytes=sum(each.nbytes for each in (arrays or {}).values()),
            )
        except Exception as error:  # bytes from outside: whatever they do, they are not a reply
            reason = f"{type(error).__name__}: {error}"
            raise FederationError(f"the reply cannot be read: {reason}") from error


def status_of_reply(records: RecordDict) -> str:
    """What a reply says of itself, such as "ok"; "other" if it is no answer to a training request."""
    values = records.config_records.get("reply")
    return "other" if values is None else str(values.get("status", "other"))


def _is_moderate(value: object) -> bool:
    """True for a number that sums of do not overflow."""
    return isinstance(value, int | float) and math.isfinite(value) and abs(value) <= _LARGEST_METRIC


def _pair(values: object) -> tuple[float, float]:
    """Two finite numbers."""
    if not isinstance(values, list) or len(values) != 2 or not all(map(_is_moderate, values)):
        raise ValueError("a metric is two numbers up to 10^12")
    return float(values[0]), float(values[1])


def to_arrays(state: AdapterState) -> ArrayRecord:
    """Packs tensors whole."""
    return _record(state.tensors)


def from_arrays(record: ArrayRecord) -> AdapterState:
    """Unpacks tensors.

    Raises:
        ModelError: A tensor is not float32.
        FederationError: They cannot be read.
    """
    return AdapterState(_arrays(record))


def _record(tensors: Mapping[str, NDArray[Any]]) -> ArrayRecord:
    """All tensors as one array: with real nodes, Flower makes at least two requests for each array."""
    from safetensors.numpy import save

    if not tensors:
        return ArrayRecord({})
    content = save({key: np.ascontiguousarray(value) for key, value in tensors.items()})
    return ArrayRecord({_TENSORS: Array("uint8", (len(content),), "safetensors", content)})


def _arrays(record: ArrayRecord) -> dict[str, NDArray[Any]]:
    """What :func:`_record` packed."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    if not record:
        return {}
    if set(record) != {_TENSORS}:
        raise FederationError(f"tensors come as one array called {_TENSORS!r}")
    try:
        return dict(load(record[_TENSORS].data))
    except (SafetensorError, KeyError, ValueError) as error:
        raise FederationError(f"the tensors cannot be read: {error}") from error
