"""What does a private step cost, relative to a plain one?

For each base, the same step on the same records is taken in turn by each kind of step, in one process
and one thread: plain at micro-batches of 8, 16 and all records; private with public shapes, with
isolated passes, and with Opacus' hooks and a pass for each record, as fedslm did until 2026-11. The
figures are CPU seconds, medians over the rounds, and their ratios to the best plain step. LoRA of rank
8 on every linear layer, of which FFA trains B; the head is trained.

With ``--layers`` of the last blocks only, each kind but the oldest is also taken with the layers below
in the cache; the time to fill it is printed for each record.

Example:
    FEDSLM_ASSETS=../shared/assets python benchmarks/step.py --bases all-MiniLM-L6-v2 stories260K
    python benchmarks/step.py --bases all-MiniLM-L6-v2 --layers 5.attention.self.query 5.output.dense
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import scenario
import torch

from fedslm import tasks
from fedslm.aggregation.methods import trained_keys
from fedslm.config import DataConfig, LoraConfig, ModelConfig, TaskConfig
from fedslm.models.initial import initial_state
from fedslm.models.loaded import LoadedModel, load
from fedslm.privacy.plan import ExamplePlan, NoPrivacy
from fedslm.records import AdapterState
from fedslm.tasks.base import Example, Task
from fedslm.training import per_record
from fedslm.training.local import enter_training
from fedslm.training.shapes import Shapes
from fedslm.training.steps import stepping
from fedslm.verification.bit_proof import proved_shapes

ASSETS = Path(os.environ.get("FEDSLM_ASSETS", "../shared/assets"))
BEFORE = "Opacus' hooks, a pass for each record"
CACHED = ", cached layers"


@dataclass(frozen=True)
class Job:
    """A base, its data and the size of a step."""

    data: str
    task: TaskConfig
    records: int
    label: str | None = None
    text: str = "text"


_SPAM = TaskConfig(name="classification", pooling="mean", max_length=64)
JOBS = {
    "all-MiniLM-L6-v2": Job("sms_spam", _SPAM, 32, "label"),
    "stories260K": Job("shakespeare_speakers", TaskConfig(name="causal-lm", max_length=64), 32),
    "minilm-l3-pruned": Job("sms_spam", _SPAM, 32, "label"),
    "smollm2-135m": Job(
        "medquad", TaskConfig(name="instruction", max_length=128), 8, "output", "instruction"
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--bases", nargs="+", default=list(JOBS)[:3], help="names below FEDSLM_ASSETS/models, or paths"
    )
    parser.add_argument("--rounds", type=int, default=7, help="times that each step is taken (7)")
    parser.add_argument(
        "--layers", nargs="+", default=["all-linear"], help="lora.target_modules (all-linear)"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = {}
    for base in arguments.bases:
        name = Path(base).name
        path = ASSETS / "models" / base
        seconds, proof = measured(path if path.exists() else Path(base), JOBS[name], arguments)
        results[name] = {**{kind: statistics.median(each) for kind, each in seconds.items()}}
        best = min(
            value
            for kind, value in results[name].items()
            if kind.startswith("plain") and not kind.endswith(CACHED)
        )
        print(
            f"\n{name}: {JOBS[name].records} records of {JOBS[name].data}; bit-proof {proof:.0f} CPU s"
        )
        scenario.print_table(
            ["step", "CPU ms", "of the best plain step"],
            [
                [kind, scenario.spread([1000 * each for each in seconds[kind]]), f"{value / best:.2f}"]
                for kind, value in results[name].items()
            ],
        )
        results[name]["bit-proof"] = proof
    busy = round(scenario.busy_cores(), 2)
    found = {"benchmark": "step", "busy_cores": busy, "ratios": ratios_of(results), "seconds": results}
    print(json.dumps(found))


def ratios_of(results: dict[str, dict[str, float]]) -> dict[str, float]:
    """Each kind over the best plain step of all layers, and the step before over each kind."""
    found = {}
    for name, seconds in results.items():
        kinds = {kind: value for kind, value in seconds.items() if kind != "bit-proof"}
        best = min(kinds[kind] for kind in kinds if kind.startswith("plain") and "cached" not in kind)
        for kind, value in kinds.items():
            found[f"{name} {kind}"] = round(value / best, 3)
            found[f"{name} before / {kind}"] = round(kinds[BEFORE] / value, 3)
    return found


def measured(
    path: Path, job: Job, arguments: argparse.Namespace
) -> tuple[dict[str, list[float]], float]:
    """CPU seconds of each kind of step, taken in turn; and those of the bit-proof."""
    model, task, records = prepared(path, job, arguments)
    trained = frozenset(trained_keys("ffa", model.adapter.parameters))
    began = time.process_time()
    shapes = proved_shapes(model, task, trained, job.task.max_length, 32)
    proof = time.process_time() - began
    model.adapter.write(random_adapter(model))
    model.adapter.train_only(set(trained))
    enter_training(model)
    generator = np.random.default_rng(0)
    batches = [
        [[records[number]] for number in generator.choice(len(records), job.records, replace=False)]
        for _ in range(arguments.rounds + 1)
    ]
    fill_cache(model, task, batches)
    seconds: dict[str, list[float]] = {}
    for number, units in enumerate(batches):
        for kind, (options, size) in kinds(model, job.records, shapes).items():
            with ExitStack() as stack:
                if not kind.endswith(CACHED):
                    stack.enter_context(patch.dict(model.__dict__, cached_layers=None))
                if kind == BEFORE:
                    stack.enter_context(patch.object(per_record, "_owners", lambda *_: None))
                step = stack.enter_context(stepping_of(model, task, options, size))
                began = time.process_time()
                step(units)
                if number:  # the first one is no measure
                    seconds.setdefault(kind, []).append(time.process_time() - began)
    return seconds, proof


def fill_cache(model: LoadedModel, task: Task, batches: Sequence[Sequence[Sequence[Example]]]) -> None:
    """Computes the cached layers of all records, and prints how long a record takes."""
    if (layers := model.cached_layers) is None:
        return
    records = [record for units in batches for unit in units for record in unit]
    model.forget_records()
    began = time.process_time()
    for record in records:
        tokens = torch.tensor([record.input_ids])
        with layers.serving({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}):
            pass
    took = time.process_time() - began
    prefix = layers.prefix
    print(
        f"{len(prefix.below)} of {prefix.blocks} layers are cached: {len(layers)} records at "
        f"{1000 * took / len(layers):.1f} CPU ms and {layers.kept_bytes / len(layers) / 1024:.0f} KiB"
    )


def kinds(model: LoadedModel, records: int, shapes: Shapes) -> dict[str, tuple[dict[str, Any], int]]:
    """Each kind of step: its plan's options, and the micro-batch."""
    plain = {f"plain, micro-batches of {size}": ({}, size) for size in {8, min(16, records), records}}
    found: dict[str, tuple[dict[str, Any], int]] = {
        **plain,
        "private, public shapes": ({"passes": "fixed", "shapes": shapes}, 32),
        "private, isolated": ({"passes": "isolated"}, 32),
    }
    if model.cached_layers is not None:
        found |= {f"{kind}{CACHED}": value for kind, value in found.items()}
    return {**found, BEFORE: ({"passes": "isolated"}, 32)}


def stepping_of(model: LoadedModel, task: Task, options: dict[str, Any], size: int) -> Any:
    """The step of one kind, at a learning rate that moves nothing."""
    parameters = [p for p in model.adapter.parameters.values() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-9, fused=True)
    if not options:
        return stepping(model, task, NoPrivacy(32, 1), optimizer, size)
    # A repeated pass comes once in a round: with 20 steps, its share of a step is a twentieth.
    plan = ExamplePlan(8.0, 1e-5, 1.0, 1.0, 0.1, 32, 20, passes=options["passes"])
    return stepping(model, task, plan, optimizer, size, shapes=options.get("shapes"))


def prepared(
    path: Path, job: Job, arguments: argparse.Namespace
) -> tuple[LoadedModel, Task, Sequence[Example]]:
    """A loaded base with its adapter, the task, and examples of real records."""
    with gzip.open(ASSETS / "data" / job.data / "train.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(2000), strict=False)]
    labels = tuple(sorted({row["label"] for row in rows})) if job.label == "label" else ()
    data = DataConfig(source="none", text_column=job.text, label_column=job.label or "label")
    model = load(
        ModelConfig(base=str(path), device="cpu", dtype=arguments.dtype),
        LoraConfig(rank=8, alpha=8.0, target_modules=tuple(arguments.layers)),
        job.task,
        len(labels),
    )
    task = tasks.build(job.task, data, labels)
    return model, task, task.prepare(rows, model.tokenizer).examples


def random_adapter(model: LoadedModel) -> AdapterState:
    """An adapter in general position."""
    shapes = {key: tuple(each.shape) for key, each in model.adapter.parameters.items()}
    generator = np.random.default_rng(0)
    return AdapterState(
        {
            key: (value + 0.02 * generator.standard_normal(value.shape)).astype(np.float32)
            for key, value in initial_state(shapes, 0).tensors.items()
        }
    )


if __name__ == "__main__":
    main()
