"""What is said before a run that cannot learn, and that each remedy is one."""

from __future__ import annotations

import math
import re

from fedslm import config as configuration
from fedslm.config import Config
from fedslm.privacy import accounting
from fedslm.recipes import RECIPES, expected
from fedslm.records import Event

PARAMETERS = 30_000


def config_of(**privacy: object) -> Config:
    """A complete classifier's config with too little of everything."""
    values = {"unit": "record", "epsilon": 0.5, "delta": 1e-4, "clip_norm": 1.0, "sample_rate": 1.0}
    return configuration.from_mapping(
        {
            "model": {"base": "demo"},
            "data": {"source": "demo"},
            "task": {"name": "classification"},
            "training": {"local_steps": 1, "batch_size": 100},
            "privacy": {**values, **privacy},
            "federation": {"num_clients": 10, "rounds": 16},
        }
    )


def test_nothing_is_said_without_privacy() -> None:
    """There is no noise."""
    assert expected(config_of(unit="none"), PARAMETERS) is None


def test_the_ratio_is_that_of_gaussian_dp() -> None:
    """A second source: with full sampling σ = √T / μ, so the ratio is L·√n·μ / √d."""
    for epsilon in (0.5, 8.0):
        found = expected(config_of(epsilon=epsilon), PARAMETERS)
        assert found is not None
        mu = found.signal * math.sqrt(PARAMETERS) / (100 * math.sqrt(10))
        spent = accounting.epsilon([Event(1.0, 1 / mu, 1)], 1e-4)
        assert math.isclose(spent, epsilon, rel_tol=0.02)


def test_what_will_not_learn_is_said_with_what_would() -> None:
    """Each remedy, applied, reaches the ratio that is needed; a larger epsilon by little more."""
    found = expected(config_of(), PARAMETERS)
    assert found is not None
    assert not found.learns
    assert found.text.startswith("this will not learn: signal-to-noise ratio over the run: ")
    first = [re.search(r"\d[\d,]*(?:\.\d+)?", each) for each in found.remedies]
    numbers = [float(match[0].replace(",", "")) for match in first if match is not None]
    units, clients, epsilon, parameters = numbers
    less = expected(config_of(epsilon=epsilon / 1.15), PARAMETERS)
    assert less is not None
    assert less.signal < found.needed
    base = config_of()
    changed = [
        (
            base.model_copy(
                update={"training": base.training.model_copy(update={"batch_size": int(units)})}
            ),
            PARAMETERS,
        ),
        (
            base.model_copy(
                update={"federation": base.federation.model_copy(update={"num_clients": int(clients)})}
            ),
            PARAMETERS,
        ),
        (config_of(epsilon=epsilon), PARAMETERS),
        (base, int(parameters)),
    ]
    for config, size in changed:
        better = expected(config, size)
        assert better is not None
        assert better.signal >= found.needed


def test_a_good_plan_is_said_to_be_one() -> None:
    """Above the upper bound, nothing is asked for."""
    found = expected(config_of(epsilon=8.0), 300)
    assert found is not None
    assert found.learns
    assert found.remedies == ()
    assert "most of what they learn" in found.text
    assert found.as_json()["learns"] is True


def test_a_larger_sample_rate_is_a_remedy() -> None:
    """Where few units join a step, all of them may be asked instead."""
    config = config_of(sample_rate=0.02, epsilon=2.0)
    few = config.training.model_copy(update={"batch_size": 10})
    found = expected(config.model_copy(update={"training": few}), PARAMETERS)
    assert found is not None
    assert not found.learns
    assert any("privacy.sample_rate = 1" in each for each in found.remedies)


def test_only_measured_bounds_are_stated() -> None:
    """Where no runs were measured, the ratio is said, and no verdict; else the bounds of the log."""
    bounds = {recipe.name: (recipe.needed, recipe.enough) for recipe in RECIPES}
    assert bounds == {
        "features": (1.0, 10.0),
        "tags": (1.5, 11.0),
        "small-decoder": (0.7, 12.0),
        "preferences": (5.0, 0.0),
        "several-labels": (0.0, 0.0),
        "decoder": (0.0, 0.0),
        "encoder-decoder": (0.0, 0.0),
    }
    found = expected(with_task("multi-label"), PARAMETERS)
    assert found is not None
    assert not found.is_measured
    assert found.text.endswith("for this task no bound was measured")
    assert found.as_json()["learns"] is None


def test_a_bound_without_an_upper_one_promises_half() -> None:
    """Of preferences, no measured run kept most of what it learns."""
    found = expected(with_task("preference"), 10)
    assert found is not None
    assert found.learns
    assert "kept half of what they learn" in found.text
    weak = expected(with_task("preference"), 10**9)
    assert weak is not None
    assert "this will not learn" in weak.text


def with_task(name: str) -> configuration.Config:
    """A config of another task."""
    task = configuration.section_from(configuration.TaskConfig, "task", {"name": name})
    return config_of().model_copy(update={"task": task})
