"""What do `fedslm server status` and a scrape of the metrics cost, and how large is a statement?

A server's directory is made with the real classes: nodes with keys, chains and signed statements, and a
run that is recorded as a server records it. A tenth of the nodes is away in each round, so that nodes
have charged differently, and each round has a reason for each node. Statements are signed in the last
rounds alone. Figures are CPU seconds in a process of its own: the first answer, with what it imports
while it answers, and a further one, as a server that is scraped again gives it.

    python benchmarks/status.py --nodes 200 --rounds 200
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import scenario
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedslm import config as configuration
from fedslm.aggregation.server import ServerState
from fedslm.deployment.admission import NODES
from fedslm.federation.checkpoint import Checkpoint, RunDirectory
from fedslm.privacy import accounting
from fedslm.privacy.chain import Chain
from fedslm.privacy.keys import public_hex
from fedslm.privacy.lines import ADAPTER, ADJACENCY, Charge, Entry, Opening
from fedslm.privacy.statement import Statement, signed
from fedslm.records import AdapterState, Event, RoundRecord

_SIGNED_ROUNDS = 10
GOAL_SECONDS, GOAL_BYTES = 1.0, 2048
EVENT = Event(0.05, 1.1, 10)
CONFIG = {
    "run": {"name": "bench"},
    "model": {"base": "demo"},
    "data": {"source": "demo"},
    "task": {"name": "classification"},
    "privacy": {
        "unit": "record",
        "epsilon": 50.0,
        "delta": 1e-5,
        "clip_norm": 1.0,
        "sample_rate": EVENT.sample_rate,
    },
}
MEASURED = """
import json, sys, time
from pathlib import Path
before = time.process_time()
from fedslm.deployment.metrics import of_status
from fedslm.deployment.status import status_of
imported = time.process_time()
found = []
for _ in range(2):
    began = time.process_time()
    status = status_of(Path(sys.argv[1]), [])
    told = time.process_time()
    figures = list(of_status(status))
    found.append((told - began, time.process_time() - began))
assert len(status.nodes) == int(sys.argv[2]) and figures
assert all(node.epsilon_spent > 0 for node in status.nodes)
print(json.dumps({"imports": imported - before, "status": found[0][0], "scrape": found[0][1],
                  "again": found[1][1]}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, default=200, help="admitted nodes (default: 200)")
    parser.add_argument("--rounds", type=int, default=200, help="rounds of the run (default: 200)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        server = Path(temporary)
        began = time.process_time()
        longest = make(server, arguments.nodes, arguments.rounds)
        made = time.process_time() - began
        command = [sys.executable, "-c", MEASURED, str(server), str(arguments.nodes)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        files = {path.name: path.stat().st_size for path in server.rglob("*.json*")}
    found = json.loads(done.stdout)
    rows = [
        ["status (without imports), CPU s", f"{found['status']:.2f}", f"≤ {GOAL_SECONDS:g}"],
        ["first scrape, CPU s", f"{found['scrape']:.2f}", f"≤ {GOAL_SECONDS:g}"],
        ["further scrape, CPU s", f"{found['again']:.2f}", f"≤ {GOAL_SECONDS:g}"],
        ["imports, CPU s", f"{found['imports']:.2f}", "–"],
        ["largest statement, bytes", str(longest), f"≤ {GOAL_BYTES}"],
        ["rounds.jsonl, MB", f"{files['rounds.jsonl'] / 1e6:.1f}", "–"],
        ["state.json, MB", f"{files['state.json'] / 1e6:.1f}", "–"],
    ]
    scenario.print_table(["", "found", "goal"], rows)
    values = {name: round(value, 3) for name, value in found.items()}
    print(
        json.dumps(
            {
                "benchmark": "status",
                "nodes": arguments.nodes,
                "rounds": arguments.rounds,
                "statement_bytes": longest,
                "making_cpu_seconds": round(made, 1),
                **values,
            }
        )
    )


class Node:
    """A node's key and chain."""

    def __init__(self, number: int) -> None:
        self.key = Ed25519PrivateKey.from_private_bytes(number.to_bytes(32, "big"))
        self.hex = public_hex(self.key.public_key())
        opening = Opening(f"{number:032x}", "d" * 64, "record", ADJACENCY, self.hex)
        self.entries = [Entry(0, "", 0, opening=opening)]

    def charge(self, run: str, number: int) -> None:
        """Charges one round."""
        charge = Charge(EVENT, ADAPTER, 1.0, 1e-5, run, number, "p", "q", "b", "c", "0.1.0", "d")
        self.entries.append(Entry(len(self.entries), "", 0, charge=charge))

    def statement(self, run: str, number: int) -> Statement:
        """States what was charged so far."""
        sha256 = f"{number:064x}"
        chain = Chain(tuple(self.entries), sha256, torn=False)
        return signed(self.key, chain, run=run, round=number, release_sha256=sha256)


def make(server: Path, num_nodes: int, num_rounds: int) -> int:
    """Writes a server's directory; gives the size of its largest statement."""
    federation = {"num_clients": num_nodes, "rounds": num_rounds + 1}
    config = configuration.from_mapping({**CONFIG, "federation": federation}).resolved()
    nodes = [Node(number + 1) for number in range(num_nodes)]
    write_nodes(server, nodes)
    directory = RunDirectory.create(server / "runs" / "bench", config)
    moving = AdapterState({"weight": np.zeros(4, np.float32)})
    state = Checkpoint(0, ServerState(moving), {"accuracy": 0.5}, {"accuracy": 0.5})
    directory.save(state)
    away = random.Random(0)
    longest, statements = 0, dict(state.statements)
    for number in range(1, num_rounds + 1):
        absent = set(away.sample(range(num_nodes), num_nodes // 10))
        for client, node in enumerate(nodes):
            if client not in absent:
                node.charge(directory.run_id, number)
                if number > num_rounds - _SIGNED_ROUNDS:
                    statements[client] = node.statement(directory.run_id, number)
        record = record_of(number, num_nodes, absent)
        epsilons = epsilons_of(statements) if number == num_rounds else {}
        changes = {"statements": dict(statements), "epsilons": epsilons}
        state = state.after(record, server=ServerState(moving), **changes)
        directory.save(state, record)
        if number == num_rounds:
            longest = max(len(statement.to_json()) for statement in statements.values())
    return longest


def epsilons_of(statements: dict[int, Statement]) -> dict[int, float]:
    """What the round loop keeps beside the statements."""
    return {client: accounting.epsilon(each.events, 1e-5) for client, each in statements.items()}


def record_of(number: int, num_nodes: int, absent: set[int]) -> RoundRecord:
    """A round's line, with a reason for each node: what a bad day writes."""
    record = RoundRecord(
        number, num_nodes, num_nodes - len(absent), 0, len(absent), 0, False, 1.0, {}, None, 0, 0, 1.0
    )
    reasons = [
        f"client {client}: late, as on every other day of this week" for client in range(num_nodes)
    ]
    return replace(record, metrics={"accuracy": 0.5}, reasons=tuple(reasons))


def write_nodes(server: Path, nodes: list[Node]) -> None:
    """The list of admitted nodes."""
    listed = [
        {
            "name": f"n{client}",
            "node_id": 70 + client,
            "node_key": "k",
            "ledger_key": node.hex,
            "admitted_at": "now",
            "revoked": False,
        }
        for client, node in enumerate(nodes)
    ]
    (server / NODES).write_text(json.dumps({"nodes": listed}))


if __name__ == "__main__":
    main()
