"""What does a large population cost before any of it is asked?

Clients of 3 records each, of which 20 train privately in each of 3 rounds, on the embedded model with
two workers. Start-up is the processor time of the server until the first round, without preparing the
data; memory is the server's at the end of its last round. Preparing the data is shown by itself: it
reads, checks, permutes and writes 3 records for each client.

    python benchmarks/population.py --clients 100 10000 100000
    python benchmarks/population.py --clients 1000000 --data-only
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import scenario

import fedslm
from fedslm import Observer

if TYPE_CHECKING:
    from fedslm.config import Config
    from fedslm.federation.checkpoint import Checkpoint
    from fedslm.records import RoundRecord

START_GOAL, MEMORY_GOAL = 1.5, 1.2
_RECORDS, _READS = 3, 200


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--clients", type=int, nargs="+", default=[100, 10_000, 100_000], help="populations"
    )
    parser.add_argument("--data-only", action="store_true", help="prepare the data, and run nothing")
    parser.add_argument("--one", type=int, metavar="CLIENTS", help="one population; used internally")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one(arguments.one, data_only=arguments.data_only)))
        return
    options = ["--data-only"] if arguments.data_only else []
    busy = scenario.busy_cores()
    found = [
        scenario.measured([Path(__file__), "--one", str(clients), *options])[0]
        for clients in arguments.clients
    ]
    report(found, busy)


class Gauge(Observer):
    """An observer that notes when the first round begins, and the server's memory after the last."""

    def __init__(self) -> None:
        self.start = self.bytes = 0.0
        self.rounds: list[float] = []

    def on_start(self, config: Config, done: Checkpoint) -> None:
        """The first round begins."""
        self.start = self._last = time.process_time()

    def on_round(self, record: RoundRecord) -> None:
        """Notes the server's processor time; a client that failed would have cost less."""
        assert record.completed == record.cohort, record.reasons
        now = time.process_time()
        self.rounds.append(now - self._last)
        self._last, self.bytes = now, scenario.memory_bytes("self", "VmRSS")


def one(clients: int, *, data_only: bool) -> dict[str, Any]:
    """Measures one population."""
    from fedslm.data import store

    found: dict[str, Any] = {"clients": clients}
    real = store.write

    def write(*arguments: Any, **options: Any) -> store.Shards:
        """Prepares the data and notes what that takes."""
        # Of this thread: others calibrate the plan and start workers meanwhile.
        before, began = scenario.memory_bytes("self", "VmRSS"), time.thread_time()
        shards = real(*arguments, **options)
        found["data_seconds"] = time.thread_time() - began
        found["data_bytes"] = scenario.memory_bytes("self", "VmHWM") - before
        began, step = time.thread_time(), max(1, clients // _READS)
        for client in range(0, clients, step):
            list(store.read_client(arguments[0], client))
        found["read_seconds"] = (time.thread_time() - began) / len(range(0, clients, step))
        found["files"] = [path.stat().st_size for path in sorted(Path(arguments[0]).iterdir())]
        if data_only:
            raise SystemExit
        return shards

    gauge, began = Gauge(), time.process_time()
    with tempfile.TemporaryDirectory() as directory, patch.object(store, "write", write):
        try:
            fedslm.simulate(config(Path(directory), clients), observers=[gauge])
        except SystemExit:
            return found
        files = [path for path in (Path(directory) / "run").rglob("*") if path.is_file()]
        found["run_files"] = len(files)
        found["run_bytes"] = sum(path.stat().st_size for path in files)
    start = gauge.start - began - found["data_seconds"]
    return {**found, "start_seconds": start, "bytes": gauge.bytes, "round_seconds": gauge.rounds}


def config(directory: Path, clients: int) -> Config:
    """The run of a population, with its texts."""
    from fedslm.config import from_mapping

    for name, count in (("train", _RECORDS * clients), ("test", 100)):
        with (directory / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for number in range(count):
                row = {"text": f"{name} note {number} of a patient", "label": "ab"[number % 2]}
                file.write(json.dumps(row) + "\n")
    return from_mapping(
        {
            "run": {"name": "population", "directory": str(directory / "run")},
            "model": {"base": "demo", "device": "cpu"},
            "lora": {"rank": 2, "alpha": 2.0, "target_modules": ["3.output.dense"]},
            "data": {"source": str(directory), "partition": "iid"},
            "task": {"name": "classification", "pooling": "mean", "max_length": 24},
            "training": {"local_steps": 2, "batch_size": 2},
            "privacy": {
                "unit": "record",
                "epsilon": 8.0,
                "delta": 1e-5,
                "clip_norm": 1.0,
                "sample_rate": 0.5,
            },
            "aggregation": {"method": "ffa"},
            "federation": {
                "num_clients": clients,
                "clients_per_round": min(20, clients),
                "rounds": 3,
                "evaluate_every": 3,
            },
            "engine": {"workers": 2},
        }
    )


def report(found: list[dict[str, Any]], busy: float) -> None:
    """Prints the table, and everything as one JSON line."""
    first, rows, ratios = found[0], [], {}
    for each in found:
        row = [
            f"{each['clients']:,}",
            f"{each['data_seconds']:.1f}",
            f"{each['data_bytes'] / 1e6:.0f}",
            f"{1000 * each['read_seconds']:.2f}",
        ]
        if "start_seconds" in each:
            start = each["start_seconds"] / first["start_seconds"]
            memory = each["bytes"] / first["bytes"]
            ratios[f"{each['clients']} start"] = round(start, 3)
            ratios[f"{each['clients']} memory"] = round(memory, 3)
            row += [
                f"{each['start_seconds']:.1f} ({start:.2f})",
                f"{each['bytes'] / 1e6:.0f} ({memory:.2f})",
                f"{max(each['round_seconds']):.2f}",
                f"{each['run_bytes'] / 1e6:.1f}",
                f"{each['run_files']:,}",
            ]
        rows.append(row)
    header = ["clients", "data, CPU s", "MB for it", "a read, ms"]
    header += ["start-up, CPU s", "server, MB", "a round, server's CPU s", "on disk, MB", "files"]
    scenario.print_table(header[: len(rows[0])], rows)
    print(f"goals: start-up ≤ {START_GOAL} of the first, memory ≤ {MEMORY_GOAL}")
    last = found[-1]
    ratios[f"{last['clients']} data seconds"] = round(last["data_seconds"], 1)
    ratios[f"{last['clients']} data GB"] = round(last["data_bytes"] / 1e9, 2)
    values = {"busy_cores": busy, "ratios": ratios, "populations": found}
    print(json.dumps({"benchmark": "population", **values}))


if __name__ == "__main__":
    main()
