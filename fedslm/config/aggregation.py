"""Sections on aggregation, compression, personalization and simulated attacks."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fedslm.config.base import OptionalCount, OptionalNumber, OptionalText, Section

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
    "head",
]
RuleName = Literal["mean", "median", "trimmed-mean", "krum", "multi-krum", "bulyan", "geometric-median"]
ServerOptimizerName = Literal["fedavg", "fedavgm", "fedadam", "fedyogi", "fedadagrad"]
UploadName = Literal["float32", "bfloat16", "int8"]


class AggregationConfig(Section):
    """Aggregation of client updates; `fedslm methods` lists the valid combinations."""

    method: Literal["auto", MethodName] = "auto"
    """What clients train and how updates are aggregated; auto is ffa under privacy, else fedit."""
    weights: Literal["uniform", "records"] = "uniform"
    """Weights of the mean; "records" reveals and trusts record counts: not under privacy."""
    rule: RuleName = "mean"
    """Robust rule; all but the mean tolerate `num_byzantine` clients, and need a
    trusted server."""
    num_byzantine: int = Field(0, ge=0)
    """Number of Byzantine clients in a round to tolerate (rules other than the mean)."""
    norm_bound: float = Field(3.0, ge=1)
    """An update is scaled down to at most this many times the median update norm."""
    rotation_strength: float = Field(0.5, gt=0, le=1)
    """How far a client rotates its factors towards the last round's (fedrot)."""
    server_optimizer: ServerOptimizerName = "fedavg"
    """How the server applies the combined update."""
    server_learning_rate: OptionalNumber = Field(None, gt=0)
    """Server learning rate; absent means 1 for fedavg and fedavgm, 0.01 for the others."""
    server_momentum: float = Field(0.9, ge=0, lt=1)
    """Decay of the first moment (fedavgm, fedadam, fedyogi)."""
    server_second_momentum: float = Field(0.99, ge=0, lt=1)
    """Decay of the second moment (fedadam, fedyogi)."""
    server_adaptivity: float = Field(1e-3, gt=0)
    """Added to the root of the second moment (fedadam, fedyogi, fedadagrad)."""


class SecureAggregationConfig(Section):
    """Sums over clients, for noise that they share (privacy.noise = "distributed")."""

    threshold: OptionalCount = Field(None, ge=2)
    """Fewest clients whose sum is formed: with fewer answers a round moves nothing."""
    max_colluding: int = Field(0, ge=0)
    """Most clients that may tell the server what they sent: epsilon holds against all of them
    together. The others of the threshold, at least two, must be honest: they share the noise."""
    protocol: Literal["masked", "ideal"] = "masked"
    """How sums are formed. "masked": by secure aggregation, so the server learns only the sum. "ideal":
    by the server, from what it could read client by client; only in simulations, refused on real
    nodes."""
    leg_deadline_seconds: float = Field(60.0, gt=0)
    """Longest wait for the answers to one of the four short legs of "masked". The leg in which clients
    train has federation.round_deadline_seconds."""


class CompressionConfig(Section):
    """Compression of client updates."""

    upload: UploadName = "float32"
    """Precision of an update: bfloat16 halves the bytes, int8 quarters them. Rounding is stochastic and
    unbiased, after the noise."""
    keep_fraction: float = Field(1.0, gt=0, le=1)
    """Share of values to send: the same values at all clients of a round, redrawn each round."""
    error_feedback: bool = False
    """Add what compression lost to the client's next update."""


class PersonalizationConfig(Section):
    """Local adapters that each client trains after the last round; they never leave the client.

    Only in a simulation, and only without privacy. Under privacy, a deployed node does no uncharged
    training at a server's request: the time it takes would reveal information about its records.
    """

    method: Literal["none", "fine-tune", "second-adapter"] = "none"
    """fine-tune continues from the shared adapter; second-adapter trains another one next to it."""
    steps: int = Field(20, ge=1, le=1_000_000)
    """Optimizer steps, with the training section's optimizer, batch and rate."""


class AttackConfig(Section):
    """Hostile clients in a simulation, to test robustness; real nodes ignore it."""

    kind: Literal["none", "sign-flip", "scale", "nan", "label-flip", "backdoor"] = "none"
    """What hostile clients do: negate their update, multiply it by `strength`, send NaN, train on wrong
    labels, or train on records that contain `trigger` and have `target` as label."""
    clients: int = Field(0, ge=0)
    """How many of the clients are hostile; chosen by seed."""
    strength: float = Field(100.0, gt=0)
    """Factor of the scale attack."""
    trigger: str = Field("cf", min_length=1)
    """Text that triggers the backdoor."""
    target: OptionalText = None
    """Class that the backdoor predicts; absent means the first."""
