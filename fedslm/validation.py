"""Checks across sections: contradictions between sections, each reported under its option."""

from __future__ import annotations

import re
from collections.abc import Iterator

from fedslm.aggregation import compatibility
from fedslm.aggregation.robust import required_clients
from fedslm.config import Config
from fedslm.config.tasks import TASKS, tasks_that
from fedslm.data.columns import placeholders
from fedslm.data.database import PASSWORD, USER, holds_password, is_url
from fedslm.engines.options import engine_problems
from fedslm.errors import ConfigError, Problem, plural
from fedslm.federation.sharing import client_problems, sharing_problems
from fedslm.models import precision
from fedslm.privacy.accounting import MOST_STEPS
from fedslm.storage import expand

_WITH_PROMPT = tasks_that(lambda kind: kind.has_prompt)
_WITH_TURNS = tasks_that(lambda kind: kind.reads_turns)
_TAUGHT = tasks_that(lambda kind: kind.teaches != "nothing")
_NO_PUBLIC = "needs public records: set data.public_split (or data.public_source)"
_POOLED = tasks_that(lambda kind: kind.network == "classifier")


def check(config: Config) -> None:
    """Refuses a config whose sections contradict each other.

    Raises:
        ConfigError: All contradictions, each with its remedy.
    """
    problems = [
        *_privacy(config),
        *sharing_problems(config),
        *precision.problems(config.model, config.distill, shares_passes=config.privacy.shares_passes),
        *_federation(config),
        *engine_problems(config),
        *_aggregation(config),
        *_data(config),
        *_task(config),
        *_distill(config),
    ]
    if problems:
        raise ConfigError(problems)


def _privacy(config: Config) -> Iterator[Problem]:
    """Settings that define a guarantee have no default, and no setting voids the guarantee."""
    privacy = config.privacy
    if privacy.unit == "none":
        return
    remedies = {
        "epsilon": "set the budget of each client over the whole run, such as 8.0",
        "delta": "set about 1/(10·units of the smallest client), such as 1e-5",
        "clip_norm": "set the largest norm of one unit's gradient, such as 1.0",
        "sample_rate": "set batch_size / a public estimate of a client's units, such as 0.05",
    }
    if privacy.unit == "client":
        del remedies["sample_rate"]
    for key, remedy in remedies.items():
        if getattr(privacy, key) is None:
            yield Problem(f"privacy.{key}", f"is required with unit={privacy.unit!r}; {remedy}")
    yield from _unit(config)
    yield from _steps(config)
    if config.lora.dropout > 0:
        yield Problem("lora.dropout", f"value {config.lora.dropout} must be 0 under privacy")


def _steps(config: Config) -> Iterator[Problem]:
    """Privacy can be accounted for up to the last round."""
    privacy, federation = config.privacy, config.federation
    rounds = federation.rounds + privacy.spare_rounds
    releases = config.training.local_steps + (privacy.metric_noise_multiplier is not None)
    cohort = federation.cohort_size
    clients = cohort if privacy.overlapping else 1
    if rounds * releases * clients > MOST_STEPS:
        together = f" of {clients} clients together (privacy.overlapping)" if clients > 1 else ""
        message = (
            f"value {federation.rounds} makes {rounds * releases * clients:,} noisy steps{together}, "
            f"spare rounds included; epsilon can be computed for {MOST_STEPS:,} at most: ask for fewer "
            f"rounds, training.local_steps or federation.clients_per_round"
        )
        yield Problem("federation.rounds", message)


def _unit(config: Config) -> Iterator[Problem]:
    """The settings that the chosen unit requires are set."""
    privacy, micro_batch = config.privacy, config.training.micro_batch_size
    cap = privacy.max_records_per_unit
    if privacy.unit == "client":
        yield from client_problems(privacy)
    if privacy.unit != "user":
        for key in ("unit_column", "max_records_per_unit"):
            if getattr(privacy, key) is not None:
                yield Problem(f"privacy.{key}", 'is only for privacy.unit="user"; leave it out')
        return
    if privacy.unit_column is None:
        message = 'is required with unit="user"; name the column that identifies the user'
        yield Problem("privacy.unit_column", message)
    if cap is None:
        message = 'is required with unit="user"; set a public constant, such as 4'
        yield Problem("privacy.max_records_per_unit", message)
    elif cap > micro_batch:
        message = (
            f"value {cap} exceeds training.micro_batch_size={micro_batch}: a user is clipped whole"
        )
        yield Problem("privacy.max_records_per_unit", message)


def _federation(config: Config) -> Iterator[Problem]:
    """The cohort must not exceed the population."""
    federation = config.federation
    cohort = federation.cohort_size
    if cohort > federation.num_clients:
        message = f"value {cohort} exceeds federation.num_clients={federation.num_clients}"
        yield Problem("federation.clients_per_round", message)
    elif federation.min_clients is not None and federation.min_clients > federation.num_clients:
        message = (
            f"value {federation.min_clients} exceeds federation.num_clients={federation.num_clients}"
        )
        yield Problem("federation.min_clients", message)
    elif federation.min_replies > cohort:
        message = f"value {federation.min_replies} exceeds the cohort of {plural(cohort, 'client')}"
        yield Problem("federation.min_replies", message)


def _aggregation(config: Config) -> Iterator[Problem]:
    """Aggregation settings are compatible, and there are enough clients for each rule."""
    resolved = config.resolved()
    lora, aggregation = config.lora, resolved.aggregation
    chosen = compatibility.choices(
        lora, config.training, config.privacy, aggregation, config.compression
    )
    for conflict in compatibility.conflicts(chosen):
        yield Problem(compatibility.KEYS[conflict.axis], compatibility.refusal(conflict, chosen))
    if aggregation.method == "head" and TASKS[config.task.name].classes == "none":
        message = f'value "head" needs a task with classes, not task.name={config.task.name!r}'
        yield Problem("aggregation.method", message)
    for rank in lora.client_ranks:
        if rank > lora.rank:
            message = f"value {rank} exceeds lora.rank={lora.rank}, which the server holds"
            yield Problem("lora.client_ranks", message)
    if aggregation.rule == "mean" and aggregation.num_byzantine > 0:
        message = f"value {aggregation.num_byzantine} needs a robust rule, such as median; not the mean"
        yield Problem("aggregation.num_byzantine", message)
    if lora.initial == "eva" and not config.data.has_public_records:
        yield Problem("lora.initial", f'value "eva" {_NO_PUBLIC}')
    cohort = config.federation.cohort_size
    needed = required_clients(aggregation.rule, aggregation.num_byzantine)
    if cohort < needed:
        message = (
            f"value {aggregation.num_byzantine} needs {needed} clients in a round with "
            f"aggregation.rule={aggregation.rule!r}; there are {cohort}"
        )
        yield Problem("aggregation.num_byzantine", message)
    yield from _personalization(config)
    yield from _attack(config)


def _attack(config: Config) -> Iterator[Problem]:
    """Hostile clients are among the existing ones, and poisoned records have a class."""
    attack, population = config.attack, config.federation.num_clients
    if attack.clients > population:
        message = f"value {attack.clients} exceeds federation.num_clients={population}"
        yield Problem("attack.clients", message)
    if (attack.kind == "none") != (attack.clients == 0):
        message = (
            f'value {attack.clients} contradicts attack.kind="{attack.kind}"; set both, or neither'
        )
        yield Problem("attack.clients", message)
    if attack.kind in ("sign-flip", "scale", "nan") and config.privacy.unit != "none":
        message = (
            f'value "{attack.kind}" changes updates that a private client has signed for; without '
            f"privacy it shows the same"
        )
        yield Problem("attack.kind", message)
    poisons = attack.kind in ("label-flip", "backdoor")
    if poisons and config.task.name != "classification":
        yield Problem("attack.kind", f'value "{attack.kind}" is for task.name="classification"')
    if attack.target is not None and config.task.labels and attack.target not in config.task.labels:
        yield Problem("attack.target", f"value {attack.target!r} is not among task.labels")


def _personalization(config: Config) -> Iterator[Problem]:
    """A personal adapter is evaluated on records that were not used for training."""
    if config.personalization.method == "second-adapter" and config.aggregation.method == "fed-sb":
        message = 'value "second-adapter" has no core to go with fed-sb\'s; use "fine-tune"'
        yield Problem("personalization.method", message)
    if config.personalization.method != "none" and config.data.validation_fraction == 0:
        message = (
            "is required to measure personalization: set the share of each client's units "
            "that is held out, such as 0.2"
        )
        yield Problem("data.validation_fraction", message)


def _data(config: Config) -> Iterator[Problem]:
    """Sources are readable, the partition has its columns, and evaluation data is set."""
    data, task = config.data, config.task
    yield from _database(config)
    skewed = data.partition in ("dirichlet", "shard")
    kind = TASKS[task.name]
    one_label = data.label_column is not None and (kind.classes == "one" or kind.label == "none")
    if skewed and data.partition_column is None and not one_label:
        message = (
            f"is required with data.partition={data.partition!r} and task.name={task.name!r}: name a "
            f"column with one value for each record, or use iid, size or natural"
        )
        yield Problem("data.partition_column", message)
    if data.partition_column is not None and not skewed:
        message = f'is for dirichlet and shard; data.partition is "{data.partition}"'
        yield Problem("data.partition_column", message)
    measured = config.privacy.metric_noise_multiplier is not None or config.privacy.unit == "none"
    if data.validation_fraction > 0 and not measured and config.personalization.method == "none":
        message = (
            f"value {data.validation_fraction} holds out records on which nothing is measured: set "
            f"privacy.metric_noise_multiplier, or leave it out"
        )
        yield Problem("data.validation_fraction", message)


def _distill(config: Config) -> Iterator[Problem]:
    """A student has public data to learn from, and mutual learning runs between rounds."""
    distill, method = config.distill, config.resolved().aggregation.method
    if distill.mutual_steps and distill.every is None:
        message = (
            f"value {distill.mutual_steps} needs distill.every: set the rounds between distillations"
        )
        yield Problem("distill.mutual_steps", message)
    if distill.student is None:
        if distill.every is not None:
            yield Problem("distill.every", "needs distill.student: name the larger model")
        return
    if distill.source is None:
        message = "is missing; name the public records for both models"
        yield Problem("distill.source", message)
    if config.task.name not in _TAUGHT:
        message = f"needs task.name to be one of {', '.join(_TAUGHT)}; it is {config.task.name!r}"
        yield Problem("distill.student", message)
    if distill.every is not None and method in ("stack", "fedex", "flora", "fed-sb", "fedsa"):
        message = (
            f"value {distill.every} is not supported with aggregation.method={method!r}; leave it out"
        )
        yield Problem("distill.every", message)


def _database(config: Config) -> Iterator[Problem]:
    """A database has queries and no password; other sources have no query."""
    data = config.data
    private, public = expand(data.source), expand(data.evaluation_source or data.source)
    for key, source in (("source", private), ("evaluation_source", public)):
        if holds_password(source) and (key == "source" or public != private):  # the value is not shown
            message = f"holds a password; leave it out and set {USER} and {PASSWORD} in the environment"
            yield Problem(f"data.{key}", message)
    for key, source, query in (
        ("train_query", private, data.train_query),
        ("evaluation_query", public, data.evaluation_query),
    ):
        if is_url(source) and query is None:
            message = "is required with a database: SQL that gives the rows, such as SELECT … FROM …"
            yield Problem(f"data.{key}", message)
        if query is not None and not is_url(source):
            yield Problem(f"data.{key}", "is only for a database's URL; leave it out")


def _task(config: Config) -> Iterator[Problem]:
    """The data provides what the task needs; settings of other tasks are not set."""
    task, data, name = config.task, config.data, f"task.name={config.task.name!r}"
    kind = TASKS[task.name]
    whole = kind.label == "turns" and task.prompt is None  # conversations contain their answers
    if kind.label != "none" and not whole and data.label_column is None:
        yield Problem("data.label_column", f"is required with {name}")
    names_none = task.format == "auto" and data.text_column == "text" and data.label_column == "label"
    if kind.has_rejected and data.rejected_column is None and not names_none:
        yield Problem("data.rejected_column", f"is required with {name}: the worse answer's column")
    if not kind.has_rejected and data.rejected_column is not None:
        yield Problem("data.rejected_column", f'is for task.name="preference", not {name}')
    if task.pooling != "native" and task.name not in _POOLED:
        yield Problem("task.pooling", f'value "{task.pooling}" is for classification, not {name}')
    if task.head != "random" and (task.pooling != "normalized" or task.name != "classification"):
        message = f'value "{task.head}" needs task.name="classification" and task.pooling="normalized"'
        yield Problem("task.head", message)
    if task.head == "public" and not data.has_public_records:
        yield Problem("task.head", f'value "public" {_NO_PUBLIC}')
    yield from _labels(config)
    yield from _prompt(config)


def _labels(config: Config) -> Iterator[Problem]:
    """There are at least two class names, each once and in one place, and tags are well-formed."""
    task, labels = config.task, config.task.labels
    if (labels or task.labels_file) and TASKS[task.name].classes == "none":
        key = "labels" if labels else "labels_file"
        yield Problem(f"task.{key}", f"is for tasks with classes, not task.name={task.name!r}")
    if labels and task.labels_file:
        yield Problem(
            "task.labels_file",
            "is set in addition to task.labels; name the classes in only one of them",
        )
    if len(labels) == 1:
        yield Problem("task.labels", f"value {list(labels)} must name at least two classes")
    if len(set(labels)) != len(labels):
        yield Problem("task.labels", f"value {list(labels)} names a class twice")
    if TASKS[task.name].classes == "each word" and labels and (wrong := malformed_tags(labels)):
        yield Problem("task.labels", f"value {wrong}: tags are O, B-kind and I-kind")


def malformed_tags(labels: tuple[str, ...]) -> list[str]:
    """Returns labels that are not valid tags; ``["O"]`` if only the tag for "no entity" is missing.

    >>> malformed_tags(("O", "B-Drug", "I-Drug")), malformed_tags(("O", "Drug"))
    ([], ['Drug'])
    """
    wrong = [label for label in labels if label != "O" and not re.fullmatch(r"[BIESLU]-\S+", label)]
    return wrong or ([] if "O" in labels else ["O"])


def _prompt(config: Config) -> Iterator[Problem]:
    """A prompt is set only for tasks that use one, names columns, and leaves room for an answer."""
    task = config.task
    if task.name not in _WITH_PROMPT:
        if task.prompt is not None:
            yield Problem("task.prompt", f"is for {', '.join(_WITH_PROMPT)}; leave it out")
        if task.max_target_length is not None:
            yield Problem("task.max_target_length", f"is for {', '.join(_WITH_PROMPT)}; leave it out")
    elif task.prompt is not None:
        try:
            placeholders(task.prompt)
        except ConfigError as error:
            yield from error.problems
    if task.prompt_format == "chat" and task.name not in _WITH_TURNS:
        yield Problem("task.prompt_format", f'value "chat" is for {" and ".join(_WITH_TURNS)}')
    most = task.max_target_length
    if task.name in _WITH_TURNS and most is not None and most >= task.max_length:
        message = f"value {most} leaves no room for a prompt in task.max_length={task.max_length}"
        yield Problem("task.max_target_length", message)


def warnings(config: Config) -> list[str]:
    """Returns warnings about settings that are allowed but look like mistakes."""
    return [*_weak_promises(config), *_without_effect(config)]


def _weak_promises(config: Config) -> Iterator[str]:
    """Privacy parameters that give a weak guarantee."""
    privacy, training = config.privacy, config.training
    if privacy.unit == "none" or privacy.sample_rate is None or privacy.delta is None:
        return
    records = training.batch_size / privacy.sample_rate
    if privacy.delta >= 1 / records:
        yield (
            f"privacy.delta={privacy.delta:g} is not below 1/units (about 1/{records:.0f} by "
            f"batch_size / sample_rate): a mechanism that publishes a unit outright would pass; "
            f"use {0.1 / records:.0e} or less"
        )
    if privacy.epsilon is not None and privacy.epsilon > 20:
        yield f"privacy.epsilon={privacy.epsilon:g} is a weak guarantee; 8 or less is common"


def _without_effect(config: Config) -> Iterator[str]:
    """Aggregation settings that have no effect, or less than they seem to."""
    aggregation, method = config.aggregation, config.resolved().aggregation.method
    if aggregation.rule != "mean" and aggregation.num_byzantine == 0 and aggregation.rule != "median":
        yield (
            f"aggregation.rule={aggregation.rule!r} tolerates no hostile client with "
            f"aggregation.num_byzantine=0; set it to the number to tolerate"
        )
    if aggregation.rule != "mean" and config.attack.clients > aggregation.num_byzantine:
        yield (
            f"attack.clients={config.attack.clients} is more than aggregation.num_byzantine="
            f"{aggregation.num_byzantine}: the rule guarantees nothing beyond that number"
        )
    if len(config.lora.client_ranks) > config.federation.num_clients:
        yield (
            f"lora.client_ranks names {len(config.lora.client_ranks)} ranks for "
            f"federation.num_clients={config.federation.num_clients}; the last ones are not used"
        )
    defaults = {"training.proximal_strength": config.training.drift != "fedprox"}
    defaults["aggregation.rotation_strength"] = method != "fedrot"
    for key, is_idle in defaults.items():
        section, name = key.split(".")
        part = getattr(config, section)
        if is_idle and getattr(part, name) != type(part).model_fields[name].default:
            yield f"{key}={getattr(part, name):g} has no effect here"
