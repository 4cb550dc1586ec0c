"""The sides of ``engine.py``: the same job on fedslm's local engine and as a bare PyTorch loop."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import scenario

from fedslm import Observer

if TYPE_CHECKING:
    from fedslm.config import Config
    from fedslm.federation.checkpoint import Checkpoint
    from fedslm.records import RoundRecord

TOLERANCE = 2e-3  # float32 sums in another order, after hundreds of AdamW steps
ENGINE = "fedslm"
BARE = {"bare loop, 2 threads": 2, "bare loop, 1 thread": 1}
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Job:
    """What both sides do in a round.

    Attributes:
        name: What the tables call it.
        model: The base's directory.
        is_private: DP-SGD on FFA-LoRA, with Poisson samples of ``batch`` expected records.
        clients: All train in each round.
        steps: Of a client.
        batch: Records in a step, of ``scenario.MAX_TOKENS`` tokens.
        records: Of a client.
    """

    name: str
    model: Path
    is_private: bool
    clients: int
    steps: int
    batch: int
    records: int


class Stopwatch(Observer):
    """An observer that notes when the population was there and when each round was on disk."""

    def __init__(self) -> None:
        self.rounds: list[tuple[float, float]] = []

    def on_start(self, config: Config, done: Checkpoint) -> None:
        """Every client has answered its first message."""
        self._note()

    def on_round(self, record: RoundRecord) -> None:
        """Notes the times; a client that failed would make the round look fast."""
        assert record.completed == record.cohort, record.reasons
        self._note()

    def _note(self) -> None:
        """Adds wall time and processor time."""
        self.rounds.append((time.monotonic(), scenario.cpu_seconds()))


def time_simulation(path: Path) -> None:
    """Runs a config as ``fedslm simulate`` does and prints the times of its rounds."""
    from fedslm.config import from_toml
    from fedslm.workers import preload

    preload(private=from_toml(path).privacy.unit != "none")
    import fedslm

    watch = Stopwatch()
    fedslm.simulate(path, observers=[watch])
    pairs = list(itertools.pairwise(watch.rounds))
    seconds = [end[0] - start[0] for start, end in pairs]
    print(json.dumps({"seconds": seconds, "cpu_seconds": [end[1] - start[1] for start, end in pairs]}))


def write_config(job: Job, directory: Path, name: str, *, rounds: int, steps: int) -> Path:
    """Writes the config of one run, and the texts if they are not there."""
    texts = directory / "texts"
    if not texts.exists():
        scenario.write_texts(texts, num_train=job.clients * job.records)
    private = {
        "unit": "record",
        "epsilon": 8.0,
        "delta": 1e-5,
        "clip_norm": 1.0,
        "sample_rate": job.batch / job.records,
    }
    values = scenario.config(
        job.model,
        texts,
        directory / name,
        model={"dtype": "float32"},
        training={"local_steps": steps, "batch_size": job.batch},
        privacy=private if job.is_private else {},
        aggregation={"method": "ffa"} if job.is_private else {},
        federation={"num_clients": job.clients, "rounds": rounds, "evaluate_every": rounds + 1},
    )
    path = directory / f"{name}.toml"
    path.write_text(scenario.to_toml(values))
    return path


def bare_command(job: Job, directory: Path, threads: int, rounds: int) -> list[str | Path]:
    """The bare loop of a job; without rounds it only loads."""
    command: list[str | Path] = [
        _HERE / ("bare_opacus.py" if job.is_private else "bare_loop.py"),
        job.model,
        *("--threads", str(threads)),
    ]
    if rounds:
        command += ["--inputs", directory / "inputs.safetensors"]
        command += ["--output", directory / "bare.safetensors"]
    if rounds and job.is_private:
        counts = ("--rounds", rounds), ("--steps", job.steps), ("--batch", job.batch)
        command += [str(each) for pair in counts for each in pair]
    return command


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


def write_inputs(job: Job, directory: Path, config: Path, rounds: int) -> None:
    """Writes what fedslm trained on in a run, and the first adapter, to ``inputs.safetensors``.

    Tokens have shape (rounds, clients, steps, batch, length); under privacy, where the batches are
    secret, (clients, records, length).
    """
    import numpy as np
    from safetensors.numpy import save_file

    from fedslm.config import from_toml
    from fedslm.data import store
    from fedslm.models.initial import initial_state
    from fedslm.models.loaded import load
    from fedslm.privacy.calibration import calibrated
    from fedslm.rng import stream
    from fedslm.tasks import build

    loaded = from_toml(config)
    model, task = load(loaded.model, loaded.lora, loaded.task, 0), build(loaded.task, loaded.data, ())
    prepared = (
        task.prepare(store.read_client(config.with_suffix("") / "data", client), model.tokenizer)
        for client in range(job.clients)
    )
    tokens = np.array(
        [[example.input_ids for example in client.examples] for client in prepared], np.int32
    )
    if not job.is_private:
        plan = calibrated(loaded.privacy, loaded.training, rounds)

        def batches(index: int, client: int) -> Any:
            """The records of each step of a client in a round."""
            seeded = stream(loaded.run.seed, "batches", index + 1, client)
            owners = [""] * job.records
            return tokens[client][np.array(list(plan.batches(owners, seeded)))[..., 0]]

        tokens = np.array(
            [[batches(index, client) for client in range(job.clients)] for index in range(rounds)]
        )
    shapes = {key: tuple(value.shape) for key, value in model.adapter.parameters.items()}
    initial = initial_state(shapes, loaded.run.seed)
    save_file({"tokens": tokens, **initial.tensors}, directory / "inputs.safetensors")


def check_same(engine: Path, bare: Path) -> None:
    """Both sides took the same steps: they end with the same adapter."""
    import numpy as np
    from safetensors.numpy import load_file

    ours, theirs = load_file(engine), load_file(bare)
    assert ours.keys() == theirs.keys()
    worst = max(float(np.abs(ours[key] - theirs[key]).max()) for key in ours)
    assert worst < TOLERANCE, f"the two sides trained differently: {worst}"
