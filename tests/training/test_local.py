"""One client's local work, and the self-checks that gate it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from families import examples_of, load_family, task_of

from fedslm.config import TrainingConfig
from fedslm.errors import DataError, TrainingError
from fedslm.models.adapter import initial_state
from fedslm.privacy.plan import ExamplePlan, NoPrivacy
from fedslm.training.checks import check_moved, check_parameters
from fedslm.training.evaluation import count
from fedslm.training.local import LocalWork, train

TRAINING = TrainingConfig(local_steps=4, batch_size=4, learning_rate=0.02)
PLAIN = NoPrivacy(batch_size=4, steps_per_round=4)
PRIVATE = ExamplePlan(8.0, 1e-5, 1.0, 1.0, 0.5, 4, 4)


@pytest.fixture
def model(family_directory: Callable[[str, str], Path]):
    """A tiny BERT classifier."""
    return load_family(family_directory("bert", "classification"), "classification", "mean")


@pytest.fixture
def work(model) -> LocalWork:
    """Train everything from the initial adapter."""
    state = initial_state(model.adapter.read().shapes, 0)
    return LocalWork(state, frozenset(state), 0, 1, 0)


def without_a(work: LocalWork) -> LocalWork:
    """FFA: A is frozen."""
    return replace(work, trained=frozenset(key for key in work.adapter if "lora_A" not in key))


def test_training_lowers_the_loss(model, work) -> None:
    """Forty plain steps fit sixteen examples better than the start."""
    task, examples = task_of("classification"), examples_of(16)
    plan = NoPrivacy(batch_size=8, steps_per_round=40)
    trained = train(model, task, examples, plan, TRAINING, work)
    before = task.metrics(count(model, task, examples, work.adapter, 8))["loss"]
    after = task.metrics(count(model, task, examples, work.adapter.merged(trained), 8))["loss"]
    assert after < 0.8 * before


@pytest.mark.parametrize("plan", [PLAIN, PRIVATE], ids=["plain", "private"])
def test_frozen_factor_is_bit_identical(model, work, plan) -> None:
    """FFA returns B and the head alone, and A in the model has not changed by a bit."""
    work = without_a(work)
    trained = train(model, task_of("classification"), examples_of(8), plan, TRAINING, work)
    assert set(trained) == set(work.trained)
    frozen = work.adapter.select(set(work.adapter) - work.trained)
    assert model.adapter.read(list(frozen)).sha256() == frozen.sha256()


def test_plain_training_repeats_bit_for_bit(model, work) -> None:
    """Same seed, round and client: the same bits; another client: others."""
    task, examples = task_of("classification"), examples_of(16)
    runs = [train(model, task, examples, PLAIN, TRAINING, work).sha256() for _ in range(2)]
    other = train(model, task, examples, PLAIN, TRAINING, replace(work, client=1)).sha256()
    assert runs[0] == runs[1] != other


def test_private_training_never_repeats(model, work) -> None:
    """Noise and sampling do not come from the run's seed."""
    task, examples, work = task_of("classification"), examples_of(8), without_a(work)
    runs = [train(model, task, examples, PRIVATE, TRAINING, work) for _ in range(2)]
    assert runs[0].sha256() != runs[1].sha256()


def test_private_training_of_an_empty_shard_runs(model, work) -> None:
    """A client without records releases noise like any other; without privacy it is an error."""
    task, work = task_of("classification"), without_a(work)
    assert len(train(model, task, [], PRIVATE, TRAINING, work)) == len(work.trained)
    with pytest.raises(DataError, match="no usable records"):
        train(model, task, [], PLAIN, TRAINING, work)


def test_hooks_are_detached_after_private_training(model, work) -> None:
    """Plain training after private training works and leaves no per-record gradients behind."""
    task, examples = task_of("classification"), examples_of(8)
    train(model, task, examples, PRIVATE, TRAINING, without_a(work))
    train(model, task, examples, PLAIN, TRAINING, work)
    assert not hasattr(model.adapter.network, "autograd_grad_sample_hooks")


def test_divergence_is_an_error(model, work) -> None:
    """An adapter with NaN or infinity is never returned."""
    training = TRAINING.model_copy(update={"optimizer": "sgd", "learning_rate": 1e38})
    with pytest.raises(TrainingError, match="diverged"):
        train(model, task_of("classification"), examples_of(8), PLAIN, training, work)


def test_stale_optimizer_is_refused(model) -> None:
    """An optimizer over copies of the parameters trains nothing: refused."""
    model.adapter.train_only(set(model.adapter.parameters))
    copies = [p.detach().clone().requires_grad_() for p in model.adapter.parameters.values()]
    with pytest.raises(TrainingError, match="same objects"):
        check_parameters(model.adapter, torch.optim.SGD(copies, lr=1.0))


def test_unmoved_tensor_is_refused(work) -> None:
    """A trained tensor that did not move is an error, unless its gradient was exactly zero."""
    key = next(key for key in work.adapter if "lora_B" in key)
    moved = {k: work.adapter[k] + np.float32(k != key) for k in work.adapter}
    after = replace(work.adapter, tensors=moved)
    with pytest.raises(TrainingError, match=key.replace(".", r"\.")):
        check_moved(work.adapter, after)
    check_moved(work.adapter, after, frozenset({key}))


def test_learning_rate_zero_never_passes_as_training(model, work) -> None:
    """A rate too small to move float32 is caught after the first step."""
    training = TRAINING.model_copy(update={"optimizer": "sgd", "learning_rate": 1e-30})
    with pytest.raises(TrainingError, match="did not move"):
        train(model, task_of("classification"), examples_of(8), PLAIN, training, work)
