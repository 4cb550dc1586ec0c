"""Defaults only: what the recipes reach where a config names just data, base, unit and epsilon.

FEDSLM_ASSETS=… python benchmarks/recipes.py [NAME …] [--epsilon 8 3] [--seeds 3]

Each run is one minimal config. The reference is a central regression without privacy on the same base's
features, with the better of two penalties *on the test records*: an upper bound. Results are kept under
``runs/recipes``; complete runs are not repeated. Writes the table of docs/recipes.md.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import statistics
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docstrings
from arms import FEDSLM, ROOT, RUNS, report_of

from fedslm.storage import expand

PLACE, PAGE = RUNS / "recipes", ROOT / "docs" / "recipes.md"
BEGIN, END = "<!-- results -->\n", "<!-- end of results -->\n"
PATIENTS, SITES, SECTIONS = 160, 3, 6
RUN_SECONDS = 4 * 3600
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Job:
    """One data set.

    Attributes:
        data: Directory with train and test files, below FEDSLM_ASSETS unless absolute.
        max_length: Tokens of a text.
        rest: Further lines of the config.
        base: Directory of the base below FEDSLM_ASSETS.
    """

    data: str
    max_length: int
    rest: str = '[privacy]\nunit = "record"\n[federation]\nnum_clients = 10\n'
    partition: str = "dirichlet"
    base: str = "models/all-MiniLM-L6-v2"


JOBS = {
    "banking77": Job("data/banking77", 32),
    "clinc150": Job("data/clinc150", 32),
    "medical_abstracts": Job("data/medical_abstracts", 128),
    "patients": Job(
        str(PLACE / "patients"),
        128,
        f'[privacy]\nunit = "user"\nunit_column = "patient"\n[federation]\nnum_clients = {SITES}\n',
        "natural",
    ),
    "packages": Job(str(PLACE / "packages"), 64),
    "library": Job(str(PLACE / "library"), 64),
}


def assets() -> Path:
    """The directory of models and data."""
    return Path(os.environ["FEDSLM_ASSETS"])


def place_of(job: Job) -> Path:
    """Where a job's data is."""
    return Path(job.data) if Path(job.data).is_absolute() else assets() / job.data


def read(path: Path) -> Rows:
    """Rows of a JSONL file, compressed or not."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def split_of(job: Job, split: str) -> Rows:
    """Rows of a split."""
    (path,) = place_of(job).glob(f"{split}.jsonl*")
    return read(path)


def make_patients() -> None:
    """Notes of 160 people at three sites: mts_dialog's notes, dealt out; the class is their section."""
    target = PLACE / "patients"
    if (target / "test.jsonl").exists():
        return
    source = assets() / "data" / "mts_dialog"
    rows = read(source / "train.jsonl.gz")
    common = [name for name, _ in Counter(row["section"] for row in rows).most_common(SECTIONS)]
    rows = [row for row in rows if row["section"] in common]
    random.Random(1).shuffle(rows)
    held_out = [
        row for split in ("validation", "test", "test2") for row in read(source / f"{split}.jsonl.gz")
    ]
    held_out = [row for row in held_out if row["section"] in common]
    target.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", rows), ("test", held_out)):
        with (target / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for number, row in enumerate(part):
                who = number % PATIENTS if name == "train" else PATIENTS
                made = {"text": row["output"], "label": row["section"], "patient": f"p{who}"}
                file.write(json.dumps({**made, "client": f"site-{who % SITES}"}) + "\n")


def config_of(name: str) -> Path:
    """Writes a job's minimal config."""
    job = JOBS[name]
    path = PLACE / f"{name}.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'[model]\nbase = "$FEDSLM_ASSETS/{job.base}"\n'
        f'[data]\nsource = "{place_of(job)}"\npartition = "{job.partition}"\n'
        f'[task]\nname = "classification"\nmax_length = {job.max_length}\n{job.rest}',
        encoding="utf-8",
    )
    return path


def run(name: str, epsilons: Sequence[float], seeds: int, workers: int) -> None:
    """All runs of a job; complete ones are kept."""
    over = f"privacy.epsilon={','.join(f'{each:g}' for each in epsilons)}"
    command = [FEDSLM, "sweep", str(config_of(name)), "--over", over, "--seeds", str(seeds)]
    command += ["--directory", str(PLACE / name), "--set", f"engine.workers={workers}"]
    print("$", " ".join(command), flush=True)
    subprocess.run(command, check=True, timeout=RUN_SECONDS)


def central(name: str) -> float:
    """Accuracy of the central regression; kept."""
    kept = PLACE / f"{name}-central.json"
    if not kept.exists():
        parts = {split: split_of(JOBS[name], split) for split in ("train", "test")}
        labels = sorted({row["label"] for rows in parts.values() for row in rows})
        found = max(regressions(name, parts, labels))
        kept.write_text(json.dumps(found), encoding="utf-8")
    return float(json.loads(kept.read_text(encoding="utf-8")))


def regressions(name: str, parts: dict[str, Rows], labels: Sequence[str]) -> Iterator[float]:
    """Accuracy at two penalties."""
    import torch

    features = {split: kept_features(name, split, rows) for split, rows in parts.items()}
    classes = {
        split: torch.tensor([labels.index(r["label"]) for r in rows]) for split, rows in parts.items()
    }
    for strength in (1.0, 10.0):
        weights = torch.zeros(len(labels), features["train"].shape[1] + 1, requires_grad=True)
        solver = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

        def loss(weights: Any = weights, solver: Any = solver, strength: float = strength) -> Any:
            solver.zero_grad()
            logits = features["train"] @ weights[:, :-1].T + weights[:, -1]
            data = torch.nn.functional.cross_entropy(logits, classes["train"], reduction="sum")
            total = (strength * data + weights[:, :-1].square().sum() / 2) / len(logits)
            total.backward()
            return total

        solver.step(loss)
        with torch.no_grad():
            logits = features["test"] @ weights[:, :-1].T + weights[:, -1]
        yield float((logits.argmax(1) == classes["test"]).float().mean())


def kept_features(name: str, split: str, rows: Rows) -> Any:
    """The features of a job's rows; kept."""
    import torch

    path = PLACE / f"{name}-{split}.pt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(features_of(JOBS[name], rows), path)
    return torch.load(path)


def features_of(job: Job, rows: Rows) -> Any:
    """Masked means of the last hidden states."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    directory = expand(f"$FEDSLM_ASSETS/{job.base}")
    model = AutoModel.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]["text"]))
    found = torch.zeros(len(rows), model.config.hidden_size)
    for start in range(0, len(rows), 32):
        chosen = order[start : start + 32]
        texts = [rows[number]["text"] for number in chosen]
        batch = tokenizer(
            texts, padding=True, truncation=True, max_length=job.max_length, return_tensors="pt"
        )
        with torch.no_grad():
            hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1).float()
        found[chosen] = (hidden * mask).sum(1) / mask.sum(1)
    return found


def row(name: str, epsilon: float, seeds: int) -> str | None:
    """One line of the table; None if no run is complete."""
    places = [PLACE / name / f"{epsilon:g}-seed{seed}" for seed in range(seeds)]
    runs = [found for place in places if (found := report_of(place)) is not None]
    if not runs:
        return None
    job, reference, first = JOBS[name], central(name), runs[0]
    test = split_of(job, "test")
    commonest = max(Counter(row["label"] for row in test).values()) / len(test)
    scores = [each["metrics_after"]["accuracy"] for each in runs]
    mean = statistics.mean(scores)
    cells = [
        f"`{name}`",
        f"{epsilon:g}",
        f"{first['delta']:g}",
        f"{first['outlook']['signal_to_noise']:.2g}",
        f"{commonest:.3f}",
        f"{first['metrics_before']['accuracy']:.3f}",
        f"{mean:.3f} ({min(scores):.3f} to {max(scores):.3f}; {len(scores)})",
        f"{reference:.3f}",
        f"{mean / reference:.2f}",
        f"{max(each['seconds'] for each in runs):.0f} s",
    ]
    return f"| {' | '.join(cells)} |"


def write_table(epsilons: Sequence[float], seeds: int) -> None:
    """Writes the table from what is there."""
    names = [
        "data",
        "ε",
        "δ",
        "signal to noise",
        "commonest class",
        "before",
        "mean accuracy (range; seeds)",
        "central and not private",
        "share of it",
        "longest run",
    ]
    head = f"| {' | '.join(names)} |\n|{'---|' * len(names)}\n"
    rows = [row(name, epsilon, seeds) for name in JOBS for epsilon in epsilons]
    table = head + "".join(f"{each}\n" for each in rows if each is not None)
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}{table}{END}{after}", encoding="utf-8")
    print(table)


def main() -> None:
    """Runs what is asked for, then writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(JOBS)}; left out: all")
    parser.add_argument("--epsilon", nargs="+", type=float, default=[8.0, 3.0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=-1)
    parser.add_argument("--table", action="store_true", help="run nothing, write what is there")
    asked = parser.parse_args()
    if unknown := set(asked.names) - set(JOBS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    if not asked.table:
        make_patients()
        for name in ("packages", "library"):
            docstrings.make(name, PLACE / name)
        for name in asked.names or JOBS:
            run(name, asked.epsilon, asked.seeds, asked.workers)
    write_table(asked.epsilon, asked.seeds)


if __name__ == "__main__":
    main()
