"""The Python API: run or resume a whole simulation with one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedslm import layout, simulation
from fedslm.config import Config, from_mapping, from_toml, with_overrides
from fedslm.errors import ConfigError, Problem
from fedslm.federation.observers import Observer
from fedslm.records import epsilon_of_json

_TOLD = ("on_start", "on_client", "on_round", "on_end")


@dataclass(frozen=True)
class RunResult:
    """The result of a run.

    Attributes:
        directory: The run directory, with ``report.md`` and ``report.png``.
        adapter: The PEFT adapter's directory, for ``PeftModel.from_pretrained``.
        rounds: Number of completed rounds.
        metrics_before: Metrics of the base model on the public evaluation split.
        metrics_after: Metrics of the tuned model on the same split.
        epsilon: Epsilon at ``delta``: the largest over the clients, or that of all clients composed if
            units overlap; infinite without privacy.
        delta: Delta of the guarantee; None without privacy.
        stopped: Why the run stopped before its last round, or why it changed nothing; otherwise empty.
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


def simulate(
    config: Config | Path | str | Mapping[str, Any],
    *,
    overrides: Mapping[str, Any] | None = None,
    observers: Sequence[Observer] = (),
) -> RunResult:
    """Runs a simulation in a new run directory.

    Args:
        config: The path of a TOML file, a mapping of its sections, or a config.
        overrides: Dotted key to value; replaces the value in the file or the config.
        observers: Receive progress events, such as :class:`fedslm.progress.Bar`; by default nothing is
            shown. An exception in an observer ends the run; :func:`resume` can continue it.

    Raises:
        FedslmError: An argument, the config, the data, the model or the run directory cannot be used.

    >>> import fedslm, tempfile
    >>> place = tempfile.TemporaryDirectory()
    >>> small = {"federation.rounds": 1, "training.local_steps": 1, "engine.workers": 0}
    >>> result = fedslm.simulate(
    ...     "simulations/demo.toml",
    ...     overrides={"run.directory": f"{place.name}/run", "privacy.epsilon": 2, **small},
    ... )
    >>> 0 < result.epsilon <= 2, result.delta, sorted(result.metrics_after)
    (True, 1e-05, ['accuracy', 'f1_macro', 'loss'])
    >>> (result.adapter / "adapter_config.json").exists()
    True
    """
    loaded = _configured(config, {} if overrides is None else overrides)
    return _result(simulation.simulate(loaded, _checked(observers)))


def resume(directory: Path | str, *, observers: Sequence[Observer] = ()) -> RunResult:
    """Continues a run from its last checkpoint; a finished run is left unchanged.

    Args:
        directory: The run directory.
        observers: As for :func:`simulate`.

    Raises:
        FedslmError: As :func:`simulate`, or the run cannot be continued.
    """
    return _result(simulation.resume(Path(directory), _checked(observers)))


def _configured(config: object, overrides: object) -> Config:
    """Returns the config that the arguments describe.

    Raises:
        ConfigError: An argument has the wrong type, or the config is invalid.
    """
    if not isinstance(overrides, Mapping):
        example = 'should be a mapping such as {"privacy.epsilon": 2}'
        raise ConfigError(
            [Problem("overrides", f"value of type {type(overrides).__name__}: {example}")]
        )
    match config:
        case Config():
            own = config.model_dump(exclude_unset=True)  # a recipe may set what the caller did not
            return from_mapping(with_overrides(own, overrides))
        case str() | Path():
            return from_toml(config, overrides)
        case Mapping():
            return from_mapping(with_overrides(config, overrides))
        case _:
            kinds = "should be the path of a TOML file, its sections as a mapping, or a fedslm.Config"
            raise ConfigError([Problem("config", f"value of type {type(config).__name__}: {kinds}")])


def _checked(observers: object) -> tuple[Observer, ...]:
    """Returns the observers after checking their types.

    Raises:
        ConfigError: The argument is not a list or tuple, or an observer lacks a method.
    """
    if not isinstance(observers, list | tuple):
        message = f"value of type {type(observers).__name__}: should be a list of observers"
        raise ConfigError([Problem("observers", message)])
    for observer in observers:
        lacking = [name for name in _TOLD if not callable(getattr(observer, name, None))]
        if lacking:
            message = f"value of type {type(observer).__name__}: has no {', '.join(lacking)}"
            raise ConfigError([Problem("observers", f"{message}; subclass fedslm.Observer")])
    return tuple(observers)


def _result(report: Mapping[str, Any]) -> RunResult:
    """Builds a typed result from the most important values of a report."""
    directory = Path(report["directory"])
    return RunResult(
        directory,
        directory / layout.ADAPTER,
        rounds=report["rounds"],
        metrics_before=report["metrics_before"],
        metrics_after=report["metrics_after"],
        epsilon=epsilon_of_json(report["epsilon"]),
        delta=report["delta"],
        stopped=report["stopped"],
        report=report,
    )
