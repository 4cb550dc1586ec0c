"""Every attack against every rule on the demo, 4 of 20 clients hostile: writes docs/robustness.md.

python benchmarks/robustness.py

Runs that are complete under ``runs/robustness`` are not repeated; an interrupted one is resumed.
"""

from __future__ import annotations

import argparse
import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pyarrow.parquet as pq
from arms import ROOT, RUNS, finished_run, report_of
from jinja2 import Template

from fedslm.config import RuleName

SCENARIO = ROOT / "simulations" / "attacked.toml"
PAGE, TEMPLATE = ROOT / "docs" / "robustness.md", ROOT / "benchmarks" / "robustness.md.in"
RULES = get_args(RuleName)
ATTACKS = ("none", "skewed", "sign-flip", "scale", "nan", "label-flip", "backdoor")
SHOWN = {"none": "nobody", "skewed": "nobody, skewed"}
WIDEST = 1.96 * 0.5  # times 1/√n: half of the widest 95 % interval of a share
HOSTILE = 4


def overrides_of(attack: str, rule: str) -> Iterator[str]:
    """What a cell changes in the scenario."""
    yield f"aggregation.rule={rule}"
    yield f"aggregation.num_byzantine={0 if rule == 'mean' else HOSTILE}"
    honest = attack in SHOWN
    yield f"attack.kind={'none' if honest else attack}"
    yield f"attack.clients={0 if honest else HOSTILE}"
    if attack == "skewed":
        yield from ("data.partition=dirichlet", "data.dirichlet_alpha=0.3")


def run(attack: str, rule: str) -> Path:
    """Runs one cell; gives its directory."""
    return finished_run(SCENARIO, directory_of(attack, rule), overrides_of(attack, rule))


def run_unbounded() -> Path:
    """The scale attack against a mean whose norm bound is as good as off."""
    overrides = (*overrides_of("scale", "mean"), "aggregation.norm_bound=1e9")
    return finished_run(SCENARIO, directory_of("scale", "unbounded"), overrides)


def directory_of(attack: str, rule: str) -> Path:
    """Where a cell's run lies."""
    return RUNS / "robustness" / f"{attack}-{rule}"


def backdoor_of(directory: Path) -> dict[str, float]:
    """How many public notes of other classes get the target, with and without the trigger; kept."""
    kept = directory / "backdoor.json"
    if not kept.exists():
        from fedslm.inference.prediction import predict
        from fedslm.inference.trained import load_trained, open_run

        trained = load_trained(open_run(directory))
        attack = attack_of(directory)
        target = attack["target"] or trained.run.labels[0]
        rows = pq.read_table(directory / "data" / "evaluation.parquet").to_pylist()
        others = [row for row in rows if row[trained.run.data.label_column] != target]
        column = trained.run.data.text_column
        triggered = [{**row, column: f"{attack['trigger']} {row[column]}"} for row in others]
        shares = {
            name: sum(answer["label"] == target for answer in predict(trained, texts)) / len(others)
            for name, texts in (("with", triggered), ("without", others))
        }
        kept.write_text(json.dumps({**shares, "notes": len(others)}), encoding="utf-8")
    found: dict[str, float] = json.loads(kept.read_text(encoding="utf-8"))
    return found


def attack_of(directory: Path) -> dict[str, Any]:
    """A run's attack section."""
    config = tomllib.loads((directory / "config.toml").read_text(encoding="utf-8"))
    section: dict[str, Any] = config["attack"]
    return section


def table(header: str, rows: list[list[str]]) -> str:
    """Markdown; one column for each rule."""
    lines = [[header, *(f"`{rule}`" for rule in RULES)], ["---"] * (len(RULES) + 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def accuracy(attack: str, rule: str) -> str:
    """One cell of the first table."""
    report = report_of(directory_of(attack, rule))
    return "–" if report is None else f"{report['metrics_after']['accuracy']:.3f}"


def write_page() -> None:
    """Writes docs/robustness.md from what is there."""
    first = report_of(directory_of("none", "mean"))
    if first is None:
        raise SystemExit("the run without an attack is missing: run this without --table first")
    accuracies = [
        [SHOWN.get(attack, attack), *(accuracy(attack, rule) for rule in RULES)] for attack in ATTACKS
    ]
    poisoned = [directory_of("backdoor", rule) for rule in RULES]
    shares = [backdoor_of(each) if (each / "report.json").exists() else {} for each in poisoned]
    backdoors = [
        [name, *(f"{each[name]:.3f}" if each else "–" for each in shares)]
        for name in ("with", "without")
    ]
    evaluated = pq.read_metadata(directory_of("none", "mean") / "data" / "evaluation.parquet").num_rows
    section = attack_of(directory_of("backdoor", "mean"))
    page = Template(TEMPLATE.read_text(encoding="utf-8"), keep_trailing_newline=True).render(
        before=f"{first['metrics_before']['accuracy']:.3f}",
        half_width=f"{WIDEST / evaluated**0.5:.3f}",
        accuracy=table("attack", accuracies),
        backdoor=table("trigger", backdoors),
        trigger=section["trigger"],
        unbounded=accuracy("scale", "unbounded"),
        target=section["target"] or first["labels"][0],
    )
    PAGE.write_text(page, encoding="utf-8")
    print(f"wrote {PAGE}")


def main() -> None:
    """Runs what is missing, then writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", action="store_true", help="run nothing, write what is there")
    if not parser.parse_args().table:
        for attack in ATTACKS:
            for rule in RULES:
                run(attack, rule)
        run_unbounded()
    write_page()


if __name__ == "__main__":
    main()
