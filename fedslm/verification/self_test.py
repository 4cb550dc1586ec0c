"""The self-test that a node must pass before it trains: it tests the privacy code's guarantees.

All checks use the code that trains (plans, steps, noise, ledger), on the embedded model. Only Opacus'
own step hook looks inside: it sees the sum before and after the noise.

References:
    Cebere et al. 2026 (replaying neighbours); the checks of noise and sampler are exact tests with a
    probability of about 1e-8 to fail on a sound node.
"""

from __future__ import annotations

import math
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from fedslm import layout
from fedslm.config import DeviceName, ModelConfig, TrainingConfig
from fedslm.errors import BudgetExceeded, LedgerError, plural
from fedslm.models.base import device_of
from fedslm.privacy import accounting, keys
from fedslm.privacy.ledger import Ledger
from fedslm.privacy.limits import Limits
from fedslm.privacy.lines import ADAPTER, Charge
from fedslm.privacy.plan import ExamplePlan, PrivatePlan, UserPlan
from fedslm.records import Event
from fedslm.rng import stream
from fedslm.training.batches import Unit
from fedslm.training.local import LocalWork, train
from fedslm.training.metric import noisy_metric
from fedslm.training.steps import logger as steps_logger
from fedslm.training.threads import one_thread
from fedslm.verification.harness import BROKEN, WILD, Bench, example

_CLIP_NORM = 0.05  # small, so that every gradient is clipped
_SLACK = 1e-4  # tolerance for float32 gradients of shared passes with other shapes
_WIDE = 1e3  # large, so that no gradient is clipped
_COUPLING = 1e-3
_STEPS = 60
_SAMPLES = 400
_DISTINCT = 0.95  # float32 noise has few equal values
_SIGMAS = 6.0
_SMALLEST_P = 1e-8
_PLAN = ExamplePlan(8.0, 1e-5, _CLIP_NORM, 1.5, 0.03, 16, _STEPS, passes="fixed")


@dataclass(frozen=True)
class Check:
    """One guarantee that was tested.

    Attributes:
        name: The guarantee.
        passed: Whether it held.
        detail: The measured values.
    """

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class SelfTest:
    """The result of a self-test.

    Attributes:
        checks: The checks, in the order in which they ran.
        seconds: Wall time.
    """

    checks: tuple[Check, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        """True if every guarantee held."""
        return all(check.passed for check in self.checks)

    @property
    def failures(self) -> list[str]:
        """The checks that failed, each with its detail."""
        return [f"{check.name}: {check.detail}" for check in self.checks if not check.passed]


def run_self_test(device: DeviceName = "auto") -> SelfTest:
    """Runs all checks with one thread on a CPU; an exception counts as a failure.

    Args:
        device: As in ``model.device``.
    """
    began = time.monotonic()
    checks: list[tuple[str, Callable[[Bench], tuple[bool, str]]]] = [
        ("removing any one record moves the sum by at most the clip norm", _records),
        ("removing any one user moves the sum by at most the clip norm", _users),
        ("noise has the planned standard deviation and a Gaussian shape", _noise),
        ("records and users are sampled at the planned rate", _sampler),
        ("an empty sample releases noise and is charged", _empty),
        ("no seed repeats noise or samples", _seeds),
        ("three accountants agree", _accountants),
        ("the metric moves by at most its sensitivity and has its noise", _metric),
        ("the ledger refuses what was changed or would exceed the budget", _ledger),
    ]
    results = []
    with _quiet(), one_thread():
        bench = Bench.load(device)
        for name, check in checks:
            try:
                passed, detail = check(bench)
            except Exception as error:  # any error means that the guarantee was not shown to hold
                passed, detail = False, f"{type(error).__name__}: {error}"
            results.append(Check(name, passed, detail))
    return SelfTest(tuple(results), round(time.monotonic() - began, 2))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps warnings about records that fail on purpose out of the client's log."""
    disabled, steps_logger.disabled = steps_logger.disabled, True
    try:
        yield
    finally:
        steps_logger.disabled = disabled


def kernels(device: DeviceName = "auto") -> str:
    """Describes what a step's bits depend on besides code: device, threads and precision.

    Args:
        device: As in ``model.device``.

    Raises:
        ModelError: This machine has no such device.
    """
    used = device_of(ModelConfig(base="demo", device=device))
    precision, gpu = torch.get_float32_matmul_precision(), ""
    if used.type == "cuda":
        gpu = f"{torch.cuda.get_device_name(used)}, CUDA {torch.version.cuda}, "
    return (
        f"{used}, {gpu}{torch.backends.cpu.get_cpu_capability()}, "
        f"{plural(torch.get_num_threads(), 'thread')}, {torch.get_default_dtype()}, products in "
        f"{precision} precision"
    )


def _records(bench: Bench) -> tuple[bool, str]:
    """Tests adversarial records against an ordinary batch."""
    others: list[Unit] = [[example(length, length % 2)] for length in (3, 5, 9, 14)]
    extra: dict[str, Unit] = {
        "ordinary": [example(6)],
        "longest": [example(32, 1)],
        "shortest": [example(1)],
        "duplicate": list(others[0]),
        "infinite": [example(7, WILD)],
        "failing": [example(8, BROKEN)],
    }
    return _neighbours(bench, _PLAN, others, extra)


def _users(bench: Bench) -> tuple[bool, str]:
    """Tests adversarial users against an ordinary batch."""
    plan = _user_plan(_CLIP_NORM, cap=5)
    others: list[Unit] = [[example(3), example(9, 1)], [example(5)], [example(14, 1)] * 3]
    extra: dict[str, Unit] = {
        "ordinary": [example(length, length % 2) for length in (4, 6, 11)],
        "one text five times": [example(8)] * 5,
        "longest": [example(32, 1)] * 5,
        "infinite": [example(7), example(7, WILD)],
        "failing": [example(8), example(9, BROKEN)],
    }
    return _neighbours(bench, plan, others, extra)


def _user_plan(clip_norm: float, cap: int) -> UserPlan:
    """Returns a plan with the user as its unit."""
    values = {**asdict(_PLAN), "clip_norm": clip_norm}
    return UserPlan(**values, unit_column="p", max_records_per_unit=cap)


def _neighbours(
    bench: Bench, plan: PrivatePlan, others: list[Unit], extra: dict[str, Unit]
) -> tuple[bool, str]:
    """Compares steps with and without each extra unit, and one unit with an empty sample.

    With a clip norm that clips nothing, a unit must add exactly what it adds on its own: no loss,
    weight or layer may couple it to the others.
    """
    without = bench.total(plan, others)
    moves = {
        name: float((bench.total(plan, [*others, unit]) - without).norm())
        for name, unit in extra.items()
    }
    moves["by itself"] = float(bench.total(plan, [extra["ordinary"]]).norm())
    kept = all(moves[name] >= 0.9 * plan.clip_norm for name in ("ordinary", "longest", "by itself"))
    wide, coupling = replace(plan, clip_norm=_WIDE), 0.0
    among = bench.total(wide, others)
    for name in ("ordinary", "longest"):
        alone = bench.total(wide, [extra[name]])
        difference = bench.total(wide, [*others, extra[name]]) - among - alone
        coupling = max(coupling, float(difference.norm() / alone.norm()))
    worst = max(moves, key=lambda name: moves[name])
    move, largest = moves[worst] / plan.clip_norm, plan.clip_norm * (1 + _SLACK)
    detail = (
        f"largest move {move:.6f} clip norms ({worst}), {len(moves)} pairs; coupling {coupling:.0e}"
    )
    bounded = all(each <= largest for each in moves.values())  # NaN is not
    return bounded and kept and coupling <= _COUPLING, detail


def _noise(bench: Bench) -> tuple[bool, str]:
    """Tests pure-noise steps: deviation, shape, independence, and the power of the shape test."""
    from scipy import stats

    noises = bench.steps(_PLAN, [[], [], []]).noise
    values = torch.cat(noises).numpy() / (_PLAN.noise_multiplier * _PLAN.clip_norm)
    count, deviation = len(values), float(values.std())
    right = stats.kstest(values, "norm").pvalue
    wrong = [stats.kstest(values * factor, "norm").pvalue for factor in (2 / 3, 3 / 2)]
    per_step = values.reshape(3, -1)
    correlations = np.asarray(np.corrcoef(per_step))[np.triu_indices(3, 1)]
    passed = (
        abs(deviation - 1) <= _SIGMAS / math.sqrt(2 * count)
        and abs(float(values.mean())) <= _SIGMAS / math.sqrt(count)
        and right >= _SMALLEST_P
        and max(wrong) < _SMALLEST_P
        and float(np.abs(correlations).max()) <= _SIGMAS / math.sqrt(per_step.shape[1])
        and len(np.unique(values)) >= _DISTINCT * count
    )
    return passed, f"{deviation:.4f} of the planned noise over {count} values, KS p = {right:.3f}"


def _sampler(bench: Bench) -> tuple[bool, str]:
    """Tests who is sampled, how many, and who together; for records and users; none is cut off."""
    passed, scores, cap = True, [], 4
    seeded = stream(0, "self-test")
    for plan, population in ((_PLAN, 3000), (_user_plan(1.0, cap), 500)):
        owners = [str(record % population) for record in range(3000)]
        counts, sizes = np.zeros(population), []
        for batch in replace(plan, steps_per_round=_SAMPLES).batches(owners, seeded):
            taken = [int(owners[unit[0]]) for unit in batch]
            counts[taken] += 1
            sizes.append(len(taken))
            passed &= len(set(taken)) == len(taken)
            passed &= all(_is_one(unit, owners, cap) for unit in batch)
        scores += [
            _z(sum(sizes), population * _SAMPLES, plan.sample_rate),
            _dispersion(counts, _SAMPLES, plan.sample_rate),
            _dispersion(np.array(sizes), population, plan.sample_rate),
        ]
        two = replace(plan, sample_rate=0.5, steps_per_round=_SAMPLES)
        kinds = [sum(1 + int(unit[0]) for unit in pair) for pair in two.batches(["0", "1"], seeded)]
        scores += [_z(kinds.count(kind), _SAMPLES, 0.25) for kind in range(4)]  # none, either, both
        everybody = next(replace(plan, sample_rate=1.0).batches(owners, seeded))
        passed &= len(everybody) == population
    worst = max(map(abs, scores))
    return passed and worst <= _SIGMAS, f"largest |z| {worst:.2f} of {len(scores)} counts"


def _is_one(unit: np.ndarray, owners: list[str], cap: int) -> bool:
    """True if a unit has different records of one owner, at most the cap."""
    return 1 <= len(set(unit.tolist())) == len(unit) <= cap and len({owners[r] for r in unit}) == 1


def _z(count: int, trials: int, rate: float) -> float:
    """Returns the standard score of a binomial count."""
    return (count - trials * rate) / math.sqrt(trials * rate * (1 - rate))


def _dispersion(counts: np.ndarray, trials: int, rate: float) -> float:
    """Returns the standard score of the variance of independent binomial counts."""
    variance = trials * rate * (1 - rate)
    squares = (counts - trials * rate) ** 2 / variance
    spread = math.sqrt((2 + (1 - 6 * rate * (1 - rate)) / variance) * len(counts))
    return float(squares.sum() - len(counts)) / spread


def _empty(bench: Bench) -> tuple[bool, str]:
    """Tests that a round over no records releases the noise of all the steps that are charged."""
    work = LocalWork(bench.start, frozenset(bench.start), 0, 1, 0)
    training = TrainingConfig(optimizer="sgd", learning_rate=1.0)
    released = train(bench.model, bench.task, [], _PLAN, training, work)
    moved = np.concatenate([(released[key] - bench.start[key]).ravel() for key in released])
    charged = _PLAN.training_event.steps
    one = _PLAN.noise_multiplier * _PLAN.clip_norm / _PLAN.normaliser
    ratio = float(moved.std()) / (one * math.sqrt(_STEPS))
    passed = charged == _STEPS and abs(ratio - 1) <= _SIGMAS / math.sqrt(2 * len(moved))
    return passed, f"{ratio:.4f} of the noise of {_STEPS} steps, {charged} charged"


def _seeds(bench: Bench) -> tuple[bool, str]:
    """Tests that seeding every generator repeats neither noise nor samples."""
    metered, owners = replace(_PLAN, metric_noise_multiplier=2.0), [str(n) for n in range(400)]
    noises, samples = [], []
    for _ in range(2):
        _seed_everything()
        metric = torch.tensor(noisy_metric(bench.model, bench.task, [], bench.start, metered))
        _seed_everything()
        noises.append(torch.cat([bench.steps(_PLAN, [[]]).noise[0], metric.double()]))
        _seed_everything()
        batches = list(_PLAN.batches(owners, np.random.default_rng(0)))
        samples.append([int(unit[0]) for batch in batches for unit in batch])
    repeated = float((noises[0] == noises[1]).double().mean())  # float32 values may coincide by chance
    differ = bool((noises[0][-2:] != noises[1][-2:]).all())
    passed = repeated <= 1 - _DISTINCT and differ and samples[0] != samples[1]
    return passed, "two draws under the same seeds differ" if passed else "a seed repeats randomness"


def _seed_everything() -> None:
    """Seeds all global generators, as a hostile or careless caller may do."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def _accountants(bench: Bench) -> tuple[bool, str]:
    """Compares three accountants and the ledger's value with a known figure."""
    event = Event(0.032, 0.946, 150)
    accounts = accounting.cross_check([event], 1e-5)
    asked = accounting.epsilon([event], 1e-5)
    figures = f"PLD {accounts.pld:.3f}, PRV {accounts.prv:.3f}, RDP {accounts.rdp:.3f}"
    return abs(accounts.pld - 3.0) <= 0.05 and asked == accounts.pld, figures


def _metric(bench: Bench) -> tuple[bool, str]:
    """Tests that one user's ten records move the two numbers by at most one each, and the noise."""
    exact = replace(_user_plan(1.0, 4), metric_noise_multiplier=1e-6)
    one = [replace(example(length), owner="one") for length in range(3, 13)]
    score, units = noisy_metric(bench.model, bench.task, one, bench.start, exact)
    noisy = replace(exact, metric_noise_multiplier=2.0)
    draws = [noisy_metric(bench.model, bench.task, [], bench.start, noisy) for _ in range(300)]
    deviation = float(np.std(draws)) / (2.0 * math.sqrt(2.0))
    passed = (
        abs(units - 1) <= 1e-3
        and -1e-3 <= score <= 1 + 1e-3
        and abs(deviation - 1) <= _SIGMAS / math.sqrt(2 * 600)
        and len({number for draw in draws for number in draw}) == 600
    )
    return passed, f"ten records of one user count {units:.3f}; {deviation:.3f} of the planned noise"


def _ledger(bench: Bench) -> tuple[bool, str]:
    """Tests that a ledger accepts what fits, refuses what does not, and detects changes or gaps."""
    charge = Charge(Event(0.05, 3.0, 10), ADAPTER, 1.0, 1e-5, "run", 1, "", "", "", "", "", "")
    with tempfile.TemporaryDirectory() as directory:
        key = keys.signing_key(Path(directory))
        ledger = Ledger(Path(directory) / layout.LEDGER, key)
        limits = Limits((0.22, 1e-5))  # one such charge costs 0.2101, two cost 0.2912
        ledger.commit(ledger.reserve([charge], limits)[0], "release")
        try:
            ledger.reserve([replace(charge, round=2)], limits)
            return False, "a charge over the budget was taken"
        except BudgetExceeded:
            pass
        content = ledger.path.read_bytes()
        lines = content.splitlines(keepends=True)
        for changed in (
            content.replace(b'"steps": 10', b'"steps": 1'),
            b"".join(lines[:1] + lines[2:]),
            b"".join(lines[:-1]),
        ):
            ledger.path.write_bytes(changed)
            try:
                ledger.read()
                return False, "a changed ledger was taken for a sound one"
            except LedgerError:
                pass
    return True, "one charge taken, one refused; changed and missing lines found"
