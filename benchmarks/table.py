"""Runs the benchmarks that have goals and writes their ratios into benchmarks/README.md.

    python benchmarks/table.py                          # all; an hour on two quiet cores
    python benchmarks/table.py --only step peers        # some
    python benchmarks/table.py --write                  # run nothing, write what is there

Every figure is kept with date, command and the load of the machine in ``benchmarks/results.json``; the
table shows the last one, and the least and the greatest if there are several. A script ends with
one JSON line, whose ``ratios`` are read here.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import scenario
from arms import ROOT

RESULTS = ROOT / "benchmarks" / "results.json"
PAGE = ROOT / "benchmarks" / "README.md"
BEGIN, END = "<!-- begin: python benchmarks/table.py -->", "<!-- end -->"
HERE = Path(__file__).parent
LARGE = os.environ.get("FEDSLM_SMOLLM2", "")  # a directory; its rows are left out without one
QUIET = 0.3  # cores that others may keep busy
STEP = "private, public shapes"
_MILLION = "population/1000000"
LAST = [  # of MiniLM-L6
    *(f"5.attention.{name}" for name in ("self.query", "self.key", "self.value", "output.dense")),
    *("5.intermediate.dense", "5.output.dense"),
]


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        what: What is held against what.
        key: Arm and name of the ratio.
        goal: The ratio, or the seconds, that is wanted.
        is_least: Whether the goal is the least, and not the most.
        is_wall: Whether other load on the machine moves it.
    """

    what: str
    key: str
    goal: float
    is_least: bool = False
    is_wall: bool = False

    @property
    def bound(self) -> str:
        """The goal as text."""
        return f"{'≥' if self.is_least else '≤'} {self.goal:g}"

    def is_met(self, value: float) -> bool:
        """Whether a figure reaches the goal."""
        return value >= self.goal if self.is_least else value <= self.goal


ROWS = (
    *(
        Row(f"private step over plain step, {base}, {size}, CPU", f"step/{base} {STEP}", 1.15)
        for base, size in (
            ("all-MiniLM-L6-v2", "32 records"),
            ("stories260K", "32 records"),
            ("minilm-l3-pruned", "32 records"),
            ("smollm2-135m", "8 × 128 tokens"),
        )
    ),
    Row(
        "the step before over the private step with cached layers, last layer adapted, MiniLM-L6, CPU",
        f"step-last/all-MiniLM-L6-v2 before / {STEP}, cached layers",
        5.0,
        is_least=True,
    ),
    *(
        row
        for model in ("0.2M", "5M", "smollm2-135m")
        for row in (
            Row(
                f"plain round over bare loop, {model}, wall", f"engine/{model} wall", 0.55, is_wall=True
            ),
            Row(f"plain round over bare loop, {model}, CPU", f"engine/{model} cpu", 1.0),
        )
    ),
    *(
        row
        for model in ("0.2M", "5M", "smollm2-135m")
        for row in (
            Row(
                f"private round over bare Opacus loop, {model}, wall",
                f"engine-private/{model} wall",
                0.5,
                is_wall=True,
            ),
            Row(
                f"private round over bare Opacus loop, {model}, CPU", f"engine-private/{model} cpu", 0.8
            ),
        )
    ),
    *(
        Row(f"peak memory over bare loop, {model}{', private' * private}", f"{arm}/{model} memory", 2.0)
        for private, arm in enumerate(("engine", "engine-private"))
        for model in ("0.2M", "5M", "smollm2-135m")
    ),
    *(
        Row(
            f"start-up over bare loop's, {model}{', private' * private}",
            f"{arm}/{model} start",
            1.3,
            is_wall=True,
        )
        for private, arm in enumerate(("engine", "engine-private"))
        for model in ("0.2M", "5M")
    ),
    *(
        Row(f"plain round over {peer}, 0.2M, {name}", f"peers/{peer} {key}", 1.0, is_wall=key != "cpu")
        for peer in ("pfl-research", "Flower's simulation")
        for key, name in (("cpu", "CPU"), ("wall", "wall"), ("start", "start-up"))
    ),
    Row(
        "plain round over pfl-research in 2 processes, 0.2M, wall",
        "peers/pfl-research, 2 processes wall",
        1.0,
        is_wall=True,
    ),
    Row("`make demo` after installation, seconds", "demo/seconds", 90.0, is_wall=True),
    Row("100,000 clients over 100: start-up, CPU", "population/100000 start", 1.5),
    Row("100,000 clients over 100: server memory", "population/100000 memory", 1.2),
    Row("a million clients of 3 records: preparing the data, CPU s", f"{_MILLION} data seconds", 60.0),
    Row("a million clients of 3 records: preparing the data, GB", f"{_MILLION} data GB", 4.0),
    Row("speed of aggregation over NumPy's add, 4 M values", "aggregation/speed", 0.7, is_least=True),
    Row("memory of aggregation, adapters", "aggregation/adapters", 3.0),
    Row("accounting at round 200 of 100 clients, CPU ms", "history/accounting ms", 50.0),
    Row("the server's files after 200 rounds of 100 clients, MB", "history/server MB", 20.0),
    Row("the same over those after 100 rounds", "history/growth", 2.1),
    Row("Ray, two nodes on this machine, over the local engine, 5M, CPU", "cluster/cpu", 1.5),
)


def arms(*, is_busy: bool) -> dict[str, list[list[str]]]:
    """The commands of each arm; the large base takes part if it is there."""
    busy = ["--busy"] if is_busy else []
    large = [["--rounds", "3", "--repeats", "1", *busy, "--models", LARGE]] if LARGE else []
    engine = [[*busy], *large]
    return {
        "step": [["step.py"], *([["step.py", "--rounds", "3", "--bases", LARGE]] if LARGE else [])],
        "step-last": [["step.py", "--bases", "all-MiniLM-L6-v2", "--layers", *LAST]],
        "engine": [["engine.py", *options] for options in engine],
        "engine-private": [["engine.py", "--private", *options] for options in engine],
        "peers": [["peers.py"]],
        "demo": [["demo"]],
        "population": [["population.py"], ["population.py", "--clients", "1000000", "--data-only"]],
        "aggregation": [["aggregation.py"]],
        "history": [["history.py"]],
        "cluster": [["cluster.py"]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(arms(is_busy=False)), help="only these arms")
    parser.add_argument("--write", action="store_true", help="run nothing, write what is there")
    parser.add_argument("--busy", action="store_true", help="leave out what needs a quiet machine")
    arguments = parser.parse_args()
    for arm, commands in arms(is_busy=arguments.busy).items():
        if not arguments.write and (arguments.only is None or arm in arguments.only):
            for command in commands:
                print("$", shlex.join(command), flush=True)
                keep(arm, command, demo() if command == ["demo"] else measured(command))
    write_page(kept())


def measured(command: Sequence[str]) -> dict[str, Any]:
    """Runs a script; what its last line says."""
    return scenario.measured([HERE / command[0], *command[1:]])[0]


def demo() -> dict[str, Any]:
    """How long the demo takes, in a new directory."""
    busy = scenario.busy_cores()
    with tempfile.TemporaryDirectory() as directory:
        began = time.monotonic()
        scenario.finished(["-m", "fedslm", "demo", "--directory", f"{directory}/demo"])
        return {"ratios": {"seconds": round(time.monotonic() - began, 1)}, "busy_cores": busy}


def keep(arm: str, command: Sequence[str], found: Mapping[str, Any]) -> None:
    """Adds the figures of one command to the file."""
    results = kept()
    for key, value in found["ratios"].items():
        figure = {
            "value": value,
            "date": date.today().isoformat(),
            "busy_cores": found["busy_cores"],
            "command": shlex.join([Path(part).name for part in command]),
        }
        results.setdefault(f"{arm}/{key}", []).append(figure)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def kept() -> dict[str, list[dict[str, Any]]]:
    """All figures so far, the last one of each key last."""
    if not RESULTS.exists():
        return {}
    found: dict[str, list[dict[str, Any]]] = json.loads(RESULTS.read_text(encoding="utf-8"))
    return found


def table(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Markdown: one line for each row, measured or not."""
    lines = ["| what | measured | goal | | date |", "|---|---|---|---|---|"]
    for row in ROWS:
        figures = results.get(row.key, ())
        if not figures:
            lines.append(f"| {row.what} | not measured | {row.bound} | | |")
            continue
        values, last = [figure["value"] for figure in figures], figures[-1]
        shown = f"{last['value']:.2f}"
        if len(values) > 1:
            shown += f" ({len(values)} runs: {min(values):.2f} to {max(values):.2f})"
        verdict = "met" if row.is_met(last["value"]) else "**missed**"
        if row.is_wall and last["busy_cores"] > QUIET:
            verdict += f", {last['busy_cores']:.1f} cores were busy"
        lines.append(f"| {row.what} | {shown} | {row.bound} | {verdict} | {last['date']} |")
    return "\n".join(lines)


def write_page(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Puts the table between its markers."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    assert after, f"{PAGE} has no markers {BEGIN} and {END}"
    PAGE.write_text(f"{before}{BEGIN}\n\n{table(results)}\n\n{END}{after}", encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
