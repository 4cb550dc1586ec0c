"""Is the local engine faster than a bare PyTorch loop that takes the same steps?

8 clients take 10 LoRA steps of 4 x 64 tokens in each round, without privacy: once on fedslm's local
engine (two workers, one thread each) and once in ``bare_loop.py`` (one process, two threads). Both
see the same tokens in the same order and start from the same adapter, and must end with the same one.
The sides alternate; ratios are taken within a pair and below 1 where fedslm is faster.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import scenario
from scenario import MEDIUM, SMALL, Size

from fedslm import Observer

if TYPE_CHECKING:
    from fedslm.config import Config
    from fedslm.federation.checkpoint import Checkpoint
    from fedslm.records import RoundRecord

SIZES = (SMALL, MEDIUM)
CLIENTS, STEPS, BATCH_SIZE, RECORDS_PER_CLIENT = 8, 10, 4, 64
QUIET = 0.3  # cores that others may keep busy
ROUND_GOAL, START_GOAL = 0.65, 1.3
TOLERANCE = 2e-3  # float32 sums in another order, after hundreds of AdamW steps
BARE_LOOP = Path(__file__).with_name("bare_loop.py")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=4, help="rounds in a run (default: 4)")
    parser.add_argument("--repeats", type=int, default=2, help="pairs of runs (default: 2)")
    parser.add_argument("--model", choices=[size.name for size in SIZES], help="only this model")
    parser.add_argument("--simulate", type=Path, metavar="CONFIG", help="time one run; used internally")
    arguments = parser.parse_args()
    if arguments.simulate:
        time_simulation(arguments.simulate)
        return
    with tempfile.TemporaryDirectory() as directory:
        results = [
            compare(Path(directory) / size.name, size, arguments.rounds, arguments.repeats)
            for size in SIZES
            if arguments.model in (None, size.name)
        ]
    report(results)


class Stopwatch(Observer):
    """An observer that notes when the population was there and when each round was on disk."""

    def __init__(self) -> None:
        self.ready, self.rounds = 0.0, [0.0]

    def on_start(self, config: Config, done: Checkpoint) -> None:
        """Every client has answered its first message."""
        self.ready = time.monotonic()

    def on_round(self, record: RoundRecord) -> None:
        """Notes the time; a client that failed would make the round look fast."""
        assert record.completed == record.cohort, record.reasons
        self.rounds.append(time.monotonic() - self.ready)


def time_simulation(path: Path) -> None:
    """Runs a config as ``fedslm simulate`` does and prints the times."""
    from fedslm.workers import preload

    preload()
    import fedslm

    watch = Stopwatch()
    fedslm.simulate(path, observers=[watch])
    seconds = [end - start for start, end in itertools.pairwise(watch.rounds)]
    print(json.dumps({"seconds": seconds}))


def compare(directory: Path, size: Size, rounds: int, repeats: int) -> dict[str, Any]:
    """Runs both sides on one model, alternating."""
    model, texts = directory / "model", directory / "texts"
    num_parameters = scenario.write_model(model, size)
    scenario.write_texts(texts, num_train=CLIENTS * RECORDS_PER_CLIENT)
    inputs, output = directory / "inputs.safetensors", directory / "bare.safetensors"
    engine, bare, ready, imported, busy = [], [], [], [], []
    for repeat in range(repeats):
        busy.append(scenario.busy_cores())
        run = directory / f"run-{repeat}"
        path = write_config(directory, model, texts, run, rounds=rounds, steps=STEPS)
        engine.append(scenario.measured([__file__, "--simulate", path])[0]["seconds"])
        if not inputs.exists():
            write_inputs(inputs, path, run, rounds)
        command = [BARE_LOOP, model, "--inputs", inputs, "--output", output]
        bare.append(scenario.measured(command)[0]["seconds"])
        check_same(run / "adapter" / "adapter_model.safetensors", output)
    for repeat in range(repeats):
        busy.append(scenario.busy_cores())
        run = directory / f"start-{repeat}"
        path = write_config(directory, model, texts, run, rounds=1, steps=1)
        ready.append(seconds_until_ready(path))
        values, started = scenario.measured([BARE_LOOP, model])
        imported.append(values["ready"] - started)
    return {
        "model": size.name,
        "num_parameters": num_parameters,
        "first_round_seconds": [[run[0] for run in engine], [run[0] for run in bare]],
        "round_seconds": [
            [statistics.median(run[1:]) for run in engine],
            [statistics.median(run[1:]) for run in bare],
        ],
        "start_seconds": [ready, imported],
        "busy_cores": round(max(busy), 2),
    }


def write_config(
    directory: Path, model: Path, texts: Path, run: Path, *, rounds: int, steps: int
) -> Path:
    """Writes the config of one run."""
    values = scenario.config(
        model,
        texts,
        run,
        training={"local_steps": steps, "batch_size": BATCH_SIZE},
        federation={"num_clients": CLIENTS, "rounds": rounds, "evaluate_every": rounds + 1},
    )
    path = directory / f"{run.name}.toml"
    path.write_text(scenario.to_toml(values))
    return path


def seconds_until_ready(path: Path) -> float:
    """Starts ``fedslm simulate`` and waits for the line that says that every client has answered."""
    command = [sys.executable, "-m", "fedslm", "simulate", str(path)]
    started, ready = time.monotonic(), 0.0
    with subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=scenario.quiet(),
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "round 0 of" in line:
                ready = time.monotonic() - started
    assert process.returncode == 0, process.returncode
    assert ready > 0, "fedslm simulate no longer says when it starts"
    return ready


def write_inputs(path: Path, config_path: Path, run: Path, rounds: int) -> None:
    """Writes down what fedslm trained on: tokens (rounds, clients, steps, batch, length), adapter."""
    import numpy as np
    from safetensors.numpy import save_file

    from fedslm.config import from_toml
    from fedslm.data import store
    from fedslm.models.initial import initial_state
    from fedslm.models.loaded import load
    from fedslm.privacy.calibration import calibrated
    from fedslm.rng import stream
    from fedslm.tasks import build

    loaded = from_toml(config_path)
    model, task = load(loaded.model, loaded.lora, loaded.task, 0), build(loaded.task, loaded.data, ())
    plan = calibrated(loaded.privacy, loaded.training, rounds)
    tokens = np.empty((rounds, CLIENTS, STEPS, BATCH_SIZE, scenario.MAX_TOKENS), np.int32)
    for client in range(CLIENTS):
        prepared = task.prepare(store.read_client(run / "data", client), model.tokenizer)
        examples = np.array([example.input_ids for example in prepared.examples], np.int32)
        for index in range(rounds):
            seeded = stream(loaded.run.seed, "batches", index + 1, client)
            batches = list(plan.batches(len(examples), seeded))
            tokens[index, client] = examples[np.array(batches)]
    shapes = {key: tuple(value.shape) for key, value in model.adapter.parameters.items()}
    initial = initial_state(shapes, loaded.run.seed)
    save_file({"tokens": tokens, **initial.tensors}, path)


def check_same(engine: Path, bare: Path) -> None:
    """Both sides took the same steps: they end with the same adapter."""
    import numpy as np
    from safetensors.numpy import load_file

    ours, theirs = load_file(engine), load_file(bare)
    assert ours.keys() == theirs.keys()
    worst = max(float(np.abs(ours[key] - theirs[key]).max()) for key in ours)
    assert worst < TOLERANCE, f"the two sides trained differently: {worst}"


def report(results: list[dict[str, Any]]) -> None:
    """Prints the table, and everything as one JSON line."""
    names = {
        "round_seconds": ("a round", ROUND_GOAL),
        "first_round_seconds": ("the first round", None),
        "start_seconds": ("start-up", START_GOAL),
    }
    rows = []
    for result in results:
        for key, (name, goal) in names.items():
            ours, theirs = result[key]
            ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
            result[key.replace("seconds", "ratio")] = round(statistics.median(ratios), 3)
            shown = [scenario.spread(values) for values in (ours, theirs, ratios)]
            rows.append([f"{result['model']}, {name}", *shown, "–" if goal is None else f"≤ {goal}"])
            result[key] = [[round(value, 4) for value in values] for values in (ours, theirs)]
    busy = max(result["busy_cores"] for result in results)
    if busy > QUIET:
        print(f"the machine was not quiet ({busy:.1f} cores busy): do not trust these ratios")
    scenario.print_table(["", "fedslm, s", "bare loop, s", "ratio", "goal"], rows)
    print(json.dumps({"benchmark": "engine", "goals": [ROUND_GOAL, START_GOAL], "models": results}))


if __name__ == "__main__":
    main()
