"""Run by test_shard.py: peak memory of sharing data out and of a client's round, streamed and not.

python peaks.py DIRECTORY SMALL LARGE WORDS prints one JSON line.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import datasets  # noqa: F401  (what is imported later would count as growth)
import numpy as np
import torch

from fedslm.client.node import Node
from fedslm.client.records import records_of
from fedslm.config import (
    AggregationConfig,
    CompressionConfig,
    DataConfig,
    LoraConfig,
    ModelConfig,
    PersonalizationConfig,
    PrivacyConfig,
    TaskConfig,
    TrainingConfig,
)
from fedslm.data import store
from fedslm.privacy.plan import ExamplePlan
from fedslm.protocol.setup import Setup
from fedslm.tasks.lazy import owners_of

MODEL = ModelConfig(base="demo", device="cpu")
LORA = LoraConfig(rank=1, target_modules=("3.output.dense",))
TASK = TaskConfig(name="classification", pooling="mean", max_length=16)


def anonymous() -> float:
    """Memory of this process that no file backs, in MB."""
    with Path("/proc/self/status").open() as file:
        line = next(line for line in file if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024


def growth_of(work: Callable[[], object]) -> float:
    """By how much memory grows at most while something runs, in MB."""
    before = peak = anonymous()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return peak - before


def one_round(directory: Path, rows: int, words: int, *, streaming: bool) -> None:
    """Shares one client's data out, and gives the examples of two private steps."""
    with (directory / "train.jsonl").open("w") as file:
        for number in range(rows):
            text = f"note {number} " + "chest pain at night " * (words // 4)
            file.write(json.dumps({"text": text, "label": "ab"[number % 2]}) + "\n")
    (directory / "test.jsonl").write_text('{"text": "x", "label": "a"}\n{"text": "y", "label": "b"}\n')
    data = DataConfig(source=str(directory), streaming=streaming)
    run = directory / f"run-{rows}-{streaming}"
    privacy = PrivacyConfig(unit="none")
    written = store.write(run / "data", data, TASK, privacy=privacy, num_clients=1, seed=0)
    plan = ExamplePlan(8.0, 1e-5, 1.0, 1.0, 0.001, 16, 2)
    sections = (MODEL, LORA, data, TASK, TrainingConfig())
    together = (AggregationConfig(method="ffa"), CompressionConfig(), PersonalizationConfig())
    setup = Setup("run", 0, str(run), "", *sections, *together, written.labels, plan)
    trained = records_of(setup, Node(run / "node", run / "data", 0, deployed=False)).trained
    for batch in plan.batches(owners_of(trained), np.random.default_rng(0)):
        assert all(trained[int(record)].input_ids for unit in batch for record in unit)


def main() -> None:
    """Measures, streamed first: what is not streamed leaves the process large."""
    directory, small, large, words = Path(sys.argv[1]), *map(int, sys.argv[2:5])
    torch.set_num_threads(1)
    one_round(directory, 2, words, streaming=True)
    growth = [
        growth_of(
            lambda rows=rows, streaming=streaming: one_round(
                directory, rows, words, streaming=streaming
            )
        )  # type: ignore[misc]
        for rows, streaming in ((small, True), (large, True), (large, False))
    ]
    print(json.dumps(dict(zip(("small", "large", "in_memory"), growth, strict=True))))


if __name__ == "__main__":
    main()
