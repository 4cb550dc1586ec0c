"""A whole run on one machine: prepare the data, start an engine, run the rounds, write the report."""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, assert_never

from flwr.serverapp import Grid

from fedslm import layout, validation
from fedslm.attestations import warn_if_cache_is_unusable
from fedslm.config import Config
from fedslm.data import store
from fedslm.data.layouts import laid_out
from fedslm.distillation.hooks import check_asked, distill_if_asked, follower, is_distilled
from fedslm.engines.local import LocalGrid
from fedslm.engines.placement import placed, visible
from fedslm.errors import DataError, RunError, have
from fedslm.federation.checkpoint import RunDirectory, metrics_of
from fedslm.federation.observers import Observer
from fedslm.federation.public_model import export
from fedslm.federation.roster import roster_of
from fedslm.federation.rounds import Federation, Outcome
from fedslm.federation.visible import SignalWatch
from fedslm.models.base import check_early, local
from fedslm.privacy.calibration import calibrated, shares_of
from fedslm.privacy.plan import RunPlan
from fedslm.privacy.policy import open_policy
from fedslm.recipes import Completed, completed, write_recipe
from fedslm.reporting import report
from fedslm.storage import write_text
from fedslm.tasks import build
from fedslm.workers import InlinePool, Pool, WorkerPool, preload

logger = logging.getLogger(__name__)
_DRAIN_SECONDS = 120.0
Rounds = Callable[[RunPlan, tuple[str, ...]], Outcome]


def simulate(
    config: Config | Completed, observers: Sequence[Observer] = (), pool: Pool | None = None
) -> dict[str, Any]:
    """Runs a simulation in a new run directory.

    Args:
        config: The config, or one that a recipe has completed; otherwise this is done first.
        observers: Receive progress events.
        pool: Workers of :func:`workers_for` that several runs share: a run with the same base, adapter
            and task finds them loaded. None: the run starts its own.

    Returns:
        The content of ``report.json``.

    Raises:
        FedslmError: The config, the data, the model or the run directory cannot be used.
    """
    made = config if isinstance(config, Completed) else completed(config)
    validation.check(made.config)
    check_asked(made.config.distill)
    config = with_layout(made.config.resolved())
    directory = RunDirectory.create(run_path(config), config)
    try:
        write_recipe(directory.path, made)
        report = Run(config, directory, observers, pool).report()
    except Exception:
        if not directory.has_checkpoint:
            _discard(directory)  # nothing has run yet: the corrected call may reuse the name
        raise
    distill_if_asked(directory.path, config.distill)
    return report


def run_path(config: Config) -> Path:
    """The directory of a config's run."""
    return Path(config.run.directory or Path("runs") / config.run.name)


def _discard(directory: RunDirectory) -> None:
    """Removes a run directory; its client logs are kept next to it."""
    log = directory.path / layout.CLIENTS_LOG
    if log.exists() and log.stat().st_size:
        kept = directory.path.with_name(f"{directory.path.name}.{layout.CLIENTS_LOG}")
        log.replace(kept)
        logger.warning("no round was run, so %s is removed; its log is %s", directory.path, kept)
    shutil.rmtree(directory.path, ignore_errors=True)


def resume(
    path: Path,
    observers: Sequence[Observer] = (),
    expected: Config | None = None,
    pool: Pool | None = None,
) -> dict[str, Any]:
    """Continues a run from its last checkpoint; a finished run is left unchanged.

    Args:
        path: The run directory.
        observers: Receive progress events.
        expected: Refuse the directory if it was created with another config.
        pool: As for :func:`simulate`.

    Raises:
        FedslmError: As :func:`simulate`, or the run cannot be continued.
    """
    expected = None if expected is None else completed(expected).config
    done = finished(path, expected)
    if done is not None:
        return done
    directory, config = RunDirectory.open(path, expected)
    directory.check_continues(config)
    report = Run(config, directory, observers, pool).report()
    distill_if_asked(directory.path, config.distill)
    return report


def finished(path: Path, expected: Config | None = None) -> dict[str, Any] | None:
    """Returns a finished run's report; None if a round, the report or a student is missing.

    Args:
        path: The run directory.
        expected: Refuse the directory if it was created with another config.

    Raises:
        RunError: It is not a run directory, or was created with another config.
    """
    expected = None if expected is None else completed(expected).config
    directory, config = RunDirectory.open(path, expected)
    try:
        text = (directory.path / layout.REPORT).read_text(encoding="utf-8")
        found: dict[str, Any] = json.loads(text)
        for key in ("metrics_before", "metrics_after"):
            found[key] = metrics_of(found[key])
        found["directory"] = str(directory.path)  # it may have been moved
        is_done = found["run_id"] == directory.run_id and found["rounds"] == config.federation.rounds
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return found if is_done and is_distilled(directory.path, config.distill) else None


def with_layout(config: Config) -> Config:
    """Returns the config with column names from the public split where the config sets none.

    Raises:
        DataError: The public split cannot be read.
    """
    data, task = laid_out(config.data, config.task, config.run.seed)
    return config.model_copy(update={"data": data, "task": task})


@dataclass(frozen=True)
class Run:
    """A run in its directory, on any engine.

    Attributes:
        config: The resolved config.
        directory: The run's directory.
        observers: Receive progress events.
        pool: Workers that outlive the run; None: it starts its own.
    """

    config: Config
    directory: RunDirectory
    observers: Sequence[Observer] = ()
    pool: Pool | None = None

    def report(self) -> dict[str, Any]:
        """Runs on the configured engine; returns the content of ``report.json``."""
        match self.config.engine.name:
            case "local" | "ray":
                return self._simulated()
            case "deployed":
                raise RunError("real nodes are asked by `fedslm server run`, not by a simulation")
            case _:
                assert_never(self.config.engine.name)

    def serve(self, rounds: Rounds) -> dict[str, Any]:
        """Prepares data and plan, calls ``rounds``, and writes the report.

        Args:
            rounds: Runs the rounds, given a plan and class names. The directory is locked against other
                processes meanwhile.
        """
        done: dict[str, Any] | None = None
        try:
            with self.directory.locked():
                done = self._served(rounds)
            return done
        finally:
            _tell_end(self.observers, done)

    def rounds_on(self, grid: Grid, pool: Pool, plan: RunPlan, labels: tuple[str, ...]) -> Outcome:
        """Runs the rounds on a grid and exports the adapter.

        Args:
            grid: Connection to the clients.
            pool: Runs the server's own model computations.
            plan: The calibrated plan.
            labels: Class names; these are public.
        """
        config, directory = self.config, self.directory
        follow = follower(config.distill, config.federation.rounds, pool.call)
        observers = (*self.observers, SignalWatch())
        federation = Federation(config, grid, pool, directory, observers, follow)
        outcome = federation.run(plan, labels)
        pool.call(export, outcome.setup, outcome.adapter, directory.path / layout.ADAPTER)
        return outcome

    def _served(self, rounds: Rounds) -> dict[str, Any]:
        """Runs the rounds and returns the report."""
        began, config, directory = time.monotonic(), self.config, self.directory
        if config.engine.policy is not None:
            _install_policy(Path(config.engine.policy), directory)
        data, plan = _prepare(config, directory)
        outcome = rounds(plan, data.labels)
        headline = build(config.task, config.data, data.labels).headline
        seconds = time.monotonic() - began
        inputs = report.Inputs(config, plan, outcome, data.names, headline, seconds, data.duplicates)
        return report.write(directory, inputs)

    def _simulated(self) -> dict[str, Any]:
        """Runs clients in worker processes, in this process, or in a Ray cluster."""
        if self.pool is not None:
            pool = self.pool
            return self._on(lambda: pool)
        with ThreadPoolExecutor(1) as background:
            starting = background.submit(_pool, self.config, self.directory)  # while the data is read
            try:
                return self._on(starting.result)
            finally:
                if starting.exception() is None:  # else that error, or an earlier one, is on its way
                    starting.result().close(drain_seconds=_DRAIN_SECONDS)

    def _on(self, ready: Callable[[], Pool]) -> dict[str, Any]:
        """Runs clients in workers, which may be ready only after the data."""

        def rounds(plan: RunPlan, labels: tuple[str, ...]) -> Outcome:
            pool = ready()
            grid = LocalGrid(self.config.federation.num_clients, pool)
            try:
                return self.rounds_on(grid, pool, plan, labels)
            finally:
                if self.pool is not None:  # the next run's jobs must not wait behind this one's
                    grid.forget_all()

        return self.serve(rounds)


def _tell_end(observers: Sequence[Observer], report: dict[str, Any] | None) -> None:
    """Calls ``on_end`` of all observers. An error of one is logged, and hides no other error."""
    for observer in observers:
        try:
            observer.on_end(report)
        except Exception:  # foreign code
            logger.exception("on_end of %s failed", type(observer).__name__)


def _prepare(config: Config, directory: RunDirectory) -> tuple[store.Shards, RunPlan]:
    """Partitions the data and calibrates the plan, concurrently."""
    check_early(config.model, config.lora, private=config.privacy.unit != "none")
    if config.privacy.unit != "none" and config.engine.nodes is None:
        warn_if_cache_is_unusable()
    with ThreadPoolExecutor(1) as background:
        privacy, training = config.privacy, config.training
        rounds, cohort = config.federation.rounds, config.federation.cohort_size
        shares = shares_of(privacy, training, config.secure_aggregation, cohort)
        planned = background.submit(calibrated, privacy, training, rounds, shares)
        data = _written(config, directory)
        plan = planned.result()
    if config.engine.nodes is None:  # the server knows nothing about a real node's records
        _check_sizes(config, data)
    return data, plan


def _written(config: Config, directory: RunDirectory) -> store.Shards:
    """Writes the run's data: all shards in a simulation, only the public part with real nodes."""
    data, task, seed = config.data, config.task, config.run.seed
    if config.engine.nodes is not None:
        nodes = roster_of(
            directory.path,
            Path(config.engine.nodes),
            names=config.federation.nodes,
            num_clients=config.federation.num_clients,
        )
        names = tuple(node.name for node in nodes.values())
        return store.write_public(directory.data, data, task, names=names, seed=seed)
    return store.write(
        directory.data,
        data,
        task,
        privacy=config.privacy,
        num_clients=config.federation.num_clients,
        seed=seed,
        attack=config.attack,
    )


def _install_policy(source: Path, directory: RunDirectory) -> None:
    """Installs the given policy at every simulated node."""
    open_policy(source)
    write_text(directory.nodes / layout.POLICY, source.read_text(encoding="utf-8"))


def _pool(config: Config, directory: RunDirectory) -> Pool:
    """Starts the workers that the config asks for."""
    log = directory.path / layout.CLIENTS_LOG
    if config.engine.name == "ray":
        from fedslm.engines.ray import RayPool
        from fedslm.engines.ray_cluster import Needs

        most = config.federation.cohort_size
        return RayPool(config.engine, Needs(directory.path, local(config.model), log, most))
    return workers_for(config, log)


def workers_for(config: Config, log: Path) -> Pool:
    """Starts the workers of the local engine; the caller closes them.

    Args:
        config: Any config that they will run.
        log: File to which they append their logs.

    Raises:
        ConfigError: ``engine.devices`` names a device that is not here.
    """
    place = placed(config)
    if place.workers == 0:
        return InlinePool(threads=place.threads)
    preload(private=config.privacy.unit != "none")
    environments = [visible(device) for device in place.devices]
    return WorkerPool(place.workers, threads=place.threads, log=log, environments=environments)


def _check_sizes(config: Config, data: store.Shards) -> None:
    """Checks for clients with less than one batch: an error without privacy, a warning with it.

    Under privacy such a client takes part like any other, since its absence would reveal its size; only
    one with less than a quarter of a batch is named, since there the noise is most of its update.
    """
    limit = config.training.batch_size
    if config.privacy.unit != "none":
        limit = math.ceil(limit / 4)
    small = [
        f"{name} ({size})" for name, size in zip(data.names, data.sizes, strict=True) if size < limit
    ]
    if not small:
        return
    what = (
        "training.batch_size" if config.privacy.unit == "none" else "a quarter of training.batch_size"
    )
    text = (
        f"{have(len(small), 'client')} fewer records than {what}={config.training.batch_size}: "
        f"{', '.join(small[:5])}; lower training.batch_size, use fewer clients, or another "
        f"data.partition"
    )
    if config.privacy.unit == "none":
        raise DataError(text)
    logger.warning(text)
