"""An auditor: check a ledger with files only, and see a forged one found out.

The first part makes a short private run, since an auditor needs something to audit. What follows needs
neither the model nor the data.

    python examples/auditor.py --directory runs/auditor
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import fedslm


def make_run(directory: Path, rounds: int) -> Path:
    """A short private run of two hospitals' notes; returns the directory of one hospital's node."""
    fedslm.simulate(
        {
            "model": {"base": "demo"},
            "data": {"source": "demo", "partition": "natural", "max_evaluation_records": 100},
            "task": {"name": "classification", "max_length": 96},
            "privacy": {
                "unit": "user",
                "unit_column": "patient",
                "epsilon": 2,
                "units_per_client": 200,
            },
            "federation": {"num_clients": 5, "rounds": rounds},
        },
        overrides={"run.directory": str(directory)},
    )
    return directory / "nodes" / "client-00000"


def audit(ledger: Path, public_key: Path, statements: Path) -> dict:
    """The answer of ``fedslm audit ledger``."""
    command = [sys.executable, "-m", "fedslm", "audit", "ledger", str(ledger), "--json"]
    command += ["--public-key", str(public_key), "--statements", str(statements)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=False).stdout)


def main() -> None:
    """Audits a ledger, then a copy without its last lines, then one with another noise multiplier."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, default=Path("runs/auditor"))
    parser.add_argument("--rounds", type=int, default=4)
    given = parser.parse_args()

    run = given.directory / "run"
    node = make_run(run, given.rounds)
    key, statements = node / "ledger-key.pub.pem", run / "statements.jsonl"

    honest = audit(node, key, statements)
    print("honest:", honest["findings"] or "no findings")
    for spent in honest["spent"]:
        print("  spent:", spent)

    for name, forge in (("shortened", shortened), ("rewritten", rewritten)):
        copy = given.directory / name
        shutil.copytree(node, copy)
        path = copy / "ledger.jsonl"
        path.write_text(forge(path.read_text(encoding="utf-8")), encoding="utf-8")
        found = audit(copy, key, statements)["findings"]
        print(f"{name}: {found[0]}" if found else f"{name}: not found out")


def shortened(ledger: str) -> str:
    """A ledger that hides its last round: the last two lines are gone."""
    return "".join(ledger.splitlines(keepends=True)[:-2])


def rewritten(ledger: str) -> str:
    """A ledger that claims more noise than there was."""
    return ledger.replace('"noise_multiplier": ', '"noise_multiplier": 1', 1)


if __name__ == "__main__":
    main()
