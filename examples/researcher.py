"""A researcher: how much accuracy does a smaller epsilon cost?

Three runs on the embedded notes of five made-up hospitals. They differ in epsilon only; a recipe sets
the rest (docs/recipes.md). A run without privacy has other settings, so it is not in the table.

    python examples/researcher.py --directory runs/researcher
"""

import argparse
from pathlib import Path

import fedslm

CONFIG = {
    "model": {"base": "demo"},
    "data": {"source": "demo", "partition": "natural"},  # or a path, a hub name, a database URL
    "task": {"name": "classification", "max_length": 96},
    "privacy": {"unit": "user", "unit_column": "patient", "units_per_client": 200},
    "federation": {"num_clients": 5},
}


def main() -> None:
    """Trains once for each epsilon, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, default=Path("runs/researcher"))
    parser.add_argument("--rounds", type=int, default=8, help="more rounds cost time, not privacy")
    parser.add_argument("--epsilons", type=float, nargs="+", default=[0.5, 2, 8])
    parser.add_argument("--records", type=int, default=600, help="public records to evaluate on")
    given = parser.parse_args()

    print("epsilon  spent  accuracy before  after")
    for epsilon in given.epsilons:
        run = fedslm.simulate(
            CONFIG,
            overrides={
                "run.directory": str(given.directory / f"epsilon-{epsilon:g}"),
                "privacy.epsilon": epsilon,
                "federation.rounds": given.rounds,
                "data.max_evaluation_records": given.records,
            },
        )
        before, after = run.metrics_before["accuracy"], run.metrics_after["accuracy"]
        print(f"{epsilon:7g}  {run.epsilon:5.2f}  {before:15.3f}  {after:5.3f}", flush=True)
    print("All runs used the same records: choosing the best of them costs their epsilons together.")


if __name__ == "__main__":
    main()
