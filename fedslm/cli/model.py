"""``fedslm model``: size, memory and traffic of a base model, before any weights are loaded."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from fedslm.adapter_keys import key_of, layers_of
from fedslm.cli.answers import print_facts
from fedslm.cli.console import ConfigPath, Json, Overrides, clear_errors, load_config
from fedslm.config import Config
from fedslm.config.tasks import TASKS
from fedslm.errors import DataError, TrainingError, plural
from fedslm.storage import json_text

if TYPE_CHECKING:
    from pathlib import Path

    from fedslm.models.footprint import Footprint, Memory
    from fedslm.training.probe import Trial

model_app = typer.Typer(help="Inspect a base model.", no_args_is_help=True)

_ASSUMED_CLASSES = 2
_FULL = 0.9  # share of the machine's memory
_LONG = 2048  # tokens
_HUGE = 1_000_000  # trained parameters, if there is no plan to compute their cost


@model_app.callback()
def model() -> None:
    """Inspect a base model."""


@model_app.command("info")
def info(config: ConfigPath, overrides: Overrides = [], as_json: Json = False) -> None:  # noqa: B006
    """Show a base model's size, training memory, traffic and speed, without reading its weights.

    The speed takes some seconds: a network of the same shape is trained in float32 and in bfloat16.

    Example: `fedslm model info simulations/demo.toml --set model.quantization=int8`
    """
    with clear_errors():
        loaded = load_config(config, overrides).resolved()
        found = describe(loaded)
        if as_json:
            typer.echo(json_text(found))
        else:
            print_facts(_lines(found), found["warnings"])


def describe(config: Config) -> dict[str, Any]:
    """Returns the full output of ``fedslm model info`` as JSON values.

    Raises:
        ModelError: The base model cannot be found or does not support the config.
    """
    from fedslm.aggregation.methods import method_of, trained_keys
    from fedslm.models import footprint as sizing
    from fedslm.models.base import check_early, resolve_config

    private = config.privacy.unit != "none"
    check_early(config.model, config.lora, private=private)
    classes, unknown = _classes(config)
    guess = [f"{classes} classes are a guess: {unknown}"] if unknown else []
    directory = resolve_config(config.model)
    sizes = sizing.footprint(directory, config.model, config.lora, config.task, classes)
    device, machine_bytes = sizing.machine(config.model)
    records = _records(config, device)
    shapes = _with_cores(sizes.shapes)
    trained = trained_keys(method_of(config.aggregation), shapes)
    kept = shapes if method_of(config.aggregation) == "fed-sb" else sizes.shapes
    needs = sizing.memory(sizes, kept, trained, config.training, records=records, private=private)
    values = sizing.parameters(shapes, trained)
    computed, slow = _precision(config, directory, classes, sizes, records)
    return {
        "model_type": sizes.model_type,
        "family": sizes.family,
        "parameters": sizes.parameters,
        "quantization": config.model.quantization,
        **computed,
        "base_bytes": sizes.base_bytes,
        "float32_bytes": sizes.whole_bytes,
        **_adapted(sizes, config),
        "classes": classes,
        "classes_assumed": bool(guess),
        "method": config.aggregation.method,
        "trained_parameters": values,
        **_traffic(config, sizes),
        "records_in_a_pass": records,
        "memory_bytes": {**asdict(needs), "total": needs.total},
        "device": device,
        "device_bytes": machine_bytes,
        "processes": _processes(config),
        "warnings": guess + slow + _warnings(config, sizes, needs, values, machine_bytes),
    }


def trained_parameters(config: Config) -> int:
    """Returns how many values one round trains.

    Raises:
        ModelError: The base model cannot be found or does not support the config.
    """
    from fedslm.aggregation.methods import method_of, trained_keys
    from fedslm.models import footprint as sizing
    from fedslm.models.base import resolve_config

    classes, _ = _classes(config)
    directory = resolve_config(config.model)
    sizes = sizing.footprint(directory, config.model, config.lora, config.task, classes)
    shapes = _with_cores(sizes.shapes)
    return sizing.parameters(shapes, trained_keys(method_of(config.aggregation), shapes))


def _adapted(sizes: Footprint, config: Config) -> dict[str, Any]:
    """Returns which layers are adapted or new, and how many are computed once for each record."""
    from fedslm.aggregation.methods import method_of

    only_head = method_of(config.aggregation) == "head"
    whole = only_head and sizes.cached_layers > 0  # then nothing below the head changes
    # Where a classifier reads only the mean of all tokens, the mean is kept.
    vectors = config.task.max_length if whole and config.task.pooling in ("mean", "normalized") else 1
    return {
        "targets": sizes.targets,
        "heads": list(sizes.heads),
        "layers": sizes.layers,
        "cached_layers": sizes.layers if whole else sizes.cached_layers,
        "cached_bytes_per_record": sizes.cached_bytes // vectors,
    }


def _classes(config: Config) -> tuple[int, str]:
    """Returns the number of classes, and why it is a guess: nothing is downloaded to determine it."""
    from fedslm.data.sources import is_here
    from fedslm.recipes.facts import num_classes

    data, task = config.data, config.task
    if TASKS[task.name].classes == "none":
        return 0, ""
    named = bool(task.labels or task.labels_file)
    if not named and not is_here(data.evaluation_source or data.source):
        return _ASSUMED_CLASSES, "the public split is not on this machine; set task.labels"
    try:
        return num_classes(data, task, config.run.seed), ""
    except DataError as error:
        if named:
            raise
        return _ASSUMED_CLASSES, str(error)


def _records(config: Config, device: str) -> int:
    """Returns the number of records of the maximum length that share a forward pass."""
    from fedslm.tasks.passes import token_budget

    training, privacy = config.training, config.privacy
    shared = min(training.batch_size, training.micro_batch_size)
    if privacy.unit == "none" or privacy.passes != "isolated":
        tokens = token_budget(device, TASKS[config.task.name].rows_per_example)
        return max(1, min(shared, tokens // config.task.max_length))
    return privacy.max_records_per_unit or 1  # each unit has its own pass


def _precision(
    config: Config, directory: Path, classes: int, sizes: Footprint, records: int
) -> tuple[dict[str, Any], list[str]]:
    """Returns the precision here with the measured speed (None if there is none), and warnings."""
    from fedslm.models import precision
    from fedslm.models.base import device_of
    from fedslm.training.probe import measure

    trial = _trial(config, directory, classes, records)
    emulated = precision.warning(config.model, device_of(config.model))
    warnings = [emulated] if emulated else []
    found = {"dtype": sizes.dtype, "dtype_asked": config.model.dtype}
    try:
        speed = measure(trial)
    except TrainingError as error:
        return {**found, "speed": None}, [*warnings, f"the speed is unknown: {error}"]
    warnings = [f"{each}; measured: {speed.gain:.2f} times the speed of float32" for each in warnings]
    return {**found, "speed": speed.as_json(sizes.dtype)}, warnings


def _trial(config: Config, directory: Path, classes: int, records: int) -> Trial:
    """Returns the pass that is timed."""
    from fedslm.tasks import build
    from fedslm.training.probe import Trial

    learning = build(config.task, config.data, tuple(map(str, range(classes))))
    return Trial(directory, config.model, config.lora, config.task, learning, records)


def time_of_a_record(config: Config) -> tuple[float, float]:
    """Times a training pass on this machine, which takes a few seconds.

    Returns:
        Seconds for a record of the maximum length; and the share of them, in [0, 1], for layers that
        are computed once for a record and then kept.

    Raises:
        ModelError: The base model cannot be found or does not support the config.
        TrainingError: It cannot be timed here.
    """
    from fedslm.models import footprint as sizing
    from fedslm.models.base import resolve_config
    from fedslm.training.probe import seconds_per_token

    classes, _ = _classes(config)
    directory = resolve_config(config.model)
    sizes = sizing.footprint(directory, config.model, config.lora, config.task, classes)
    records = _records(config, sizing.machine(config.model)[0])
    each = seconds_per_token(_trial(config, directory, classes, records), sizes.dtype)
    kept = _adapted(sizes, config)["cached_layers"]
    whole = kept == sizes.layers  # only a head is trained, which takes almost no time
    share = 1.0 if whole else kept / (sizes.layers + 1)  # embeddings and head count as one
    return each * config.task.max_length, share


def _with_cores(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Returns the adapter's tensors with the core that Fed-SB would add to each layer."""
    ranks = {layer: shapes[key_of(layer, "lora_A")][0] for layer in layers_of(shapes)}
    return {**shapes, **{key_of(layer, "lora_R"): (r, r) for layer, r in ranks.items()}}


def _traffic(config: Config, sizes: Footprint) -> dict[str, Any]:
    """Returns the traffic of a round, for one client and for the cohort, and the upload by method.

    Residual factors of stack, fedex and flora add to the download, by an amount unknown before the run.
    """
    from fedslm.aggregation.methods import METHODS, method_of, moving_keys, sent_keys
    from fedslm.models.footprint import parameters

    shapes, method = _with_cores(sizes.shapes), method_of(config.aggregation)
    plain = shapes if method == "fed-sb" else sizes.shapes
    cohort = config.federation.cohort_size
    down = 4 * parameters(plain, moving_keys(method, plain))
    width = {"float32": 4, "bfloat16": 2, "int8": 1}[config.compression.upload]
    share = width * config.compression.keep_fraction
    up = round(share * parameters(plain, sent_keys(method, plain)))
    methods = {
        name: 4 * parameters(shapes, sent_keys(name, shapes if name == "fed-sb" else sizes.shapes))
        for name in METHODS
    }
    return {
        "bytes_down_per_client": down,
        "bytes_up_per_client": up,
        "cohort": cohort,
        "bytes_per_round": cohort * (down + up),
        "bytes_by_method": methods,
    }


def _processes(config: Config) -> int:
    """Returns the number of simulation processes that each hold a base model."""
    from fedslm.engines.placement import placed

    return max(1, placed(config).workers)


def _warnings(
    config: Config, sizes: Footprint, needs: Memory, trained: int, held: int | None
) -> list[str]:
    """Returns warnings about settings that are allowed but problematic."""
    found = []
    processes = _processes(config)
    if held is not None and needs.total * processes > _FULL * held:
        found.append(
            f"{plural(processes, 'worker')} would take about {needs.total * processes / 1e9:.1f} GB, "
            f"this machine has {held / 1e9:.1f} GB; use fewer engine.workers, "
            f'model.quantization="int4", gradient_checkpointing, a shorter max_length or a '
            f"smaller micro_batch_size"
        )
    if sizes.family is None:
        found.append(
            f"model_type={sizes.model_type!r} is not verified; it may work without privacy, and is "
            f"refused with privacy"
        )
    if config.task.max_length > _LONG:
        found.append(
            f"task.max_length={config.task.max_length} makes passes expensive; most records are shorter"
        )
    if sizes.heads and config.task.pooling == "native":
        found.append(
            f"{', '.join(sizes.heads)} is newly initialised, so the first rounds learn only the classes"
        )
    if config.privacy.unit != "none":
        from fedslm.recipes import expected

        outlook = expected(config, trained)
        found += [] if outlook is None or outlook.learns else [outlook.text]
        is_measured = outlook is not None and outlook.is_measured
        found += _of_the_plan(config, parameters=0 if is_measured else trained)
    elif trained > _HUGE and config.aggregation.method == "fedit":
        found.append(f"{trained:,} values are sent each way; a lower lora.rank sends fewer")
    return found


def _of_the_plan(config: Config, *, parameters: int) -> list[str]:
    """Returns the budget planner's warnings; of the noise too, given the number of trained values."""
    from fedslm.privacy.calibration import shares_of
    from fedslm.privacy.planning import BudgetQuery, plan_budget

    privacy, federation = config.privacy, config.federation
    known, cohort = privacy.noise_multiplier, federation.cohort_size
    shares = shares_of(privacy, config.training, config.secure_aggregation, cohort)
    asked = BudgetQuery(
        sample_rate=privacy.sample_rate or 1.0,
        delta=privacy.delta or 1.0,
        steps=federation.rounds * config.training.local_steps,
        epsilon=None if known else privacy.epsilon,
        noise_multiplier=known,
        steps_per_round=config.training.local_steps,
        unit=privacy.unit,
        parameters=parameters,
        batch_size=config.training.batch_size,
        clients=federation.cohort_size,
        honest_nodes=None if shares is None else shares.honest_nodes,
    )
    return list(plan_budget(asked).warnings)


def _lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns name and text of each line."""
    from fedslm.progress import readable

    proved = f"{found['family']}, verified" if found["family"] else "not verified"
    stored = found["dtype"]
    if found["quantization"] != "none":
        stored = f"{found['quantization']}, computed in {found['dtype']}"
    needs = found["memory_bytes"]
    parts = ", ".join(
        f"{name} {readable(needs[name])}" for name in needs if name not in ("evaluation", "total")
    )
    has = found["device_bytes"]
    methods = ", ".join(f"{name} {readable(size)}" for name, size in found["bytes_by_method"].items())
    guess = ", a guess" if found["classes_assumed"] else ""
    lines = [
        ("architecture", f"{found['model_type']} ({proved})"),
        ("parameters", f"{found['parameters']:,}"),
        ("frozen base", f"{readable(found['base_bytes'])} ({stored})"),
        ("in float32", readable(found["float32_bytes"])),
        ("precision", f'{found["dtype"]} here (model.dtype="{found["dtype_asked"]}")'),
        ("adapted layers", ", ".join(f"{name} ×{count}" for name, count in found["targets"].items())),
        ("new heads", ", ".join(found["heads"]) or "none"),
        ("classes", f"{found['classes']}{guess}" if found["classes"] else "none"),
        ("trained", f"{found['trained_parameters']:,} values (method {found['method']})"),
        (
            "client per round",
            f"{readable(found['bytes_down_per_client'])} down, "
            f"{readable(found['bytes_up_per_client'])} up ({methods})",
        ),
        ("cohort per round", f"{readable(found['bytes_per_round'])} for {found['cohort']} clients"),
        ("memory to train", f"about {readable(needs['total'])}: {parts}"),
        ("cached layers", _cached(found)),
        ("to evaluate", f"about {readable(needs['evaluation'])} on top of the base"),
        *_measured(found["speed"], found["device"]),
        (
            "in a simulation",
            f"{plural(found['processes'], 'worker')} of this size, each with its libraries",
        ),
        ("this machine", f"{readable(has) if has else 'unknown'} ({found['device']})"),
    ]
    return lines


def _cached(found: dict[str, Any]) -> str:
    """Returns what the cached layers save and take."""
    from fedslm.models.cached_layers import most_bytes_here
    from fedslm.progress import readable

    if not (cached := found["cached_layers"]):
        return "none"
    size = readable(found["cached_bytes_per_record"])
    return (
        f"{cached} of {found['layers']} are computed once for a record; they take up to {size} for a "
        f"record and {readable(most_bytes_here())} in a process"
    )


def _measured(speed: dict[str, Any] | None, device: str) -> list[tuple[str, str]]:
    """Returns the lines about the speed; none if it is unknown."""
    if speed is None:
        return []
    each = ", ".join(f"{name} {1000 * seconds:.0f} ms" for name, seconds in speed["seconds"].items())
    place = "one thread" if device == "cpu" else device
    size = f"{plural(speed['records'], 'record')} of {speed['tokens']} tokens on {place}"
    advice = f"; {speed['advice']}" if speed["advice"] else ""
    return [
        ("training pass", f"{each} ({size})"),
        ("bfloat16", f"{speed['bfloat16_gain']:.2f} times the speed of float32{advice}"),
    ]
