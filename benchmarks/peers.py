"""The same job on fedslm, on pfl-research and on Flower's simulation.

All three train the same clients on the same tokens from the same adapter, and must end with the same
one. The peers run at their best: the model is loaded once in each process, with one thread each;
pfl-research in one process (least processor time) and in two under ``torchrun`` (least wall time),
Flower with two Ray actors. Rounds after the first count; start-up ends when the first round begins.

    python benchmarks/peers.py --install     # pfl-research into runs/peers, an environment of its own

Flower's simulation needs Ray here: ``pip install -e ".[simulation]"``. What is not installed is left
out and named.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import scenario
import sides
from arms import ROOT, RUNS
from scenario import MEDIUM, SMALL
from sides import ENGINE, Job

ENVIRONMENT = RUNS / "peers"
PFL = "pfl==0.6.0"
TWO = "pfl-research, 2 processes"
SHARED = ("torch", "transformers", "peft", "safetensors")  # of the same version on all sides
HERE = Path(__file__).parent
Found = dict[str, list[float]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=4, help="rounds in a run (default: 4)")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each side (default: 2)")
    parser.add_argument("--model", choices=[SMALL.name, MEDIUM.name], default=SMALL.name)
    parser.add_argument("--only", choices=["pfl", "flower"], help="only this peer")
    parser.add_argument("--install", action="store_true", help="install pfl-research, and end")
    parser.add_argument(
        "--python", type=Path, default=ENVIRONMENT / "bin" / "python", help="Python with pfl-research"
    )
    arguments = parser.parse_args()
    if arguments.install:
        install()
        return
    peers = {
        name: command
        for name, command in commands(arguments.python).items()
        if arguments.only in (None, "pfl" if name.startswith("pfl") else "flower")
    }
    with tempfile.TemporaryDirectory() as directory:
        report(compare(Path(directory), peers, arguments), arguments.model)


def install() -> None:
    """Makes an environment with pfl-research, and torch and the others as in this one."""
    from importlib.metadata import version

    subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=True)
    pins = [f"{name}=={version(name).partition('+')[0]}" for name in SHARED]
    pip = [str(ENVIRONMENT / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, *pins, PFL], check=True)


def commands(python: Path) -> dict[str, list[str]]:
    """How each peer that is installed is started; prints which are not."""
    peers = HERE / "peer_apps"
    found: dict[str, list[str]] = {}
    if python.exists():
        app = str(peers / "pfl_app.py")
        found["pfl-research"] = [str(python), app]
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29511"]
        found[TWO] = [str(python), *torchrun, app]
    else:
        print(f"pfl-research is not run: {python} does not exist; --install makes it")
    if importlib.util.find_spec("ray"):
        # Ray's actors import the app by name, so it must not be the program itself.
        found["Flower's simulation"] = [sys.executable, "-c", "import flower_app; flower_app.main()"]
    else:
        print('Flower\'s simulation is not run: it needs Ray (pip install -e ".[simulation]")')
    return found


def compare(
    directory: Path, peers: dict[str, list[str]], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Runs all sides in turn."""
    size = SMALL if arguments.model == SMALL.name else MEDIUM
    scenario.write_model(directory / "model", size)
    job = Job(size.name, directory / "model", False, 8, 10, 4, 64)
    runs: dict[str, list[Found]] = {}
    busy = []
    for repeat in range(arguments.repeats):
        busy.append(scenario.busy_cores())
        rounds = arguments.rounds
        path = sides.write_config(job, directory, f"run-{repeat}", rounds=rounds, steps=job.steps)
        found, _ = scenario.measured([HERE / "engine.py", "--simulate", path])
        start = sides.write_config(job, directory, f"start-{repeat}", rounds=1, steps=1)
        found["start"] = [sides.seconds_until_ready(start)]
        runs.setdefault(ENGINE, []).append(found)
        if not repeat:
            sides.write_inputs(job, directory, path, rounds)
        for name, command in peers.items():
            runs.setdefault(name, []).append(run(command, directory))
            adapter = path.with_suffix("") / "adapter" / "adapter_model.safetensors"
            sides.check_same(adapter, directory / "peer.safetensors")
    return {"runs": runs, "busy_cores": round(max(busy), 2)}


def run(command: list[str], directory: Path) -> Found:
    """Runs one peer's app; its rounds, and the seconds until the first one began."""
    places = {
        "JOB_MODEL": directory / "model",
        "JOB_INPUTS": directory / "inputs.safetensors",
        "JOB_OUTPUT": directory / "peer.safetensors",
    }
    paths = os.pathsep.join([str(HERE / "peer_apps"), str(ROOT)])
    environment = {
        **scenario.quiet(),
        **{key: str(value) for key, value in places.items()},
        "PYTHONPATH": paths,
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    started = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    found: Found = json.loads(lines[-1])
    found["start"] = [found.pop("began")[0] - started]
    return found


def report(results: dict[str, Any], model: str) -> None:
    """Prints the table, and everything as one JSON line."""
    runs: dict[str, list[Found]] = results["runs"]
    medians: dict[str, dict[str, float]] = {}
    for name, each in runs.items():
        medians[name] = {
            "wall": statistics.median(value for one in each for value in one["seconds"][1:]),
            "start": statistics.median(one["start"][0] for one in each),
        }
        if name != TWO:  # whose clock sees only one of them
            cpu = (value for one in each for value in one["cpu_seconds"][1:])
            medians[name]["cpu"] = statistics.median(cpu)
    rows = [
        [name, *(f"{each[key]:.2f}" if key in each else "–" for key in ("wall", "cpu", "start"))]
        for name, each in medians.items()
    ]
    scenario.print_table([f"{model}: medians", "a round, s", "CPU s", "start, s"], rows)
    print(f"{results['busy_cores']:.1f} cores were busy with other work")
    ratios = {
        f"{name} {key}": round(medians[ENGINE][key] / value, 3)
        for name, each in medians.items()
        if name != ENGINE
        for key, value in each.items()
    }
    print(json.dumps({"benchmark": "peers", "model": model, "ratios": ratios, **results}))


if __name__ == "__main__":
    main()
