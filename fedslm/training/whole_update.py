"""A client's part of a sum if the whole client is the unit: its update, clipped once, and its noise."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch

from fedslm.config import TrainingConfig
from fedslm.errors import TrainingError
from fedslm.models.loaded import LoadedModel
from fedslm.privacy.discrete import DiscreteGaussian
from fedslm.privacy.encoding import Words, encoded
from fedslm.privacy.plan import ClientPlan
from fedslm.tasks.base import Example, Task
from fedslm.training.local import LocalWork, train
from fedslm.training.sums import clipped

logger = logging.getLogger(__name__)  # the client's own log


def share_of_update(
    model: LoadedModel,
    task: Task,
    examples: Sequence[Example],
    plan: ClientPlan,
    training: TrainingConfig,
    work: LocalWork,
) -> Words:
    """Trains without noise, clips the whole update once, and adds this client's share of the noise.

    Formal guarantees:
        * Without its noise the result is a whole vector of norm at most ``plan.clip_norm`` / γ, for any
          records (:func:`fedslm.training.sums.clipped`).
        * It has a result for any records: if training fails, the update counts as zero.

    Args:
        model: The loaded model; its adapter is overwritten.
        task: The task to learn.
        examples: The client's examples; may be empty.
        plan: Clip norm, noise and local steps.
        training: Optimizer, rate and micro-batch size.
        work: Where to start and what to train.

    Returns:
        The values of the trained tensors in the sorted order of their keys, modulo 2^32 in steps of the
        plan's grid.

    Raises:
        TrainingError: The plan shares no noise.
    """
    if plan.shares is None:
        raise TrainingError("internal check failed: the plan shares no noise")
    before = work.adapter.select(work.trained)
    update = np.zeros(before.num_parameters, dtype=np.float32)
    try:
        moved = train(model, task, examples, plan.local, training, work).minus(before)
        update = np.concatenate([moved[key].ravel() for key in sorted(moved)])
    except Exception:  # boundary: whether training fails depends on the client's data
        logger.exception("training failed: this client adds nothing but noise to the round")
    finite = torch.from_numpy(np.where(np.isfinite(update), update, np.float32(0)))
    steps = clipped(finite.unsqueeze(0), plan.clip_norm, plan.shares.grid_bits)[0].numpy()
    variance = plan.shares.variance(plan.clip_norm, plan.noise_multiplier)
    return encoded(steps, DiscreteGaussian().draw(steps.size, variance))
