"""How long do ``import fedslm`` and ``fedslm --help`` take?

Each is run several times, alternating with ``python -c pass``, and the fastest run counts: everything
else that the machine does can only make it slower.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import scenario

COMMANDS = {
    "python -c pass": ([sys.executable, "-c", "pass"], None),
    "import fedslm": ([sys.executable, "-c", "import fedslm"], 0.2),
    "fedslm --help": ([str(Path(sys.executable).with_name("fedslm")), "--help"], 0.5),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=15, help="runs of each (default: 15)")
    repeats = parser.parse_args().repeats
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(repeats):
        for name, (command, _) in COMMANDS.items():
            began = time.perf_counter()
            subprocess.run(command, stdout=subprocess.DEVNULL, check=True, env=scenario.quiet())
            seconds[name].append(time.perf_counter() - began)
    fastest = {name: min(values) for name, values in seconds.items()}
    nothing = fastest["python -c pass"]
    rows = [
        [
            name,
            f"{fastest[name]:.3f}",
            f"{fastest[name] / nothing:.1f}",
            "–" if goal is None else f"< {goal} s",
        ]
        for name, (_, goal) in COMMANDS.items()
    ]
    scenario.print_table(["", "seconds", "ratio", "goal"], rows)
    results = [
        {
            "name": name,
            "seconds": round(fastest[name], 4),
            "ratio": round(fastest[name] / nothing, 2),
            "goal_seconds": goal,
        }
        for name, (_, goal) in COMMANDS.items()
    ]
    print(json.dumps({"benchmark": "imports", "commands": results}))


if __name__ == "__main__":
    main()
