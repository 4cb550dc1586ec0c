"""What does a frozen base cost, whole, in half precision, in 8 bits and in 4?

A random Llama with the widths, depth and vocabulary of SmolLM2-135M (147.8 M parameters, since its
heads do not share keys; a fifth are the tied embedding) is loaded with rank-8 LoRA on the usual layers,
of which FFA trains B, and takes private AdamW steps of 2 records of 8 tokens, each in a pass of its
own. Each variant has its own process.

Memory is the peak of the process's anonymous memory (RssAnon, read every millisecond from outside),
less that of a process that does the same with a base of 0.2 M parameters. Mapped files do not count:
the kernel can drop their pages at any time. So a float32 base that is mapped from a float32 file counts
for nothing itself, and what it shows is the adapter's and the step's share. Linux only.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import scenario
from scenario import SMALL, Size

BASE = Size("135M", width=576, hidden=1536, layers=30)
VOCABULARY_SIZE = 49152
RECORDS, TOKENS, RANK = 2, 8, 8
VARIANTS = (
    ("none", "float32"),
    ("none", "bfloat16"),
    ("int8", "float32"),
    ("int4", "float32"),
    ("int8", "bfloat16"),
    ("int4", "bfloat16"),
)
GOALS = {"int8": 0.5, "int4": 0.35}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each (default: 5)")
    parser.add_argument("--one", nargs=3, metavar=("BASE", "KIND", "DTYPE"), help="one; internal")
    arguments = parser.parse_args()
    if arguments.one:
        base, kind, dtype = arguments.one
        work(Path(base), kind, dtype, arguments.steps)
        return
    with tempfile.TemporaryDirectory() as name:
        small, large = Path(name) / "small", Path(name) / "large"
        scenario.write_model(small, SMALL)
        parameters = scenario.write_model(large, BASE, vocabulary_size=VOCABULARY_SIZE)
        measured = []
        for kind, dtype in VARIANTS:
            nothing, it = (gauge(base, kind, dtype, arguments.steps) for base in (small, large))
            measured.append({"quantization": kind, "dtype": dtype, **less(it, nothing)})
    report(measured, 4 * parameters)


def work(base: Path, kind: str, dtype: str, steps: int) -> None:
    """Loads a base and takes private steps; prints the CPU seconds of each and the loss's health."""
    import torch

    torch.set_num_threads(1)
    from fedslm.aggregation.methods import trained_keys
    from fedslm.config import LoraConfig, ModelConfig, TaskConfig
    from fedslm.models.initial import initial_state
    from fedslm.models.loaded import load
    from fedslm.privacy.plan import ExamplePlan
    from fedslm.tasks.base import Example
    from fedslm.tasks.causal_lm import CausalLM
    from fedslm.training.local import enter_training
    from fedslm.training.steps import stepping

    model = load(
        ModelConfig(base=str(base), device="cpu", quantization=kind, dtype=dtype),  # type: ignore[arg-type]
        LoraConfig(rank=RANK, alpha=float(RANK), target_modules=("usual",)),
        TaskConfig(name="causal-lm", max_length=TOKENS),
        0,
    )
    print("loaded", flush=True)
    shapes = {key: tuple(value.shape) for key, value in model.adapter.parameters.items()}
    model.adapter.write(initial_state(shapes, 0))
    model.adapter.train_only(set(trained_keys("ffa", shapes)))
    enter_training(model)
    optimizer = torch.optim.AdamW([p for p in model.adapter.parameters.values() if p.requires_grad])
    plan = ExamplePlan(8.0, 1e-5, 1.0, 1.0, 0.1, RECORDS, 1)
    units = [
        [Example(tuple(range(3 + row, 3 + row + TOKENS)), targets=tuple(range(TOKENS)))]
        for row in range(RECORDS)
    ]
    seconds = []
    with stepping(model, CausalLM("text", TOKENS), plan, optimizer, RECORDS) as step:
        for _ in range(1 + steps):
            began = time.process_time()
            step(units)
            seconds.append(time.process_time() - began)
    assert model.adapter.read().is_finite()
    print(json.dumps(seconds[1:]))  # the first step is no measure


def gauge(base: Path, kind: str, dtype: str, steps: int) -> dict[str, Any]:
    """Peaks of anonymous memory while loading and in all, and step times, of one process."""
    command = [sys.executable, __file__, "--steps", str(steps), "--one", str(base), kind, dtype]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    peaks = {"loading": 0, "all": 0, "resident": 0}
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(process.stdout or ()))
    reader.start()
    while process.poll() is None:
        try:
            now = scenario.memory_bytes(process.pid, "RssAnon")
            peaks["resident"] = max(peaks["resident"], scenario.memory_bytes(process.pid, "VmHWM"))
        except (OSError, KeyError):  # it has just ended
            continue
        peaks["all"] = max(peaks["all"], now)
        if not lines:
            peaks["loading"] = max(peaks["loading"], now)
        time.sleep(0.001)
    assert process.wait() == 0, command
    reader.join()
    return {**peaks, "seconds": json.loads(lines[-1])}


def less(it: dict[str, Any], nothing: dict[str, Any]) -> dict[str, Any]:
    """What a base takes beyond what everything else takes."""
    peaks = {key: it[key] - nothing[key] for key in ("loading", "all", "resident")}
    return {**peaks, "seconds": it["seconds"]}


def report(measured: list[dict[str, Any]], whole: int) -> None:
    """Prints the table, and everything as one JSON line."""
    first = statistics.median(measured[0]["seconds"])
    rows = []
    for each in measured:
        goal = GOALS.get(each["quantization"])
        each["ratio"] = round(each["all"] / whole, 3)
        each["loading_ratio"] = round(each["loading"] / whole, 3)
        each["resident_ratio"] = round(each["resident"] / whole, 3)
        each["step_ratio"] = round(statistics.median(each["seconds"]) / first, 3)
        each["goal"] = goal
        rows.append(
            [
                f"{each['quantization']}, {each['dtype']}",
                f"{each['loading_ratio']:.3f}",
                f"{each['ratio']:.3f}",
                "–" if goal is None else f"≤ {goal}",
                f"{each['resident_ratio']:.3f}",
                scenario.spread(each["seconds"]),
                f"{each['step_ratio']:.2f}",
            ]
        )
    print(f"float32 weights: {whole / 1e6:.0f} MB")
    header = ["base", "loading", "with steps", "goal", "with mapped files", "CPU s/step", "of float32"]
    scenario.print_table(header, rows)
    print(json.dumps({"whole_bytes": whole, "variants": measured}))


if __name__ == "__main__":
    main()
