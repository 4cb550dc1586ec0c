"""What does a round cost on real nodes when there is nothing to train?

Two nodes on this machine, over TLS and with node keys, exchange the adapter of the embedded base: with
fedslm's workers warm, with a new worker for each message (``warm = false``), and with plain Flower,
whose app imports torch, transformers and peft, loads the same base with LoRA and returns its tensors.
fedslm takes one step on one record; plain Flower takes none. A round lasts from the line that the round
before it wrote to its own. The first round (its processes load) is reported apart, and the last one,
after which fedslm evaluates, is left out. The arms take turns.

    python benchmarks/deployment.py --rounds 6 --repeats 2
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import federation
import scenario

ARMS: dict[str, Callable[[Path], AbstractContextManager[federation.Run]]] = {
    "fedslm, warm": partial(federation.fedslm, warm=True),
    "fedslm, cold": partial(federation.fedslm, warm=False),
    "plain Flower": federation.flower,
}
GOAL = round(1 / 3, 3)
GOALS: dict[str, float | None] = {"fedslm, warm": GOAL, "fedslm, cold": None, "plain Flower": None}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=6, help="rounds counted in a run (default: 6)")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each arm (default: 1)")
    parser.add_argument("--only", choices=list(ARMS), help="only this arm")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the directories and logs here")
    arguments = parser.parse_args()
    arms = [arguments.only] if arguments.only else list(ARMS)
    first: dict[str, list[float]] = {arm: [] for arm in arms}
    later: dict[str, list[float]] = {arm: [] for arm in arms}
    busy = []
    with tempfile.TemporaryDirectory() as temporary:
        root = (arguments.keep or Path(temporary)).absolute()
        for repeat in range(arguments.repeats):
            busy.append(scenario.busy_cores())
            for arm in arms:
                with ARMS[arm](root / f"{arm.replace(', ', '-').replace(' ', '-')}-{repeat}") as run:
                    began, *ends = run(arguments.rounds + 2)
                seconds = [end - start for start, end in zip([began, *ends], ends, strict=False)]
                first[arm].append(seconds[0])
                later[arm] += seconds[1:-1]
    report(first, later, max(busy))


def report(first: dict[str, list[float]], later: dict[str, list[float]], busy: float) -> None:
    """Prints the table, and everything as one JSON line."""
    plain = statistics.median(later["plain Flower"]) if "plain Flower" in later else None
    medians = {arm: statistics.median(seconds) for arm, seconds in later.items()}
    ratios = {arm: None if plain is None else medians[arm] / plain for arm in later}
    rows = [
        [
            arm,
            scenario.spread(later[arm]),
            scenario.spread(first[arm]),
            "–" if ratios[arm] is None else f"{ratios[arm]:.3f}",
            "–" if GOALS[arm] is None else f"≤ {GOALS[arm]}",
        ]
        for arm in later
    ]
    if busy > 0.3:
        print(f"the machine was not quiet ({busy:.1f} cores busy): ratios alone count, roughly")
    scenario.print_table(["", "a round, s", "the first, s", "ratio", "goal"], rows)
    arms = [
        {
            "name": arm,
            "round_seconds": [round(value, 3) for value in later[arm]],
            "first_round_seconds": [round(value, 3) for value in first[arm]],
            "ratio": None if ratios[arm] is None else round(ratios[arm], 4),
        }
        for arm in later
    ]
    found = {"benchmark": "deployment", "goal": GOAL, "busy_cores": round(busy, 2), "arms": arms}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
