"""What does a long run cost the server's books: accounting, statements, checkpoints?

100 clients take part in each of 200 rounds. Four of them charge a real ledger; each client signs a
statement with its own key, of one of these ledgers, since all have spent the same. The server computes
epsilon, and writes its line, the statements and its checkpoint, by the code of a run. Nothing is
trained. The server's files are those that it keeps; ledgers are stored at the nodes.

    python benchmarks/history.py
    python benchmarks/history.py --clients 20 --rounds 50

Each round has more steps than the one before, so no epsilon is known from before.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import scenario
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedslm.aggregation.server import ServerState
from fedslm.config import Config, from_mapping
from fedslm.federation import rounds as round_loop
from fedslm.federation.checkpoint import Checkpoint, RunDirectory
from fedslm.privacy import accounting
from fedslm.privacy.chain import Chain
from fedslm.privacy.ledger import Ledger
from fedslm.privacy.limits import Limits
from fedslm.privacy.lines import Charge
from fedslm.privacy.statement import Statement, signed
from fedslm.records import AdapterState, Event, RoundRecord

SECONDS_GOAL, BYTES_GOAL = 0.050, 20e6
EPSILON, DELTA, STEPS = 8.0, 1e-5, 4
_HASH = "0" * 64
_LEDGERS = 4


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=100, help="clients of a round (default: 100)")
    parser.add_argument("--rounds", type=int, default=200, help="rounds (default: 200)")
    arguments = parser.parse_args()
    busy = scenario.busy_cores()
    with tempfile.TemporaryDirectory() as directory:
        report(measure(Path(directory), arguments), arguments, busy)


@dataclass
class Found:
    """What was measured, by round."""

    accounting: list[float] = field(default_factory=list)
    saving: list[float] = field(default_factory=list)
    server_bytes: list[int] = field(default_factory=list)
    ledger_bytes: list[int] = field(default_factory=list)


def measure(directory: Path, arguments: argparse.Namespace) -> Found:
    """Runs all rounds."""
    config = a_config(directory, arguments)
    run = RunDirectory.create(directory / "run", config)
    members = [Member(directory / "nodes" / str(n), run, config) for n in range(_LEDGERS)]
    keys = [Ed25519PrivateKey.generate() for _ in range(arguments.clients)]
    state = Checkpoint(0, ServerState(AdapterState({"a": np.zeros(8, np.float32)})), {}, {})
    found = Found()
    statements: dict[int, Statement] = {}
    for number in range(1, arguments.rounds + 1):
        chains = [member.take_part(number) for member in members]
        for client, key in enumerate(keys):
            chain, what = chains[client % _LEDGERS], {"run": run.run_id, "round": number}
            statements[client] = signed(key, chain, release_sha256=f"{number:064x}", **what)
        accounting._pld.cache_clear()  # the clients, in this process too, have computed it
        began = time.process_time()
        epsilon = round_loop._network_epsilon(config, statements)
        epsilons = round_loop._epsilons(config, statements)
        found.accounting.append(time.process_time() - began)
        began = time.process_time()
        record = a_record(number, arguments.clients, epsilon)
        state = state.after(record, statements=dict(statements), epsilons=epsilons)
        run.save(state, record)
        found.saving.append(time.process_time() - began)
        found.server_bytes.append(size(run.path))
        found.ledger_bytes.append(size(directory / "nodes") // _LEDGERS)
    return found


class Member:
    """A client with a ledger; it charges as a private client does, and trains nothing."""

    def __init__(self, directory: Path, run: RunDirectory, config: Config) -> None:
        directory.mkdir(parents=True)
        self._ledger = Ledger(directory / "ledger.jsonl", Ed25519PrivateKey.generate())
        self._run, self._config = run, config

    def take_part(self, number: int) -> Chain:
        """Charges a round and returns the ledger's content."""
        privacy = self._config.privacy
        charge = Charge(
            event=Event(
                float(privacy.sample_rate or 1.0), float(privacy.noise_multiplier or 1.0), STEPS
            ),
            purpose="adapter",
            clip_norm=1.0,
            delta=DELTA,
            run=self._run.run_id,
            round=number,
            plan_sha256=_HASH,
            request_sha256=f"{number:064x}",
            base_sha256=_HASH,
            config_sha256=_HASH,
            code_version="0",
            dataset_commitment=_HASH,
            unit="record",
            normaliser=32,
        )
        limits = Limits(run=(1e6, DELTA))
        (reserved,) = self._ledger.reserve([charge], limits)
        self._ledger.commit(reserved, f"{number:064x}")
        return self._ledger.read()


def a_config(directory: Path, arguments: argparse.Namespace) -> Config:
    """The run's config."""
    return from_mapping(
        {
            "run": {"name": "history", "directory": str(directory / "run")},
            "model": {"base": "demo"},
            "data": {"source": "demo"},
            "task": {"name": "classification"},
            "training": {"local_steps": STEPS},
            "privacy": {
                "unit": "record",
                "noise_multiplier": 1.0,
                "delta": DELTA,
                "clip_norm": 1.0,
                "sample_rate": 0.02,
            },
            "federation": {"num_clients": arguments.clients, "rounds": arguments.rounds},
        }
    )


def a_record(number: int, clients: int, epsilon: float) -> RoundRecord:
    """A round in which everyone answered."""
    return RoundRecord(
        round=number,
        cohort=clients,
        completed=clients,
        failed=0,
        late=0,
        refused=0,
        kept=False,
        epsilon=epsilon,
        metrics={"loss": 1.0},
        signal_to_noise=1.0,
        bytes_down=0,
        bytes_up=0,
        seconds=1.0,
    )


def size(directory: Path) -> int:
    """Bytes of all files below a directory."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def report(found: Found, arguments: argparse.Namespace, busy: float) -> None:
    """The table, with goals, and everything as one JSON line."""
    rows, last = [], arguments.rounds
    for number in sorted({1, max(1, last // 4), max(1, last // 2), last}):
        near = slice(max(0, number - 5), number)
        rows.append(
            [
                str(number),
                f"{1e3 * statistics.median(found.accounting[near]):.0f}",
                f"{1e3 * statistics.median(found.saving[near]):.0f}",
                f"{found.server_bytes[number - 1] / 1e6:.2f}",
                f"{found.ledger_bytes[number - 1] / 1e3:.0f}",
            ]
        )
    header = ["round", "accounting, CPU ms", "files, CPU ms", "server's files, MB", "one ledger, kB"]
    scenario.print_table(header, rows)
    half = found.server_bytes[last // 2 - 1] if last > 1 else 0
    ratios = {
        "accounting ms": round(1e3 * statistics.median(found.accounting[-5:]), 1),
        "server MB": round(found.server_bytes[-1] / 1e6, 2),
        "growth": round(found.server_bytes[-1] / max(1, half), 3),
    }
    print(f"goals: accounting ≤ {1e3 * SECONDS_GOAL:g} ms, server's files ≤ {BYTES_GOAL / 1e6:g} MB")
    print(json.dumps({"benchmark": "history", "busy_cores": busy, "ratios": ratios}))


if __name__ == "__main__":
    main()
