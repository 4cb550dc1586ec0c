"""The search: one trial after another, each kept as it ends; then the best is compared again."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedslm import layout
from fedslm.config import Config
from fedslm.errors import FedslmError, Unusable
from fedslm.inference.bootstrap import Draws, Estimate, Statistics, compare
from fedslm.inference.evaluation import RESAMPLES, own_rows
from fedslm.inference.trained import load_trained, open_run
from fedslm.recipes import Completed
from fedslm.simulation import simulate, workers_for
from fedslm.storage import json_text, locked, replacing, write_text
from fedslm.tasks import build
from fedslm.training.evaluation import statistics
from fedslm.tuning.setting import (
    Setting,
    check,
    fingerprint,
    noise_of,
    prepared,
    read,
    real_config,
    stored,
    trial_config,
    tried,
)
from fedslm.tuning.space import SPACES, Values, candidates, keys_of
from fedslm.workers import Pool

LOWER_IS_BETTER = ("loss", "perplexity")
_LOCK_SECONDS = 1.0
_RUNS_AFTER = 2  # the best trial and trial 0 run once more


@dataclass(frozen=True)
class Trial:
    """A finished trial.

    Attributes:
        number: Its place in the order of the search; 0 has the config's own settings.
        again: Whether it is the second run of these settings, with other noise.
        values: Value of each key that is varied.
        value: The main metric on the held-out records; None if it is not a number, or nothing was run.
        noise_multiplier: Noise multiplier of the real run with these settings.
        seconds: Wall time.
        error: Why nothing was run; otherwise empty.
    """

    number: int
    again: bool
    values: Values
    value: float | None
    noise_multiplier: float
    seconds: float
    error: str = ""


@dataclass(frozen=True)
class Options:
    """What the caller chooses.

    Attributes:
        directory: Where trials are kept.
        minutes: No trial begins after this time; trial 0 always runs.
        trials: Most trials, those of earlier calls included.
        on_trial: Receives each trial as it ends.
    """

    directory: Path
    minutes: float = 10.0
    trials: int = 30
    on_trial: Callable[[Trial], None] = field(default=lambda _: None)


@dataclass(frozen=True)
class Result:
    """The result of a search.

    Attributes:
        setting: What all trials shared.
        trials: All trials, in the order in which they ran.
        best: The trial with the best metric.
        difference: Best minus trial 0 on the held-out records, with its 95 % interval, from the second
            run of both; None if trial 0 is the best, or they were not run again.
        is_better: Whether the interval excludes that they are equal.
        headline: Name of the metric.
    """

    setting: Setting
    trials: tuple[Trial, ...]
    best: Trial
    difference: Estimate | None
    is_better: bool
    headline: str

    @property
    def own(self) -> Trial:
        """The trial with the config's own settings."""
        return next(each for each in self.trials if each.number == 0)


def search(config: Config, options: Options) -> Result:
    """Searches better settings on public records; reads no private record, and charges nothing.

    Trials run with the noise that the real run would have. The result is about noise, not a privacy
    promise: public records need none. The best trial and trial 0 are then run again, so that noise that
    happened to be kind does not decide.

    Args:
        config: A private config, complete or not, with a public source.
        options: Where, how long and how many.

    Raises:
        FedslmError: The config, the public records or the base cannot be used, or the directory belongs
            to another config.
    """
    check(config)
    directory = options.directory.expanduser().absolute()
    sha256 = fingerprint(config)
    _check_directory(directory)
    with locked(directory / ".lock", _LOCK_SECONDS, f"{directory} is in use by another process"):
        setting = read(directory, sha256)
        if setting is None:
            setting = prepared(config, directory)
            stored(setting, directory, sha256)
        with closing(_Search(setting, directory, options)) as ongoing:
            return ongoing.result()


def _check_directory(directory: Path) -> None:
    """Makes the directory; refuses one that holds something else."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        there = {path.name for path in directory.iterdir()}
    except OSError as error:
        raise Unusable(f"--directory {directory} cannot be used: {error}; choose another") from error
    if layout.TUNE_STATE not in there and there - {".lock", "public"}:
        raise Unusable(f"--directory {directory} holds other files; choose another")


class _Search:
    """A search in its directory.

    Args:
        setting: What all trials share.
        directory: Where they are kept.
        options: How long and how many.
    """

    def __init__(self, setting: Setting, directory: Path, options: Options) -> None:
        self._setting, self._directory, self._options = setting, directory, options
        self._runs = directory / layout.TRIAL_RUNS
        self._trials = [*_read_trials(directory / layout.TRIALS)]
        self._pool: Pool | None = None
        task = setting.config.task
        self._task = build(task, setting.config.data, setting.labels)
        self._end = time.monotonic() + 60 * options.minutes

    def close(self) -> None:
        """Ends the workers."""
        if self._pool is not None:
            self._pool.close()

    def result(self) -> Result:
        """Runs what is missing, and compares the best trial with trial 0."""
        axes = SPACES[self._setting.recipe]
        config = self._setting.config.model_dump()
        dotted = {key: config[key.partition(".")[0]][key.partition(".")[2]] for key in keys_of(axes)}
        order = candidates(dotted, axes, self._setting.config.run.seed)
        for number, values in enumerate(order[: self._options.trials]):
            if self._find(number) is None:
                if number and not self._has_time():
                    break
                self._run(number, values)
        best = min((each for each in self._trials if not each.again), key=self._rank)
        difference = self._compared(best)
        sign = -1 if self._task.headline in LOWER_IS_BETTER else 1
        is_better = difference is not None and min(sign * difference.low, sign * difference.high) > 0
        trials = tuple(self._trials)
        return Result(self._setting, trials, best, difference, is_better, self._task.headline)

    def _find(self, number: int, *, again: bool = False) -> Trial | None:
        """Returns a trial that is finished."""
        found = (each for each in self._trials if (each.number, each.again) == (number, again))
        return next(found, None)

    def _has_time(self) -> bool:
        """Whether one more trial fits, with the runs after it."""
        seconds = [each.seconds for each in self._trials]
        longest = max(seconds[1:] or seconds, default=0.0)  # the first trial loads and tests, too
        return time.monotonic() + (1 + _RUNS_AFTER) * longest < self._end

    def _rank(self, trial: Trial) -> tuple[float, int]:
        """Orders trials, best first; of equal ones the earlier."""
        if trial.value is None:
            return math.inf, trial.number
        return (
            trial.value if self._task.headline in LOWER_IS_BETTER else -trial.value,
            trial.number,
        )

    def _compared(self, best: Trial) -> Estimate | None:
        """Runs the best trial and trial 0 again; returns the paired difference; None if 0 is best."""
        if best.number == 0 or best.value is None:
            return None
        found: list[Statistics] = []
        for number in (0, best.number):
            before = self._find(number)
            trial = self._find(number, again=True)
            if trial is None and before is not None:
                trial = self._run(number, before.values, again=True)
            if trial is None or trial.value is None:
                return None
            found.append(_read_scores(self._scores(number, again=True)))
        draws = Draws(RESAMPLES, self._setting.config.run.seed)
        return compare((found[0], found[1]), self._task.metrics, draws)[self._task.headline].difference

    def _run(self, number: int, values: Values, *, again: bool = False) -> Trial:
        """Runs one trial, and keeps its line and its scores."""
        began, value, error, noise = time.monotonic(), None, "", 0.0
        place = self._runs / f"{number:04d}"
        try:
            noise = noise_of(real_config(self._setting, values))
            config = trial_config(self._setting, values, place)
            scores = self._scored(config, place)
            _write_scores(self._scores(number, again=again), scores)
            sums = {name: each.sum(axis=0) for name, each in scores.items()}
            value = self._task.metrics(sums)[self._task.headline]
        except FedslmError as reason:
            if number == 0 or not tried(reason):
                raise
            error = str(reason)
        finally:
            shutil.rmtree(place, ignore_errors=True)
        finite = None if value is None or not math.isfinite(value) else value
        seconds = time.monotonic() - began
        trial = Trial(number, again, values, finite, noise, seconds, error)
        self._trials.append(trial)
        lines = "".join(json_text(asdict(each)) + "\n" for each in self._trials)
        write_text(self._directory / layout.TRIALS, lines)
        self._options.on_trial(trial)
        return trial

    def _scored(self, config: Config, place: Path) -> Statistics:
        """Trains, and returns the task's statistics of each held-out record."""
        shutil.rmtree(place, ignore_errors=True)  # of a trial that was interrupted
        if self._pool is None and config.engine.name == "local":
            self._pool = workers_for(config, self._directory / layout.CLIENTS_LOG)
        simulate(Completed(config), pool=self._pool)
        run = open_run(place)
        trained = load_trained(run)
        rows = own_rows(run)
        examples = trained.task.prepare(rows, trained.model.tokenizer).examples
        return statistics(trained.model, trained.task, examples, run.adapter)

    def _scores(self, number: int, *, again: bool) -> Path:
        """File with a trial's statistics of each held-out record."""
        return self._runs / f"{number:04d}{'-again' if again else ''}.npz"


def _read_trials(path: Path) -> Iterator[Trial]:
    """Yields the trials of earlier calls.

    Raises:
        Unusable: The file was edited.
    """
    if not path.exists():
        return
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            yield Trial(**json.loads(line))
    except (OSError, ValueError, TypeError) as error:
        raise Unusable(f"{path} cannot be read: {error}; choose another --directory") from error


def _write_scores(path: Path, scores: Mapping[str, Any]) -> None:
    """Writes the statistics of each held-out record."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **scores)


def _read_scores(path: Path) -> Statistics:
    """Reads what :func:`_write_scores` wrote."""
    try:
        with np.load(path) as found:
            return {name: found[name] for name in found.files}
    except (OSError, ValueError) as error:
        raise Unusable(f"{path} cannot be read: {error}; choose another --directory") from error
