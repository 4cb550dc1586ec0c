"""What noise that clients share is worth: local, distributed and central noise at equal epsilon.

FEDSLM_ASSETS=… python benchmarks/shared_noise.py [NAME …] [--epsilon 3 1] [--seeds 3] [--table]

"local": each client adds all of the noise. "shared": secure aggregation, threshold 8 of 10, nobody
colludes. "central": one client with all records, which is DP-SGD on the union of their data. Their
configs name data, base, unit and epsilon alone, and the recipe completes them. `phones`: a hundred
phones, of which each is one unit; threshold 67. Results are kept under ``runs/shared``; complete runs
are not repeated. Prints the table.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from arms import RUNS, finished_run, report_of
from recipes import assets, read

PLACE = RUNS / "shared"
HEAD = '[model]\nbase = "$FEDSLM_ASSETS/models/all-MiniLM-L6-v2"\n'
MODES = ("local", "shared", "central")
PHONES = 100


def banking77(mode: str) -> str:
    """Ten clients, Dirichlet 0.5; centrally one."""
    central = mode == "central"
    return (
        f'{HEAD}[data]\nsource = "{assets() / "data" / "banking77"}"\n'
        f'partition = "{"iid" if central else "dirichlet"}"\n'
        f'[task]\nname = "classification"\nmax_length = 32\n'
        f'[privacy]\nunit = "record"\n{noise(mode, 8)}'
        f"[federation]\nnum_clients = {1 if central else 10}\n"
    )


def phones(mode: str) -> str:
    """A hundred phones with text messages, of which some are spam; each phone is one unit."""
    return (
        f'{HEAD}[data]\nsource = "{PLACE / "phones-data"}"\npartition = "natural"\n'
        f'[task]\nname = "classification"\nmax_length = 64\npooling = "normalized"\nhead = "labels"\n'
        f"[training]\nlocal_steps = 4\nbatch_size = 16\nlearning_rate = 0.01\n"
        f'[lora]\nrank = 1\n[aggregation]\nmethod = "head"\n'
        f'[privacy]\nunit = "client"\nclip_norm = 0.3\ndelta = 1e-3\n{noise(mode, 67)}'
        f"[federation]\nnum_clients = {PHONES}\nrounds = 16\n"
    )


def noise(mode: str, threshold: int) -> str:
    """The lines of [privacy] and after it that say who adds the noise."""
    if mode != "shared":
        return ""
    return f'noise = "distributed"\n[secure_aggregation]\nthreshold = {threshold}\n'


JOBS = {"banking77": (banking77, MODES), "phones": (phones, ("shared",))}


def make_phones() -> None:
    """Deals the messages out to phones: a named user's are together, the rest are dealt in turn."""
    target = PLACE / "phones-data"
    if (target / "test.jsonl").exists():
        return
    (source,) = (assets() / "data" / "sms_spam").glob("train.jsonl*")
    rows = read(source)
    random.Random(0).shuffle(rows)
    named = sorted({str(row["client"]) for row in rows if row["client"]})
    target.mkdir(parents=True, exist_ok=True)
    with (target / "train.jsonl").open("w", encoding="utf-8") as file:
        for number, row in enumerate(rows):
            user = str(row["client"] or "")
            phone = named.index(user) if user else number % PHONES
            kept = {"text": row["text"], "label": row["label"], "client": f"phone-{phone:03d}"}
            file.write(json.dumps(kept) + "\n")
    (tests,) = (assets() / "data" / "sms_spam").glob("test.jsonl*")
    with (target / "test.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(
            json.dumps({"text": row["text"], "label": row["label"], "client": "public"}) + "\n"
            for row in read(tests)
        )


def config_of(name: str, mode: str) -> Path:
    """Writes the config of an arm."""
    path = PLACE / f"{name}-{mode}.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(JOBS[name][0](mode), encoding="utf-8")
    return path


def directory_of(name: str, mode: str, epsilon: float, seed: int) -> Path:
    """The directory of one run."""
    return PLACE / name / f"{mode}-{epsilon:g}-seed{seed}"


def rows(names: Sequence[str], epsilons: Sequence[float], seeds: int) -> Iterator[str]:
    """Yields the lines of the table from the runs that are complete."""
    yield "| data | ε | noise | before | mean accuracy (range; seeds) | noise multiplier |"
    yield "|---|---|---|---|---|---|"
    for name in names:
        for epsilon in epsilons:
            for mode in JOBS[name][1]:
                places = [directory_of(name, mode, epsilon, seed) for seed in range(seeds)]
                found = [each for place in places if (each := report_of(place)) is not None]
                if not found:
                    continue
                scores = [each["metrics_after"]["accuracy"] for each in found]
                spread = f"({min(scores):.3f} to {max(scores):.3f}; {len(scores)})"
                cells = [
                    f"`{name}`",
                    f"{epsilon:g}",
                    mode,
                    f"{found[0]['metrics_before']['accuracy']:.3f}",
                    f"{statistics.mean(scores):.3f} {spread}",
                    f"{found[0]['plan']['noise_multiplier']:.3g}",
                ]
                yield f"| {' | '.join(cells)} |"


def main() -> None:
    """Runs what is asked for, then prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(JOBS)}; left out: all")
    parser.add_argument("--epsilon", nargs="+", type=float, default=[3.0, 1.0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--table", action="store_true", help="run nothing, print what is there")
    asked = parser.parse_args()
    names = asked.names or list(JOBS)
    make_phones()
    for name in () if asked.table else names:
        for mode in JOBS[name][1]:
            config = config_of(name, mode)
            for seed in range(asked.seeds):
                for epsilon in asked.epsilon:
                    own = (f"privacy.epsilon={epsilon:g}", f"run.seed={seed}")
                    finished_run(config, directory_of(name, mode, epsilon, seed), own)
    print(*rows(names, asked.epsilon, asked.seeds), sep="\n")


if __name__ == "__main__":
    main()
