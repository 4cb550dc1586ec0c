"""The optional metric on a client's own data, as a separate Gaussian release."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fedslm.errors import PrivacyError
from fedslm.models.loaded import LoadedModel
from fedslm.privacy.gaussian import GaussianNoise
from fedslm.privacy.plan import METRIC_SENSITIVITY, PrivatePlan
from fedslm.records import AdapterState
from fedslm.tasks.base import Example, Task
from fedslm.training.batches import forward
from fedslm.training.checks import raise_unless_of_a_record

_GRID = 2**32  # scores are counted in units of 1 / _GRID: integers add up without rounding


def noisy_metric(
    model: LoadedModel,
    task: Task,
    examples: Sequence[Example],
    adapter: AdapterState,
    plan: PrivatePlan,
) -> tuple[float, float]:
    """Computes an adapter's score on a client's own records, with noise.

    Formal guarantees:
        * Adding or removing one unit moves the two numbers by at most √2 (L2) before noise: a unit adds
          the mean score of its records, in [0, 1] and rounded to 2^-32, and 1; the sums are exact.
          Noise has standard deviation √2 · ``plan.metric_noise_multiplier``: this is the Gaussian
          mechanism that ``plan.metric_event`` charges.
        * A record that cannot be scored, or whose logits or score are not finite, counts as 0. If
          memory runs out, nothing is released: how much is left depends on other records too.

    Args:
        model: The loaded model; its adapter is overwritten.
        task: The task that scores the records.
        examples: The client's examples, each with its owner.
        adapter: The whole adapter.
        plan: Gives the unit and the noise.

    Returns:
        (sum of the units' scores, number of units), both noisy. Their ratio is the metric.

    Raises:
        PrivacyError: The plan does not allow a metric.
        TrainingError: Memory ran out.
    """
    if plan.metric_noise_multiplier is None:
        raise PrivacyError("the plan lets no metric leave")
    model.adapter.write(adapter)
    model.adapter.network.eval()
    by_unit: dict[str, list[float]] = {}
    for number, (example, score) in enumerate(
        zip(examples, _scores(model, task, examples), strict=True)
    ):
        unit = example.owner if plan.unit == "user" else str(number)
        by_unit.setdefault(unit, []).append(score)
    parts = sum(round(_GRID * sum(scores) / len(scores)) for scores in by_unit.values())
    exact = (parts / _GRID, float(len(by_unit)))
    noise = GaussianNoise().draw((2,), plan.metric_noise_multiplier * METRIC_SENSITIVITY)
    return exact[0] + float(noise[0]), exact[1] + float(noise[1])


def _scores(model: LoadedModel, task: Task, examples: Sequence[Example]) -> list[float]:
    """Scores each example, in [0, 1]; each is computed separately, so that none can affect another."""
    scores = []
    with torch.inference_mode():
        for example in examples:
            try:
                logits, batch = forward(model, task, [example], layers=model.cached_layers)
                computed = bool(torch.isfinite(logits).all())
                score = float(task.per_example_score(logits, batch)[0]) if computed else 0.0
            except Exception as error:  # the failure depends only on the record; it counts as zero
                raise_unless_of_a_record(error)
                score = 0.0
            scores.append(min(1.0, max(0.0, score)) if math.isfinite(score) else 0.0)
    return scores
