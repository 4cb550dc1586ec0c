"""What a run begins with: the setup that all clients get, and a base that can be evaluated."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import fedslm
from fedslm.aggregation.server import Aggregation
from fedslm.aggregation.summed import Summing
from fedslm.config import Config
from fedslm.errors import ModelError
from fedslm.federation.checkpoint import RunDirectory
from fedslm.federation.masked import Members
from fedslm.privacy.plan import RunPlan
from fedslm.protocol.setup import Setup
from fedslm.records import AdapterState


@dataclass(frozen=True)
class RunConstants:
    """The constants of a run.

    Attributes:
        setup: The setup that clients receive.
        frozen: Tensors that no round changes at the server.
        aggregation: The aggregation method.
        names: Display names of the clients, by index.
        dtype: Precision in which the base computes at the server.
        summing: How a step is made of a sum, if clients share the noise; else None.
        members: Whom the authority admitted, if a protocol forms the sum; else None.
    """

    setup: Setup
    frozen: AdapterState
    aggregation: Aggregation
    names: Mapping[int, str]
    dtype: str
    summing: Summing | None = None
    members: Members | None = None


def setup_of(config: Config, plan: RunPlan, labels: tuple[str, ...], directory: RunDirectory) -> Setup:
    """The setup that clients receive in every round."""
    resolved = config.resolved()
    return Setup(
        run_id=directory.run_id,
        seed=config.run.seed,
        directory=str(directory.path),
        version=fedslm.__version__,
        model=resolved.model,
        lora=resolved.lora,
        data=config.data,
        task=config.task,
        training=config.training,
        aggregation=resolved.aggregation,
        compression=config.compression,
        personalization=config.personalization,
        labels=labels,
        plan=plan,
        config_sha256=config.sha256(),
    )


def check_base(config: Config, metrics: Mapping[str, float]) -> None:
    """Refuses a base without finite metrics: nothing trained on it could be evaluated.

    Raises:
        ModelError: A metric is not finite.
    """
    wrong = {name: value for name, value in metrics.items() if not math.isfinite(value)}
    if wrong:
        figures = ", ".join(f"{name}={value}" for name, value in wrong.items())
        raise ModelError(
            f"model.base={config.model.base!r} gives {figures} on the public split before the first "
            f"round; it must be finite: weights hold NaN or infinity, or overflow; give another base"
        )
