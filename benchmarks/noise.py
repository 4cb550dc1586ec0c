"""What does secure noise cost?

One private step on a Llama of about 5 M parameters (rank-8 LoRA on all linear layers, of which FFA
trains B alone; 32 records of 64 tokens; one thread), the noise of that step alone, the same noise from
``torch.randn``, and one Poisson sample of 10,000 records. All take turns; times are CPU seconds of this
process, so that others on the machine count little.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import scenario
from scenario import MEDIUM

if TYPE_CHECKING:
    from fedslm.models.loaded import LoadedModel
    from fedslm.privacy.plan import ExamplePlan

BATCH_SIZE, RECORDS, RANK = 32, 10_000, 8
GOAL = 0.03  # of the step


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=15, help="turns of each (default: 15)")
    repeats = parser.parse_args().repeats
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory, sides(Path(directory)) as (works, values):
        for work in works.values():
            work()  # the first time is no measure
        seconds: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(repeats):
            for name, work in works.items():
                began = time.process_time()
                work()
                seconds[name].append(time.process_time() - began)
    report(seconds, values)


@contextmanager
def sides(directory: Path) -> Iterator[tuple[dict[str, Callable[[], object]], int]]:
    """Everything that is timed, and the number of values that get noise."""
    import numpy as np
    import torch

    from fedslm.privacy.gaussian import GaussianNoise
    from fedslm.privacy.plan import ExamplePlan
    from fedslm.tasks.base import Example
    from fedslm.tasks.causal_lm import CausalLM
    from fedslm.training.steps import stepping

    plan = ExamplePlan(8.0, 1e-5, 1.0, 1.0, BATCH_SIZE / RECORDS, BATCH_SIZE, 1)
    generator = np.random.default_rng(0)
    tokens = generator.integers(3, scenario.VOCABULARY_SIZE, (BATCH_SIZE, scenario.MAX_TOKENS))
    units = [[Example(tuple(row))] for row in tokens.tolist()]
    model = load(directory / "model")
    trained = [p for p in model.adapter.parameters.values() if p.requires_grad]
    shapes = [tuple(parameter.shape) for parameter in trained]
    stddev = plan.noise_multiplier * plan.clip_norm
    noise, owners = GaussianNoise(), [""] * RECORDS
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    task = CausalLM("text", scenario.MAX_TOKENS)
    with stepping(model, task, plan, optimizer, BATCH_SIZE) as step:
        works: dict[str, Callable[[], object]] = {
            "a private step": lambda: step(units),
            "its noise": lambda: [noise.draw(shape, stddev) for shape in shapes],
            "torch.randn": lambda: [torch.randn(shape) * stddev for shape in shapes],
            "a Poisson sample": lambda: sample(plan, owners),
        }
        yield works, sum(parameter.numel() for parameter in trained)


def load(directory: Path) -> LoadedModel:
    """The model with a new adapter, ready to train what FFA trains."""
    from fedslm.aggregation.methods import trained_keys
    from fedslm.config import LoraConfig, ModelConfig, TaskConfig
    from fedslm.models.initial import initial_state
    from fedslm.models.loaded import load as load_model
    from fedslm.training.local import enter_training

    scenario.write_model(directory, MEDIUM)
    model = load_model(
        ModelConfig(base=str(directory), device="cpu"),
        LoraConfig(rank=RANK, alpha=float(RANK)),
        TaskConfig(name="causal-lm", max_length=scenario.MAX_TOKENS),
        0,
    )
    shapes = {key: tuple(value.shape) for key, value in model.adapter.parameters.items()}
    model.adapter.write(initial_state(shapes, 0))
    model.adapter.train_only(set(trained_keys("ffa", shapes)))
    enter_training(model)
    return model


def sample(plan: ExamplePlan, owners: Sequence[str]) -> int:
    """One Poisson sample, as a round draws it; its size."""
    import numpy as np

    return sum(map(len, plan.batches(owners, np.random.default_rng(0))))


def report(seconds: dict[str, list[float]], values: int) -> None:
    """Prints the table, and everything as one JSON line."""
    step = seconds["a private step"]
    rows, results = [], []
    for name, times in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(times, step, strict=True))
        goal = GOAL if name == "its noise" else None
        milliseconds = [1e3 * each for each in times]
        rows.append(
            [
                name,
                scenario.spread(milliseconds),
                f"{ratio:.4f}",
                "–" if goal is None else f"≤ {goal}",
            ]
        )
        results.append(
            {
                "name": name,
                "milliseconds": round(statistics.median(milliseconds), 3),
                "ratio": round(ratio, 4),
                "goal": goal,
            }
        )
    print(f"{values:,} values get noise")
    scenario.print_table(["", "CPU milliseconds", "of a step", "goal"], rows)
    print(json.dumps({"benchmark": "noise", "model": MEDIUM.name, "values": values, "works": results}))


if __name__ == "__main__":
    main()
