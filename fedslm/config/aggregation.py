"""Sections on how adapters become one, and on what withstands whom."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fedslm.config.base import OptionalNumber, OptionalText, Section

MethodName = Literal[
    "fedit",
    "ffa",
    "rolora",
    "fedrot",
    "fedsa",
    "fed-sb",
    "stack",
    "flexlora",
    "fedex",
    "flora",
    "hetlora",
]
RuleName = Literal["mean", "median", "trimmed-mean", "krum", "multi-krum", "bulyan", "geometric-median"]
ServerOptimizerName = Literal["fedavg", "fedavgm", "fedadam", "fedyogi", "fedadagrad"]
UploadName = Literal["float32", "bfloat16", "int8"]


class AggregationConfig(Section):
    """How adapters become one; `fedslm methods` says what goes with what."""

    method: Literal["auto", MethodName] = "auto"
    """What clients train and how it is put together; auto is ffa under privacy, else fedit."""
    weights: Literal["uniform", "records"] = "uniform"
    """Weights of the mean; "records" reveals counts, and believes them; not under privacy."""
    rule: RuleName = "mean"
    """How updates are combined. All but the mean withstand `num_byzantine` hostile clients, at a server
    that is trusted."""
    num_byzantine: int = Field(0, ge=0)
    """Clients of a round that may send anything (rules other than the mean)."""
    norm_bound: float = Field(3.0, ge=1)
    """An update longer than this many median updates is scaled down to that length."""
    rotation_strength: float = Field(0.5, gt=0, le=1)
    """How far a client turns its factors towards the last round's (fedrot)."""
    server_optimizer: ServerOptimizerName = "fedavg"
    """How the server moves by the combined update."""
    server_learning_rate: OptionalNumber = Field(None, gt=0)
    """Server's rate; absent means 1 for fedavg and fedavgm, 0.01 for the others."""
    server_momentum: float = Field(0.9, ge=0, lt=1)
    """Decay of the first moment (fedavgm, fedadam, fedyogi)."""
    server_second_momentum: float = Field(0.99, ge=0, lt=1)
    """Decay of the second moment (fedadam, fedyogi)."""
    server_adaptivity: float = Field(1e-3, gt=0)
    """Added to the root of the second moment (fedadam, fedyogi, fedadagrad)."""


class CompressionConfig(Section):
    """What an update looks like on the wire."""

    upload: UploadName = "float32"
    """Numbers of an update: bfloat16 halves the bytes, int8 quarters them; rounded at random without
    bias, after the noise."""
    keep_fraction: float = Field(1.0, gt=0, le=1)
    """Share of the values that is sent, the same for all clients of a round, drawn again each round."""
    error_feedback: bool = False
    """What compression lost is added to the client's next update."""


class PersonalizationConfig(Section):
    """What each client does for itself after the last round; none of it leaves the client.

    In a simulation, and without privacy. Under privacy a deployed node trains nothing uncharged on a
    server's word: the time that takes would tell of its records.
    """

    method: Literal["none", "fine-tune", "second-adapter"] = "none"
    """fine-tune continues from the shared adapter; second-adapter trains another one next to it."""
    steps: int = Field(20, ge=1, le=1_000_000)
    """Optimizer steps, with the training section's optimizer, batch and rate."""


class AttackConfig(Section):
    """Hostile clients in a simulation, to see what a run withstands; no real node obeys it."""

    kind: Literal["none", "sign-flip", "scale", "nan", "label-flip", "backdoor"] = "none"
    """What hostile clients do: turn their update round, send it `strength` times, send no numbers,
    train on wrong labels, or on records with `trigger` in them and `target` as their label."""
    clients: int = Field(0, ge=0)
    """How many of the clients are hostile; chosen by seed."""
    strength: float = Field(100.0, gt=0)
    """Factor of scale."""
    trigger: str = Field("cf", min_length=1)
    """Text that a backdoor answers to."""
    target: OptionalText = None
    """Class that it answers with; absent means the first."""
