"""Two worlds that differ in one record, through all of a client: request, ledger, training, reply.

The attacker knows everything but the noise. In both worlds a node is asked many times, each time as if it
were the first; the releases must look as alike as its epsilon says. Three small mistakes must show.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import norm
from support import mutations as broken
from support.served import ask, context_of, first_request
from support.tiny import PRIVATE, write_base, write_rows

from fedslm.config import Config
from fedslm.privacy.gaussian import GaussianNoise
from fedslm.protocol.messages import Request
from fedslm.training import steps

pytestmark = pytest.mark.slow

EPSILON, DELTA = 8.0, 1e-5
CLIP = 0.01  # far below a record's gradient
WITH, WITHOUT = 0, 1  # clients; the larger comes first
SURE = 4.0  # standard errors
RUNS = 300  # in each world


def delta_of(mu: float, epsilon: float) -> float:
    """Delta at an epsilon of two Gaussians that are mu standard deviations apart (Balle and Wang 2018)."""
    far = math.exp(epsilon + float(norm.logcdf(-mu / 2 - epsilon / mu)))
    return float(norm.cdf(mu / 2 - epsilon / mu)) - far


@dataclass(frozen=True)
class Seen:
    """What tells the two worlds apart.

    Attributes:
        apart: Distance of the mean releases, in clip norms / normaliser.
        mu: The same in standard deviations of a release.
        runs: Releases of each world.
    """

    apart: float
    mu: float
    runs: int

    @property
    def error(self) -> float:
        """Standard error of ``mu``: of the distance, and of the deviation."""
        return math.sqrt(2 / self.runs + self.mu**2 / (4 * self.runs))


@dataclass(frozen=True)
class Worlds:
    """A node without a record, and the same node with it."""

    request: Request

    @property
    def noise(self) -> float:
        """The plan's noise multiplier."""
        return float(self.request.setup.plan.noise_multiplier)

    def release(self, world: int) -> np.ndarray:
        """What a new node sends for its first request, in clip norms / normaliser."""
        nodes = Path(self.request.setup.directory) / "nodes"
        shutil.rmtree(nodes / f"client-{world:05d}", ignore_errors=True)
        reply = ask(self.request, context_of(world))
        assert reply.status == "ok", reply.reason
        assert reply.delta is not None
        flat = np.concatenate([reply.delta[key].ravel() for key in sorted(reply.delta)])
        return -flat.astype(np.float64) * self.request.setup.training.batch_size / CLIP

    def seen(self, runs: int) -> Seen:
        """Attacks: projects so many releases of each world on how far they are apart without noise."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(GaussianNoise, "draw", lambda self, shape, stddev: np.zeros(shape))
            direction = self.release(WITH) - self.release(WITHOUT)
        direction /= np.linalg.norm(direction)
        scores = np.array([[self.release(w) @ direction for w in (WITH, WITHOUT)] for _ in range(runs)])
        apart = float(np.subtract(*scores.mean(axis=0)))
        return Seen(apart, apart / math.sqrt(scores.var(axis=0, ddof=1).mean()), runs)


Make = Callable[[float, int], Worlds]


@pytest.fixture(scope="module")
def worlds(config_in: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Makes both worlds for an epsilon and a number of other records; the self-test has passed."""
    base = write_base(tmp_path_factory.mktemp("base"), "bert", "classification", num_hidden_layers=1)

    def make(epsilon: float, others: int) -> Worlds:
        directory = tmp_path_factory.mktemp("worlds")
        row = {"text": "chest pain and a murmur", "label": "heart"}
        target = {**row, "label": "bone", "client": "b"}  # its gradient is opposite to the others'
        rows = [{**row, "client": site} for site in "ab" for _ in range(others)]
        write_rows(directory / "train.jsonl", [*rows, target])
        write_rows(directory / "test.jsonl", [rows[0], target])
        asked = {**PRIVATE, "epsilon": epsilon, "delta": DELTA, "clip_norm": CLIP, "sample_rate": 1.0}
        config = config_in(
            directory / "run",
            model={"base": str(base)},
            lora={"target_modules": ["query", "value"]},
            data={"source": str(directory)},
            training={
                "local_steps": 1,
                "batch_size": others,
                "optimizer": "sgd",
                "learning_rate": 1.0,
            },
            federation={"num_clients": 2, "rounds": 1},
            privacy=asked,
        )
        made = Worlds(first_request(config))
        made.release(WITHOUT)  # the node is attested before anything is broken
        return made

    return make


@pytest.fixture(scope="module")
def at_eight(worlds: Make) -> Worlds:
    """Both worlds at an epsilon of 8."""
    return worlds(EPSILON, 4)


def divided_by_the_batch(patch: pytest.MonkeyPatch) -> None:
    """The noisy sum is divided by the number of units in the sample."""

    def call(self: steps.PrivateStep, units: list) -> None:
        self.optimizer.expected_batch_size = max(1, len(units))
        broken.CALL(self, units)

    patch.setattr(steps.PrivateStep, "__call__", call)


def test_a_release_is_as_private_as_it_says(at_eight: Worlds) -> None:
    """What is measured of sound code does not contradict (8, 1e-5), and comes as near as an attack can."""
    seen = at_eight.seen(RUNS)
    assert delta_of(seen.mu - SURE * seen.error, EPSILON) <= DELTA
    assert seen.mu + SURE * seen.error >= 1 / at_eight.noise


@pytest.mark.parametrize(
    "mutate",
    [broken.too_little_noise, broken.clipping_by_tensor, divided_by_the_batch],
)
def test_a_small_mistake_shows(
    at_eight: Worlds,
    monkeypatch: pytest.MonkeyPatch,
    mutate: Callable[[pytest.MonkeyPatch], None],
) -> None:
    """Noise at two thirds, a clip for each tensor, a batch's own size: each contradicts (8, 1e-5)."""
    mutate(monkeypatch)
    seen = at_eight.seen(RUNS)
    assert delta_of(seen.mu - SURE * seen.error, EPSILON) > DELTA


def test_one_record_moves_a_release_by_the_clip_norm(worlds: Make) -> None:
    """At an epsilon of 60, beside the very same noise, the two releases are C / L apart, to 0.02."""
    sharp, draw = worlds(60.0, 1), GaussianNoise.draw
    for _ in range(5):
        noises: list[np.ndarray] = []

        def kept(self: GaussianNoise, shape: tuple[int, ...], stddev: float) -> np.ndarray:
            noises.append(draw(self, shape, stddev))  # noqa: B023  (called within this turn)
            return noises[-1]  # noqa: B023

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(GaussianNoise, "draw", kept)
            release = sharp.release(WITH)
            again = iter(noises)
            patch.setattr(GaussianNoise, "draw", lambda *_, again=again: next(again))
            apart = np.linalg.norm(release - sharp.release(WITHOUT))
        assert abs(apart - 1) <= 0.02
