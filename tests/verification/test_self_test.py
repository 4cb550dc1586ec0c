"""The self-test passes on sound code, and on broken code exactly the promises that it breaks fail."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from support import mutations as broken
from support.mutations import cut_at, fixed_size, rate_times, sampler_of

from fedslm.privacy import accounting, chain
from fedslm.privacy.plan import ExamplePlan, UserPlan
from fedslm.verification import self_test
from fedslm.verification.harness import Bench
from fedslm.verification.self_test import Check, SelfTest, run_self_test

RECORDS = "removing any one record moves the sum by at most the clip norm"
PATIENTS = "removing any one user moves the sum by at most the clip norm"
NOISE = "noise has the planned standard deviation and a Gaussian shape"
SAMPLER = "records and users are sampled at the planned rate"
EMPTY = "an empty sample releases noise and is charged"
SEEDS = "no seed repeats noise or samples"
ACCOUNTANTS = "three accountants agree"
METRIC = "the metric moves by at most its sensitivity and has its noise"
SECONDS = 20.0
LEDGER = "the ledger refuses what was changed or would exceed the budget"

Mutation = Callable[[pytest.MonkeyPatch], None]
STEP = {RECORDS, PATIENTS}

# What a step computes before the noise is broken, and what fails.
IN_GRADIENTS: dict[str, tuple[Mutation, set[str]]] = {
    "nothing is clipped": (broken.no_clipping, STEP),
    "each tensor is clipped": (broken.clipping_by_tensor, STEP),
    "each record is clipped": (broken.clipping_by_record, {PATIENTS}),
    "the loss is a mean": (broken.loss_is_a_mean, STEP),
    "the loss is weighted": (broken.loss_is_weighted, STEP),
    "infinities stay": (broken.infinities_stay, STEP),
    "failures stop": (broken.failures_stop, STEP),
}
# Something else is broken, what fails, and what may fail as well; slow checks that are neither are left out.
ELSEWHERE: dict[str, tuple[Mutation, set[str], set[str]]] = {
    "too little noise": (broken.too_little_noise, {NOISE}, {EMPTY, METRIC}),
    "Laplace noise": (broken.laplace_noise, {NOISE}, set()),
    "torch's noise": (broken.noise_of_torch, {SEEDS}, set()),
    "NumPy's noise": (broken.noise_of_numpy, {SEEDS}, set()),
    "Opacus' noise": (broken.noise_of_opacus, {SEEDS}, set()),
    "noise repeated in each step": (broken.noise_repeated_in_each_step, {NOISE}, {EMPTY}),
    "noise shared by tensors": (broken.noise_shared_by_tensors, {NOISE}, {EMPTY}),
    "empty batches are skipped": (broken.empty_batches_are_skipped, {NOISE, EMPTY}, {SEEDS}),
    "empty batches have no noise": (broken.empty_batches_have_no_noise, {NOISE, EMPTY}, {SEEDS}),
    "samples of records of a fixed size": (fixed_size(ExamplePlan), {SAMPLER}, set()),
    "samples of patients of a fixed size": (fixed_size(UserPlan), {SAMPLER}, set()),
    "a rate half as large again": (rate_times(1.5), {SAMPLER}, set()),
    "two thirds of the rate": (rate_times(2 / 3), {SAMPLER}, set()),
    "half are never sampled": (broken.half_are_never_sampled, {SAMPLER}, set()),
    "samples from a seed": (broken.seeded_sampler, {SEEDS}, set()),
    "at most 16 records": (sampler_of(ExamplePlan, cut_at(16)), {SAMPLER}, set()),
    "at most 100 records": (sampler_of(ExamplePlan, cut_at(100)), {SAMPLER}, set()),
    "at most 16 patients": (sampler_of(UserPlan, cut_at(16)), {SAMPLER}, set()),
    "an unchecked ledger": (broken.ledger_is_not_checked, {LEDGER}, set()),
    "a ledger without a limit": (broken.no_limit, {LEDGER}, set()),
    "half of epsilon": (broken.halved, {ACCOUNTANTS}, {LEDGER}),
    "half of epsilon for the ledger": (broken.halved_without_cross_check, {ACCOUNTANTS}, {LEDGER}),
    "a metric by record": (broken.metric_by_record, {METRIC}, set()),
    "metric noise for one number": (broken.metric_without_sensitivity, {METRIC}, set()),
}
SLOW = {RECORDS: "_records", PATIENTS: "_users", METRIC: "_metric"}


# One or two for each check in every run of the tests; all of them in the slow ones.
OFTEN = {
    "nothing is clipped",
    "each record is clipped",
    "the loss is weighted",
    "infinities stay",
    "too little noise",
    "torch's noise",
    "noise repeated in each step",
    "empty batches are skipped",
    "samples of patients of a fixed size",
    "at most 100 records",
    "samples from a seed",
    "an unchecked ledger",
    "half of epsilon",
    "a metric by record",
}


def cases(names: Iterable[str]) -> list[Any]:
    """Parameters; those that are not for every run are marked."""
    return [pytest.param(n, marks=[] if n in OFTEN else [pytest.mark.slow]) for n in names]


def leave_out(patch: pytest.MonkeyPatch, names: Iterable[str]) -> None:
    """Lets slow checks pass unseen."""
    for name in names:
        patch.setattr(self_test, SLOW[name], lambda bench: (True, "left out"))


@pytest.fixture(scope="module")
def bench() -> Bench:
    """The embedded model, loaded once."""
    return Bench.load()


@pytest.fixture
def patch(bench: Bench) -> Iterator[pytest.MonkeyPatch]:
    """Changes for one test, in which the model is not loaded again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bench, "load", classmethod(lambda cls, device: bench))
        yield patch
    chain._parse.cache_clear()
    accounting._cross_checked.cache_clear()


def failed(result: SelfTest) -> set[str]:
    """Names of the checks that failed."""
    return {check.name for check in result.checks if not check.passed}


def test_sound_code_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node's own run: every promise holds, each check says what it saw, and one thread computes it.

    It takes at most 20 s of CPU, and leaves the number of threads as it was.
    """
    threads: list[int] = []
    checked = self_test._noise

    def noise(bench: Bench) -> tuple[bool, str]:
        threads.append(torch.get_num_threads())
        return checked(bench)

    monkeypatch.setattr(self_test, "_noise", noise)
    torch.set_num_threads(2)
    began = time.process_time()
    result = run_self_test()
    assert time.process_time() - began <= SECONDS
    assert (threads, torch.get_num_threads()) == ([1], 2)
    assert result.passed, result.failures
    assert result.failures == []
    names = {RECORDS, PATIENTS, NOISE, SAMPLER, EMPTY, SEEDS, ACCOUNTANTS, METRIC, LEDGER}
    assert names <= {check.name for check in result.checks}
    assert all(check.detail for check in result.checks)
    assert result.seconds > 0


@pytest.mark.parametrize("name", cases(IN_GRADIENTS))
def test_a_broken_step_fails_the_checks_of_its_promise(patch: pytest.MonkeyPatch, name: str) -> None:
    """What a step computes before the noise is broken: exactly these checks fail."""
    mutate, expected = IN_GRADIENTS[name]
    mutate(patch)
    leave_out(patch, {METRIC})
    assert failed(run_self_test()) == expected


@pytest.mark.parametrize("name", cases(ELSEWHERE))
def test_broken_code_fails_the_check_of_its_promise(patch: pytest.MonkeyPatch, name: str) -> None:
    """Noise, sampler, ledger or accountant is broken: these checks fail, and none that has nothing to do with it."""
    mutate, expected, possible = ELSEWHERE[name]
    mutate(patch)
    leave_out(patch, SLOW.keys() - expected - possible)
    found = failed(run_self_test())
    assert expected <= found <= expected | possible


def test_an_exception_is_a_failure(patch: pytest.MonkeyPatch) -> None:
    """A check that cannot be carried out has shown nothing: it fails, with the reason, and the others run."""

    def stop(bench: object) -> tuple[bool, str]:
        raise RuntimeError("no such thing")

    leave_out(patch, {METRIC})
    for name in ("_records", "_users", "_noise"):
        patch.setattr(self_test, name, stop)
    result = run_self_test()
    assert failed(result) == {RECORDS, PATIENTS, NOISE}
    assert result.failures[0] == f"{RECORDS}: RuntimeError: no such thing"


def test_one_failure_is_a_failure() -> None:
    """A self-test passes only if all of its checks did."""
    good, bad = Check("a", True, "x"), Check("b", False, "y")
    assert SelfTest((good, good), 1.0).passed
    assert not SelfTest((good, bad, good), 1.0).passed
    assert SelfTest((good, bad), 1.0).failures == ["b: y"]
