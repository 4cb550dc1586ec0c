"""The Python API: a whole run by one call, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedslm import simulation
from fedslm.config import Config, from_mapping, from_toml, with_overrides
from fedslm.federation.checkpoint import Checkpoint
from fedslm.federation.rounds import Observer
from fedslm.records import RoundRecord, epsilon_of_json


@dataclass(frozen=True)
class RunResult:
    """What came of a run.

    Attributes:
        directory: The run directory, with ``report.md`` and ``report.png``.
        adapter: The PEFT adapter's directory, for ``PeftModel.from_pretrained``.
        rounds: Rounds that are done.
        metrics_before: Metrics of the base on the public evaluation split.
        metrics_after: Metrics of the tuned model on the same split.
        epsilon: The largest epsilon of a client at ``delta``; infinite without privacy.
        delta: Of the guarantee; None without privacy.
        stopped: Why the run stopped before its last round, or came to nothing; empty if it did not.
        report: The content of ``report.json``.
    """

    directory: Path
    adapter: Path
    rounds: int
    metrics_before: Mapping[str, float]
    metrics_after: Mapping[str, float]
    epsilon: float
    delta: float | None
    stopped: str
    report: Mapping[str, Any]


class Silent:
    """An observer that shows nothing."""

    def on_start(self, config: Config, done: Checkpoint) -> None:
        """Nothing is shown."""

    def on_client(self, round: int, done: int, cohort: int) -> None:
        """Nothing is shown."""

    def on_round(self, record: RoundRecord) -> None:
        """Nothing is shown."""


def simulate(
    config: Config | Path | str,
    *,
    overrides: Mapping[str, Any] | None = None,
    observer: Observer | None = None,
) -> RunResult:
    """Runs a simulation in a new run directory.

    Args:
        config: A config, or the path of a TOML file.
        overrides: Dotted key to value, in place of what the file or the config says.
        observer: Is told how the run goes, such as :class:`fedslm.progress.Bar`; nobody by default.

    Raises:
        FedslmError: The config, the data, the model or the run directory is not usable.

    >>> import fedslm, tempfile
    >>> directory = tempfile.mkdtemp() + "/run"
    >>> small = {"federation.rounds": 1, "training.local_steps": 1, "engine.workers": 0}
    >>> result = fedslm.simulate(
    ...     "simulations/demo.toml",
    ...     overrides={"run.directory": directory, "privacy.epsilon": 2, **small},
    ... )
    >>> 0 < result.epsilon <= 2, result.delta, sorted(result.metrics_after)
    (True, 1e-05, ['accuracy', 'f1_macro', 'loss'])
    >>> (result.adapter / "adapter_config.json").exists()
    True
    """
    changed = overrides or {}
    if not isinstance(config, Config):
        loaded = from_toml(config, changed)
    else:
        loaded = from_mapping(with_overrides(config.model_dump(), changed))
    return _result(simulation.simulate(loaded, observer or Silent()))


def resume(directory: Path | str, *, observer: Observer | None = None) -> RunResult:
    """Continues a run from its last checkpoint; one that is finished is left as it is.

    Args:
        directory: The run directory.
        observer: As for :func:`simulate`.

    Raises:
        FedslmError: As :func:`simulate`, or the directory cannot be continued.
    """
    return _result(simulation.resume(Path(directory), observer or Silent()))


def _result(report: Mapping[str, Any]) -> RunResult:
    """A report's most important values, typed."""
    directory = Path(report["directory"])
    return RunResult(
        directory,
        directory / "adapter",
        rounds=report["rounds"],
        metrics_before=report["metrics_before"],
        metrics_after=report["metrics_after"],
        epsilon=epsilon_of_json(report["epsilon"]),
        delta=report["delta"],
        stopped=report["stopped"],
        report=report,
    )
