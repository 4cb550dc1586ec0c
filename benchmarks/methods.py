"""Aggregation methods side by side on real data: accuracy with intervals, and bytes.

FEDSLM_ASSETS=… FEDSLM_DERIVED=… python benchmarks/methods.py

`simulations/local/methods.toml` (banking77, minilm-l3-pruned, 20 clients, Dirichlet 0.3), each method
without privacy and at record-level epsilon = 8, with three seeds. A seed decides who has which records,
where A starts and in which order clients see their records, so that methods are compared in pairs.
FEDSLM_DERIVED is what ``simulations/derive.py`` made. Runs that are complete under ``runs/methods`` are
not repeated; an interrupted one is resumed. The table goes to standard output.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from arms import ROOT, RUNS, finished_run, report_of
from scipy import stats

from fedslm.rendering import spent

SCENARIO = ROOT / "simulations" / "local" / "methods.toml"
SEEDS = (0, 1, 2)
METHODS: Mapping[str, tuple[str, ...]] = {
    "fedit": ("aggregation.method=fedit",),
    "ffa": ("aggregation.method=ffa", "lora.initial=orthonormal"),
    "ffa-eva": ("aggregation.method=ffa", "lora.initial=eva", "data.public_split=public"),
    "rolora": ("aggregation.method=rolora",),
    "fedrot": ("aggregation.method=fedrot",),
    "flexlora": ("aggregation.method=flexlora",),
    "stack": ("aggregation.method=stack",),
}
PLAIN = (
    "privacy.unit=none",
    "training.optimizer=adamw",
    "training.learning_rate=0.01",
    "training.batch_size=16",
    "training.local_steps=8",
    "federation.rounds=10",
    "lora.alpha=8.0",
)
ARMS: Mapping[str, tuple[str, ...]] = {"none": PLAIN, "epsilon-8": ()}
REFERENCE = "fedit"


def directory_of(method: str, arm: str, seed: int) -> Path:
    """Where a run lies."""
    return RUNS / "methods" / f"{method}-{arm}-{seed}"


def run(method: str, arm: str, seed: int) -> None:
    """Runs what is not there."""
    overrides = (*METHODS[method], *ARMS[arm], f"run.seed={seed}")
    finished_run(SCENARIO, directory_of(method, arm, seed), overrides)


def accuracies(method: str, arm: str) -> list[float]:
    """One for each seed that was run."""
    found = [report_of(directory_of(method, arm, seed)) for seed in SEEDS]
    return [report["metrics_after"]["accuracy"] for report in found if report is not None]


def interval(values: Sequence[float]) -> str:
    """Mean and 95 % interval by Student's t over the seeds."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:+.3f}"
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:.3f} ± {half:.3f}"


def rows(arm: str) -> Iterator[list[str]]:
    """One arm's lines."""
    reference = accuracies(REFERENCE, arm)
    for method in METHODS:
        found = accuracies(method, arm)
        if not found:
            yield [method, arm, "not run"]
            continue
        apart = "–"
        if method != REFERENCE and len(found) == len(reference):
            apart = interval([a - b for a, b in zip(found, reference, strict=True)])
        first = report_of(directory_of(method, arm, SEEDS[0])) or {}
        sizes = [f"{first.get(key, 0) / 1e6:.1f}" for key in ("bytes_up", "bytes_down")]
        yield [
            method,
            spent(first.get("epsilon", "infinite"), 2),
            ", ".join(f"{value:.3f}" for value in found),
            interval(found),
            apart,
            *sizes,
            f"{first.get('seconds', 0):.0f}",
        ]


def print_tables() -> None:
    """Both arms in Markdown."""
    head = ["method", "ε", "accuracy, by seed", "mean ± 95 %", "less FedIT's", "MB up", "MB down", "s"]
    for line in (head, ["---"] * len(head), *(row for arm in ARMS for row in rows(arm))):
        print(f"| {' | '.join(line)} |")


def main() -> None:
    """Runs what is missing, seed by seed, then prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", action="store_true", help="run nothing, print what is there")
    if not parser.parse_args().table:
        for seed in SEEDS:
            for arm in ARMS:
                for method in METHODS:
                    run(method, arm, seed)
    print_tables()


if __name__ == "__main__":
    main()
