"""What no single section can see: contradictions between sections, each named by its option."""

from __future__ import annotations

from collections.abc import Iterator

from fedslm.config import Config
from fedslm.errors import ConfigError, Problem


def check(config: Config) -> None:
    """Refuses a config whose sections contradict one another.

    Raises:
        ConfigError: Every contradiction, with its remedy.
    """
    problems = [*_privacy(config), *_federation(config), *_task(config)]
    if problems:
        raise ConfigError(problems)


def _privacy(config: Config) -> Iterator[Problem]:
    """No default for what makes a guarantee; nothing that voids it."""
    privacy = config.privacy
    if privacy.unit == "none":
        return
    remedies = {
        "epsilon": "set the budget of each client over the whole run, such as 8.0",
        "delta": "set about 1/(10·units of the smallest client), such as 1e-5",
        "clip_norm": "set the largest norm of one unit's gradient, such as 1.0",
        "sample_rate": "set batch_size / a public estimate of a client's units, such as 0.05",
    }
    for key, remedy in remedies.items():
        if getattr(privacy, key) is None:
            yield Problem(f"privacy.{key}", f"is required with unit={privacy.unit!r}; {remedy}")
    yield from _unit(config)
    if config.aggregation.weights == "records":
        message = 'value "records" reveals how many records a client has; use "uniform"'
        yield Problem("aggregation.weights", message)
    if config.lora.dropout > 0:
        yield Problem("lora.dropout", f"value {config.lora.dropout} must be 0 under privacy")


def _unit(config: Config) -> Iterator[Problem]:
    """What a unit needs to be one."""
    privacy, micro_batch = config.privacy, config.training.micro_batch_size
    cap = privacy.max_records_per_unit
    if privacy.unit == "client":
        message = 'value "client" needs secure aggregation, which is not there yet; use "patient"'
        yield Problem("privacy.unit", message)
    if privacy.unit != "patient":
        for key in ("unit_column", "max_records_per_unit"):
            if getattr(privacy, key) is not None:
                yield Problem(f"privacy.{key}", 'is for privacy.unit="patient" alone; leave it out')
        return
    if privacy.unit_column is None:
        message = 'is required with unit="patient"; name the column that says whose a record is'
        yield Problem("privacy.unit_column", message)
    if cap is None:
        message = 'is required with unit="patient"; set a public constant, such as 4'
        yield Problem("privacy.max_records_per_unit", message)
    elif cap > micro_batch:
        message = (
            f"value {cap} exceeds training.micro_batch_size={micro_batch}: a patient is clipped whole"
        )
        yield Problem("privacy.max_records_per_unit", message)


def _federation(config: Config) -> Iterator[Problem]:
    """The cohort must fit into the population."""
    federation = config.federation
    cohort = federation.clients_per_round or federation.num_clients
    if cohort > federation.num_clients:
        message = f"value {cohort} exceeds federation.num_clients={federation.num_clients}"
        yield Problem("federation.clients_per_round", message)
    elif federation.min_replies > cohort:
        message = f"value {federation.min_replies} exceeds the cohort of {cohort} clients"
        yield Problem("federation.min_replies", message)


def _task(config: Config) -> Iterator[Problem]:
    """What the task needs from the data."""
    if config.task.name == "classification" and config.data.label_column is None:
        yield Problem("data.label_column", 'is required with task.name="classification"')
    if config.data.partition == "dirichlet" and config.data.label_column is None:
        yield Problem("data.label_column", 'is required with data.partition="dirichlet"')
    if len(config.task.labels) == 1:
        message = f"value {list(config.task.labels)}: give at least two classes"
        yield Problem("task.labels", message)
    if len(set(config.task.labels)) != len(config.task.labels):
        yield Problem("task.labels", f"value {list(config.task.labels)} names a class twice")
    if config.task.name == "causal-lm" and config.task.pooling == "mean":
        message = 'value "mean" is for classification; a language model has no pooling'
        yield Problem("task.pooling", message)


def warnings(config: Config) -> list[str]:
    """What is allowed but looks like a mistake."""
    found: list[str] = []
    privacy, training = config.privacy, config.training
    if privacy.unit == "none" or privacy.sample_rate is None or privacy.delta is None:
        return found
    records = training.batch_size / privacy.sample_rate
    if privacy.delta >= 1 / records:
        found.append(
            f"privacy.delta={privacy.delta:g} is not below 1/units (about 1/{records:.0f} by "
            f"batch_size / sample_rate): a mechanism that publishes a unit outright would pass; "
            f"use {0.1 / records:.0e} or less"
        )
    if privacy.epsilon is not None and privacy.epsilon > 20:
        found.append(f"privacy.epsilon={privacy.epsilon:g} promises little; 8 or less is common")
    return found
