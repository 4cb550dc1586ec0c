"""One client's local work, and the self-checks that gate it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from support.families import examples_of, load_family, record_plan, task_of, user_plan

from fedslm.config import TrainingConfig
from fedslm.errors import DataError, TrainingError
from fedslm.models.initial import initial_state
from fedslm.models.loaded import LoadedModel
from fedslm.privacy.plan import NoPrivacy, PrivatePlan
from fedslm.records import AdapterState
from fedslm.tasks.base import Example
from fedslm.training.checks import check_moved, check_parameters
from fedslm.training.evaluation import count
from fedslm.training.local import LocalWork, train

TRAINING = TrainingConfig(local_steps=4, batch_size=4, learning_rate=0.02)
NOISE_ALONE = TRAINING.model_copy(update={"optimizer": "sgd", "learning_rate": 1.0})
PLAIN = NoPrivacy(batch_size=4, steps_per_round=4)
RECORD, PATIENT = (plan(normaliser=4, steps=4) for plan in (record_plan, user_plan))
PRIVATE = pytest.mark.parametrize("plan", [RECORD, PATIENT], ids=["record", "patient"])


@pytest.fixture
def model(family_directory: Callable[[str, str], Path]) -> LoadedModel:
    """A tiny BERT classifier."""
    return load_family(family_directory("bert", "classification"), "classification", "mean")


@pytest.fixture
def work(model: LoadedModel) -> LocalWork:
    """Train everything from the initial adapter."""
    state = initial_state(model.adapter.read().shapes, 0)
    return LocalWork(state, frozenset(state), 0, 1, 0)


def without_a(work: LocalWork) -> LocalWork:
    """FFA: A is frozen."""
    return replace(work, trained=frozenset(key for key in work.adapter if "lora_A" not in key))


def owned(count: int) -> list[Example]:
    """Examples of patients with three records each."""
    return [replace(each, owner=f"p{n // 3}") for n, each in enumerate(examples_of(count))]


def change(before: AdapterState, after: AdapterState) -> np.ndarray:
    """After minus before, all tensors in one float64 vector."""
    return np.concatenate([(after[key].astype(np.float64) - before[key]).ravel() for key in after])


def test_training_lowers_the_loss(model: LoadedModel, work: LocalWork) -> None:
    """Forty plain steps fit sixteen examples better than the start."""
    task, examples = task_of("classification"), examples_of(16)
    plan = NoPrivacy(batch_size=8, steps_per_round=40)
    trained = train(model, task, examples, plan, TRAINING, work)
    before = task.metrics(count(model, task, examples, work.adapter))["loss"]
    after = task.metrics(count(model, task, examples, work.adapter.merged(trained)))["loss"]
    assert after < 0.8 * before


@PRIVATE
def test_private_training_lowers_the_loss(
    model: LoadedModel, work: LocalWork, plan: PrivatePlan
) -> None:
    """With next to no noise, 25 full steps fit too: the gradient has the right sign and size."""
    task, examples = task_of("classification"), owned(16)
    units = 16 if plan.unit == "record" else 6
    plan = replace(plan, noise_multiplier=1e-3, sample_rate=1.0, normaliser=units, steps_per_round=25)
    descent = TRAINING.model_copy(update={"optimizer": "sgd", "learning_rate": 1.0})
    trained = train(model, task, examples, plan, descent, work)
    before = task.metrics(count(model, task, examples, work.adapter))["loss"]
    after = task.metrics(count(model, task, examples, work.adapter.merged(trained)))["loss"]
    assert after < 0.8 * before


@pytest.mark.parametrize("plan", [PLAIN, RECORD, PATIENT], ids=["plain", "record", "patient"])
def test_frozen_factor_is_bit_identical(
    model: LoadedModel, work: LocalWork, plan: NoPrivacy | PrivatePlan
) -> None:
    """FFA returns B and the head alone, and A in the model has not changed by a bit."""
    work = without_a(work)
    trained = train(model, task_of("classification"), owned(8), plan, TRAINING, work)
    assert set(trained) == set(work.trained)
    frozen = work.adapter.select(set(work.adapter) - work.trained)
    assert model.adapter.read(list(frozen)).sha256() == frozen.sha256()


def test_plain_training_repeats_bit_for_bit(model: LoadedModel, work: LocalWork) -> None:
    """Same seed, round and client: the same bits; another client: others."""
    task, examples = task_of("classification"), examples_of(16)
    runs = [train(model, task, examples, PLAIN, TRAINING, work).sha256() for _ in range(2)]
    other = train(model, task, examples, PLAIN, TRAINING, replace(work, client=1)).sha256()
    assert runs[0] == runs[1] != other


@PRIVATE
def test_private_training_never_repeats(model: LoadedModel, work: LocalWork, plan: PrivatePlan) -> None:
    """Equal requests, under equal seeds of everything, are answered with independent noise."""
    work, noises = without_a(work), []
    for _ in range(2):
        torch.manual_seed(1)
        np.random.seed(1)
        random.seed(1)
        after = train(model, task_of("classification"), [], plan, NOISE_ALONE, work)
        noises.append(change(work.adapter, after))
    assert np.abs(noises[0] - noises[1]).mean() > 0.1 * np.abs(noises[0]).mean()
    assert abs(np.corrcoef(*noises)[0, 1]) < 0.2


@PRIVATE
def test_private_sampling_never_repeats(
    model: LoadedModel, work: LocalWork, plan: PrivatePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal requests, under equal seeds of everything, are answered from other samples."""
    task, taken = task_of("classification"), []
    collate = type(task).collate

    def noted(self: object, examples: list[Example], pad_token_id: int) -> dict[str, torch.Tensor]:
        taken[-1] += [each.input_ids for each in examples]
        return collate(self, examples, pad_token_id)

    monkeypatch.setattr(type(task), "collate", noted)
    for _ in range(2):
        taken.append([])
        torch.manual_seed(1)
        np.random.seed(1)
        random.seed(1)
        train(model, task, owned(60), plan, TRAINING, without_a(work))
    assert taken[0] != taken[1]


@PRIVATE
def test_released_noise_is_calibrated_with_power(
    model: LoadedModel, work: LocalWork, plan: PrivatePlan
) -> None:
    """A round over no records releases sigma·C·sqrt(steps)/normaliser: KS accepts it, not 2/3 or 3/2 of it."""
    plan = replace(plan, noise_multiplier=1.7, clip_norm=0.4, normaliser=8, steps_per_round=3)
    trained = train(model, task_of("classification"), [], plan, NOISE_ALONE, work)
    noise = change(work.adapter, trained) * 8 / (1.7 * 0.4 * np.sqrt(3))
    assert len(noise) > 2000
    passed = {factor: stats.kstest(noise / factor, "norm").pvalue for factor in (1, 2 / 3, 3 / 2)}
    assert passed[1] > 1e-4
    assert passed[2 / 3] < 1e-9
    assert passed[3 / 2] < 1e-9


@PRIVATE
def test_the_pull_to_the_start_comes_after_the_noise(
    model: LoadedModel, work: LocalWork, plan: PrivatePlan
) -> None:
    """FedProx at mu · rate = 1 undoes every step but the last: one step's noise is left, none is clipped."""
    plan = replace(plan, noise_multiplier=1.7, clip_norm=0.4, normaliser=8, steps_per_round=3)
    pulled = NOISE_ALONE.model_copy(update={"drift": "fedprox", "proximal_strength": 1.0})
    trained = train(model, task_of("classification"), [], plan, pulled, work)
    noise = change(work.adapter, trained) * 8 / (1.7 * 0.4)
    passed = {factor: stats.kstest(noise / factor, "norm").pvalue for factor in (1, np.sqrt(3))}
    assert passed[1] > 1e-4
    assert passed[np.sqrt(3)] < 1e-9


@PRIVATE
def test_private_training_of_an_empty_shard_runs(
    model: LoadedModel, work: LocalWork, plan: PrivatePlan
) -> None:
    """A client without records releases noise like any other; without privacy it is an error."""
    task, work = task_of("classification"), without_a(work)
    assert len(train(model, task, [], plan, TRAINING, work)) == len(work.trained)
    with pytest.raises(DataError, match="no usable records"):
        train(model, task, [], PLAIN, TRAINING, work)


@pytest.mark.parametrize("factor", [1, 5])
def test_a_whole_patient_moves_the_release_by_at_most_c(
    model: LoadedModel, work: LocalWork, monkeypatch: pytest.MonkeyPatch, factor: int
) -> None:
    """Through the whole path, a patient of many records moves one step by C/normaliser and no more."""
    monkeypatch.setattr(
        "fedslm.training.noisy_optimizer.GaussianNoise.draw",
        lambda self, shape, stddev: np.full(shape, 1e-3),  # seen exactly, and everything moves
    )
    plan = replace(PATIENT, sample_rate=1.0, clip_norm=0.05, steps_per_round=1)
    task, others = task_of("classification"), [replace(e, owner="other") for e in examples_of(3)]
    patient = [replace(each, owner="extra") for each in examples_of(2, seed=1) * factor]
    without, with_patient = (
        train(model, task, examples, plan, NOISE_ALONE, work)
        for examples in (others, [*others, *patient])
    )
    moved = np.linalg.norm(change(without, with_patient)) * plan.normaliser
    assert 0.9 * 0.05 < moved <= 0.05 * (1 + 1e-4)


@PRIVATE
def test_hooks_are_detached_after_private_training(
    model: LoadedModel, work: LocalWork, plan: PrivatePlan
) -> None:
    """Plain training after private training works and leaves no per-record gradients behind."""
    task, examples = task_of("classification"), owned(8)
    train(model, task, examples, plan, TRAINING, without_a(work))
    train(model, task, examples, PLAIN, TRAINING, work)
    assert not hasattr(model.adapter.network, "autograd_grad_sample_hooks")
    assert all(getattr(p, "grad_sample", None) is None for p in model.adapter.network.parameters())


def test_divergence_is_an_error(model: LoadedModel, work: LocalWork) -> None:
    """An adapter with NaN or infinity is never returned."""
    training = TRAINING.model_copy(update={"optimizer": "sgd", "learning_rate": 1e38})
    with pytest.raises(TrainingError, match="diverged"):
        train(model, task_of("classification"), examples_of(8), PLAIN, training, work)


def test_stale_optimizer_is_refused(model: LoadedModel) -> None:
    """An optimizer over copies of the parameters trains nothing: refused."""
    model.adapter.train_only(set(model.adapter.parameters))
    copies = [p.detach().clone().requires_grad_() for p in model.adapter.parameters.values()]
    with pytest.raises(TrainingError, match="same objects"):
        check_parameters(model.adapter, torch.optim.SGD(copies, lr=1.0))


def test_unmoved_tensor_is_refused(work: LocalWork) -> None:
    """A trained tensor that did not move is an error, unless its gradient was exactly zero."""
    key = next(key for key in work.adapter if "lora_B" in key)
    moved = {k: work.adapter[k] + np.float32(k != key) for k in work.adapter}
    after = replace(work.adapter, tensors=moved)
    with pytest.raises(TrainingError, match=key.replace(".", r"\.")):
        check_moved(work.adapter, after)
    check_moved(work.adapter, after, frozenset({key}))


def test_learning_rate_zero_never_passes_as_training(model: LoadedModel, work: LocalWork) -> None:
    """A rate too small to move float32 is caught after the first step."""
    training = TRAINING.model_copy(update={"optimizer": "sgd", "learning_rate": 1e-30})
    with pytest.raises(TrainingError, match="did not move"):
        train(model, task_of("classification"), examples_of(8), PLAIN, training, work)
