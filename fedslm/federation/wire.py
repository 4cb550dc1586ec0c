"""Records to Flower records and back: what a request and a reply hold."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedslm.aggregation.methods import Method
from fedslm.config import DataConfig, LoraConfig, ModelConfig, TaskConfig, TrainingConfig
from fedslm.errors import FederationError
from fedslm.records import AdapterState

_LARGEST_METRIC = 1e12
HELLO = "query.hello"
TRAIN = "train"
Status = Literal["ok", "refused", "failed"]

_SECTIONS = {
    "model": ModelConfig,
    "lora": LoraConfig,
    "data": DataConfig,
    "task": TaskConfig,
    "training": TrainingConfig,
}


@dataclass(frozen=True)
class Setup:
    """What stays the same over a run; every request repeats it, since a client may be new.

    Attributes:
        run_id: Identifier of the run.
        seed: The run's seed; private sampling and noise do not use it.
        directory: The run directory (simulation).
        version: fedslm's version at the server.
        method: Resolved aggregation method.
        weights: "uniform" or "records".
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
    method: Method
    weights: Literal["uniform", "records"]
    labels: tuple[str, ...]
    plan: str
    config_sha256: str = ""
    base_sha256: str = ""
    frozen_sha256: str = ""

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
        adapter: The trained tensors to start from.
    """

    setup: Setup
    round: int
    adapter: AdapterState

    def to_records(self) -> RecordDict:
        """Packs the request."""
        values = ConfigRecord({"setup": self.setup.to_json(), "round": self.round})
        return RecordDict({"request": values, "adapter": to_arrays(self.adapter)})

    @classmethod
    def from_records(cls, records: RecordDict) -> Request:
        """Unpacks a request."""
        values = records.config_records["request"]
        setup = Setup.from_json(str(values["setup"]))
        return cls(setup, int(str(values["round"])), from_arrays(records.array_records["adapter"]))


@dataclass(frozen=True)
class Reply:
    """What a client answers.

    Attributes:
        status: ok, refused (budget, policy, version) or failed.
        round: The round that was asked.
        reason: Why not ok; coarse under privacy.
        adapter: The trained tensors; None unless ok.
        adapter_sha256: Their hash, computed from the model's memory.
        base_sha256: Hash of the base model that the client used.
        weight: Weight in the mean; 1 under privacy.
        statement: Signed spend statement (JSON); empty without privacy.
        metric: Noisy (sum of scores, number of units) on the client's data; None if none was asked.
    """

    status: Status
    round: int
    reason: str = ""
    adapter: AdapterState | None = None
    adapter_sha256: str = ""
    base_sha256: str = ""
    weight: float = 1.0
    statement: str = ""
    metric: tuple[float, float] | None = None

    def to_records(self) -> RecordDict:
        """Packs the reply."""
        values = ConfigRecord(
            {
                "status": self.status,
                "round": self.round,
                "reason": self.reason,
                "adapter_sha256": self.adapter_sha256,
                "base_sha256": self.base_sha256,
                "weight": self.weight,
                "statement": self.statement,
            }
        )
        if self.metric is not None:
            values["metric"] = list(self.metric)
        records = RecordDict({"reply": values})
        if self.adapter is not None:
            records["adapter"] = to_arrays(self.adapter)
        return records

    @classmethod
    def from_records(cls, records: RecordDict) -> Reply:
        """Unpacks a reply.

        Raises:
            FederationError: It is not a reply.
        """
        try:
            values = dict(records.config_records["reply"])
            arrays = records.array_records.get("adapter")
            status, metric = str(values["status"]), values.get("metric")
            if status not in ("ok", "refused", "failed"):
                raise ValueError(f"unknown status {status!r}")
            return cls(
                status=status,  # type: ignore[arg-type]
                round=int(str(values["round"])),
                reason=str(values["reason"]),
                adapter=None if arrays is None else from_arrays(arrays),
                adapter_sha256=str(values["adapter_sha256"]),
                base_sha256=str(values["base_sha256"]),
                weight=float(str(values["weight"])),
                statement=str(values["statement"]),
                metric=None if metric is None else _pair(metric),
            )
        except Exception as error:  # bytes from outside: whatever they do, they are not a reply
            reason = f"{type(error).__name__}: {error}"
            raise FederationError(f"the reply cannot be read: {reason}") from error


def _is_moderate(value: object) -> bool:
    """True for a number that sums of do not overflow."""
    return isinstance(value, int | float) and math.isfinite(value) and abs(value) <= _LARGEST_METRIC


def _pair(values: object) -> tuple[float, float]:
    """Two finite numbers."""
    if not isinstance(values, list) or len(values) != 2 or not all(map(_is_moderate, values)):
        raise ValueError("a metric is two numbers up to 10^12")
    return float(values[0]), float(values[1])


def to_arrays(state: AdapterState) -> ArrayRecord:
    """Packs tensors."""
    return ArrayRecord({key: Array(np.ascontiguousarray(state[key])) for key in state})


def from_arrays(record: ArrayRecord) -> AdapterState:
    """Unpacks tensors.

    Raises:
        ModelError: A tensor is not float32.
    """
    return AdapterState({key: array.numpy() for key, array in record.items()})
