"""Run or resume a whole simulation with one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedslm import simulation
from fedslm.api.given import InMemory, placed
from fedslm.api.result import RunResult, result_of
from fedslm.config import Config, read_toml, with_overrides
from fedslm.errors import ConfigError, Problem
from fedslm.federation.observers import Observer
from fedslm.models.given import GivenBase

_TOLD = ("on_start", "on_client", "on_round", "on_end")


def simulate(
    config: Config | Path | str | Mapping[str, Any],
    *,
    overrides: Mapping[str, Any] | None = None,
    train: Any = None,
    evaluation: Any = None,
    public: Any = None,
    model: Any = None,
    observers: Sequence[Observer] = (),
) -> RunResult:
    """Runs a simulation in a new run directory.

    Args:
        config: The path of a TOML file, a mapping of its sections, or a config.
        overrides: Dotted key to value; replaces the value in the file or the config.
        train: Private training records in memory, in place of ``data.source``: a ``datasets.Dataset``,
            a list of dicts or a pandas frame, which the clients share as ``data.partition`` says; or a
            mapping from the name of each client to one of these. The columns that the run reads are
            copied into the run directory (``data/``), where only you can read them: delete ``data/``
            when you are done.
        evaluation: Public evaluation records in memory, in place of ``data.evaluation_source``: one of
            the first three.
        public: Public records that training may use, in memory, in place of ``data.public_source``.
        model: The base model, in place of ``model.base``: a hub name, a directory, or a pair of a
            transformers model and its tokenizer. A pair is written into the run directory (``base/``),
            from which the run loads its own copy, so device and mode of the pair do not matter.
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
    told = checked_observers(observers)
    sections = _sections(config, {} if overrides is None else overrides)
    with placed(sections, InMemory.of(train, evaluation, public), GivenBase.of(model)) as made:
        return result_of(simulation.simulate(made, told))


def resume(directory: Path | str, *, observers: Sequence[Observer] = ()) -> RunResult:
    """Continues a run from its last checkpoint; a finished run is left unchanged.

    Args:
        directory: The run directory.
        observers: As for :func:`simulate`.

    Raises:
        FedslmError: As :func:`simulate`, or the run cannot be continued.
    """
    return result_of(simulation.resume(Path(directory), checked_observers(observers)))


def _sections(config: object, overrides: object) -> dict[str, Any]:
    """Returns the sections that the arguments describe.

    Raises:
        ConfigError: An argument has the wrong type, or a file cannot be read.
    """
    if not isinstance(overrides, Mapping):
        example = 'should be a mapping such as {"privacy.epsilon": 2}'
        raise ConfigError(
            [Problem("overrides", f"value of type {type(overrides).__name__}: {example}")]
        )
    match config:
        case Config():
            own = config.model_dump(exclude_unset=True)  # a recipe may set what the caller did not
            return with_overrides(own, overrides)
        case str() | Path():
            return with_overrides(read_toml(Path(config)), overrides)
        case Mapping():
            return with_overrides(config, overrides)
        case _:
            kinds = "should be the path of a TOML file, its sections as a mapping, or a fedslm.Config"
            raise ConfigError([Problem("config", f"value of type {type(config).__name__}: {kinds}")])


def checked_observers(observers: object) -> tuple[Observer, ...]:
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
