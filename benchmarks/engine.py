"""Is the local engine faster than a bare PyTorch loop that does the same job?

The clients take LoRA steps of 64 tokens a record: once on fedslm's local engine (two workers, one
thread each) and once in a bare loop (one process), with two threads and with one. Without privacy the
loop is ``bare_loop.py``: both sides see the same tokens in the same order and start from the same
adapter, and must end with the same one. Under privacy it is ``bare_opacus.py``, with samples of its
own.

The sides take turns. Ratios are of medians, below 1 where fedslm needs less; wall time and processor
time are held against the loop that needs less of it. Memory is that of all processes of a side, and
start-up ends when every client has answered; the loop's, when its model is loaded.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import scenario
import sides
from scenario import MEDIUM, SMALL
from sides import BARE, ENGINE, Job

QUIET = 0.3  # cores that others may keep busy
Sides = Mapping[str, list[dict[str, list[float]]]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=4, help="rounds in a run (default: 4)")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each side (default: 2)")
    parser.add_argument("--private", action="store_true", help="DP-SGD, against a bare Opacus loop")
    parser.add_argument(
        "--models", nargs="+", default=[SMALL.name, MEDIUM.name], help="0.2M, 5M, or directories"
    )
    parser.add_argument(
        "--busy", action="store_true", help="on a busy machine: no loop with two threads, no wall time"
    )
    parser.add_argument("--simulate", type=Path, metavar="CONFIG", help="time one run; used internally")
    arguments = parser.parse_args()
    if arguments.simulate:
        sides.time_simulation(arguments.simulate)
        return
    with tempfile.TemporaryDirectory() as directory:
        results = [
            compare(Path(directory) / job.name, job, arguments)
            for job in jobs(Path(directory), arguments.models, is_private=arguments.private)
        ]
    report(results, "engine-private" if arguments.private else "engine")


def jobs(directory: Path, models: list[str], *, is_private: bool) -> Iterator[Job]:
    """The jobs; a model is a size of :mod:`scenario`, or a directory with a base."""
    sizes = {size.name: size for size in (SMALL, MEDIUM)}
    for model in models:
        if model in sizes:
            path = directory / f"{model}-model"
            scenario.write_model(path, sizes[model])
            counts = (4, 10, 32, 320) if is_private else (8, 10, 4, 64)
        else:
            path = Path(model).resolve()
            counts = (2, 2, 4, 40) if is_private else (4, 2, 4, 64)
        yield Job(path.name.removesuffix("-model"), path, is_private, *counts)


def compare(directory: Path, job: Job, arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs all sides on one job, in turn."""
    directory.mkdir()
    rounds, repeats = arguments.rounds, arguments.repeats
    bare = {side: threads for side, threads in BARE.items() if threads == 1 or not arguments.busy}
    runs: dict[str, list[dict[str, list[float]]]] = {}
    starts: dict[str, list[float]] = {ENGINE: [], "bare loop": []}
    busy = []
    engine = Path(__file__).with_name("engine.py")
    for repeat in range(repeats):
        busy.append(scenario.busy_cores())
        path = sides.write_config(job, directory, f"run-{repeat}", rounds=rounds, steps=job.steps)
        found = scenario.measured([engine, "--simulate", path])[0]
        runs.setdefault(ENGINE, []).append(found)
        if not repeat:
            sides.write_inputs(job, directory, path, rounds)
        for side, threads in bare.items():
            command = sides.bare_command(job, directory, threads, rounds)
            runs.setdefault(side, []).append(scenario.measured(command)[0])
            if not job.is_private:
                adapter = path.with_suffix("") / "adapter" / "adapter_model.safetensors"
                sides.check_same(adapter, directory / "bare.safetensors")
    for repeat in range(repeats):
        path = sides.write_config(job, directory, f"start-{repeat}", rounds=1, steps=1)
        starts[ENGINE].append(sides.seconds_until_ready(path))
        values, started = scenario.measured(sides.bare_command(job, directory, 2, 0))
        starts["bare loop"].append(values["ready"] - started)
    return {
        "model": job.name,
        "runs": runs,
        "start_seconds": starts,
        "peak_bytes": peaks(job, directory, rounds),
        "busy_cores": round(max(busy), 2),
    }


def peaks(job: Job, directory: Path, rounds: int) -> dict[str, int]:
    """The most memory of all processes of each side, in runs of their own."""
    path = sides.write_config(job, directory, "memory", rounds=rounds, steps=job.steps)
    return {
        ENGINE: scenario.peak_bytes(["-m", "fedslm", "simulate", path]),
        "bare loop": scenario.peak_bytes(sides.bare_command(job, directory, 2, rounds)),
    }


def ratios_of(result: dict[str, Any]) -> dict[str, float]:
    """Each measure of fedslm over that of the bare loop that needs less; first rounds are left out."""
    runs: Sides = result["runs"]
    starts, memory = result["start_seconds"], result["peak_bytes"]
    found = {
        "start": statistics.median(starts[ENGINE]) / statistics.median(starts["bare loop"]),
        "memory": memory[ENGINE] / memory["bare loop"],
    }
    for key, name in (("seconds", "wall"), ("cpu_seconds", "cpu")):
        medians = {
            side: statistics.median(statistics.median(run[key][1:]) for run in each)
            for side, each in runs.items()
        }
        if name == "cpu" or set(BARE) < set(runs):
            found[name] = medians.pop(ENGINE) / min(medians.values())
    return found


def report(results: list[dict[str, Any]], name: str) -> None:
    """Prints the tables, and everything as one JSON line."""
    busy = max(result["busy_cores"] for result in results)
    if busy > QUIET:
        print(f"the machine was not quiet ({busy:.1f} cores busy): do not trust ratios of wall time")
    ratios = {}
    for result in results:
        rows = []
        for side, runs in result["runs"].items():
            later = [[value for run in runs for value in run[key][1:]] for key in _MEASURES]
            firsts = [run["seconds"][0] for run in runs]
            rows.append([f"{result['model']}, {side}", *map(scenario.spread, (*later, firsts))])
        scenario.print_table(["", "a round, s", "CPU s", "the first round, s"], rows)
        for side, seconds in result["start_seconds"].items():
            memory = result["peak_bytes"][side] / 1e6
            print(f"{side}: start {scenario.spread(seconds)} s; peak {memory:.0f} MB")
        found = {key: round(value, 3) for key, value in ratios_of(result).items()}
        print("ratios:", ", ".join(f"{key} {value:.2f}" for key, value in found.items()), "\n")
        ratios |= {f"{result['model']} {key}": value for key, value in found.items()}
    print(json.dumps({"benchmark": name, "busy_cores": busy, "ratios": ratios, "jobs": results}))


_MEASURES = ("seconds", "cpu_seconds")


if __name__ == "__main__":
    main()
