"""What does secure aggregation cost?

Whole attempts without a network: all five legs at each node and at the server, with real signatures,
shares and files. The node's part is that of one node; the server's is everything from the cohort to the
sum, with no dropouts and with 10 % and 30 % of the nodes leaving after they sent their shares, which is
when a dropout costs most. The floor is NumPy's modular add of the same vectors in the same run. Times
are CPU seconds of this process, so that others on the machine count little; files are in memory, since
waiting for a disk is not counted.

With --large only the first node masks its vector, since 200 × 200 masks of 9.6 MB take minutes: the
server has the same work, and its sum is not checked.

    python benchmarks/secagg.py --large --dropouts 10

Linux only: the gauge of memory is in /proc, and files are in /dev/shm.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scenario import busy_cores, memory_bytes, print_table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fedslm.secagg.cohort import Cohort
    from fedslm.secagg.node import Node
    from fedslm.secagg.roster import Roster
    from fedslm.secagg.server import Server

SMALL, LARGE = ((10, 100_000), (50, 100_000)), ((200, 2_400_000),)
DROPOUTS = (0, 10, 30)
FLOOR_SECONDS = 0.2


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--large", action="store_true", help="200 nodes and 2.4 million values")
    parser.add_argument(
        "--dropouts", type=int, nargs="+", default=DROPOUTS, help="percent of nodes (default: 0 10 30)"
    )
    arguments = parser.parse_args()
    busy = busy_cores()
    found = [
        attempt(num_nodes, num_values, percent, is_checked=not arguments.large)
        for num_nodes, num_values in (LARGE if arguments.large else SMALL)
        for percent in arguments.dropouts
    ]
    report(found, busy)


@dataclass
class Costs:
    """CPU seconds of one side, and the most memory beyond what was there before, in bytes."""

    seconds: float = 0.0
    peak: int = 0
    uploaded: int = 0

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Adds the time of a block."""
        began = time.process_time()
        yield
        self.seconds += time.process_time() - began

    def remember_peak(self, work: Callable[[], Any]) -> Any:
        """Runs some work, and keeps the growth of resident memory that it caused."""
        Path("/proc/self/clear_refs").write_text("5")
        before = memory_bytes("self", "VmRSS")
        result = work()
        self.peak = max(self.peak, memory_bytes("self", "VmHWM") - before)
        return result


@dataclass
class Run:
    """One attempt."""

    nodes: list[Node]
    server: Server
    vectors: list[np.ndarray]
    left: int
    node: Costs = field(default_factory=Costs)
    at_server: Costs = field(default_factory=Costs)

    def ask(self, client: int, work: Callable[[], bytes]) -> bytes:
        """One node's reply; the first node's is counted."""
        if client:
            return work()
        with self.node.counted():
            reply = work()
        self.node.uploaded += len(reply)
        return reply

    def take(self, work: Callable[[], Any]) -> Any:
        """Work of the server."""
        with self.at_server.counted():
            return work()

    def leg(self, request: bytes, name: str, add: Callable[[int, bytes], None], clients: range) -> None:
        """A leg whose request is the same for all."""
        for client in clients:
            reply = self.ask(client, lambda c=client: getattr(self.nodes[c], name)(request))
            self.take(lambda c=client, r=reply: add(c, r))

    def inputs(self, *, is_checked: bool) -> None:
        """The third leg: the first node masks its vector, and the others if the sum is checked."""
        requests = self.take(self.server.input_requests)
        for client in range(self.left):
            vector = self.vectors[client % len(self.vectors)].copy()
            if client == 0:
                work = partial(self.masked, 0, requests[0], vector)
                head = self.ask(0, partial(self.node.remember_peak, work))
            else:
                with nullcontext() if is_checked else without_masks():
                    head = self.masked(client, requests[client], vector)
            (self.nodes[client].kept.path / "input.u32").unlink()  # files are in memory
            self.take(lambda c=client, h=head, v=vector: self.server.add_input(c, h, v))
        self.node.uploaded += vector.nbytes

    def masked(self, client: int, request: bytes, vector: np.ndarray) -> bytes:
        """One node's reply to the third leg; the vector is masked in place."""
        return self.nodes[client].masked_input(request, lambda _: vector).head


@contextmanager
def without_masks() -> Iterator[None]:
    """Nodes leave their vectors as they are."""
    from fedslm.secagg import node

    add_masks = node.add_masks
    node.add_masks = lambda *_: None
    try:
        yield
    finally:
        node.add_masks = add_masks


def attempt(num_nodes: int, num_values: int, percent: int, *, is_checked: bool) -> dict[str, float]:
    """Runs one attempt, and returns its ratios."""
    generator = np.random.default_rng(0)
    kept = num_nodes if is_checked else 4
    vectors = [generator.integers(0, 1 << 32, num_values, np.uint32) for _ in range(kept)]
    floor = seconds_of_add(vectors[0])
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        nodes, roster, cohort = federation(Path(directory), num_nodes, num_values)
        left = num_nodes - num_nodes * percent // 100
        from fedslm.secagg.server import Server

        run = Run(nodes, Server(cohort, roster), vectors, left)
        run.leg(run.server.keys_request(), "keys", run.server.add_keys, range(num_nodes))
        run.leg(run.take(run.server.shares_request), "shares", run.server.add_shares, range(num_nodes))
        run.inputs(is_checked=is_checked)
        survivors = range(left)
        run.leg(
            run.take(run.server.survivors_request), "survivors", run.server.add_signature, survivors
        )
        run.leg(run.take(run.server.unmask_request), "unmask", run.server.add_unmask, survivors)
        outcome = run.take(lambda: run.at_server.remember_peak(run.server.finish))
    if is_checked:
        assert (outcome.sum == np.sum(vectors[:left], axis=0, dtype=np.uint32)).all()
    return {
        "nodes": num_nodes,
        "values": num_values,
        "dropouts": percent,
        "node_over_add": run.node.seconds / floor,
        "node_seconds": run.node.seconds,
        "upload_over_vector": run.node.uploaded / vectors[0].nbytes,
        "node_memory_over_vector": run.node.peak / vectors[0].nbytes,
        "server_over_adds": run.at_server.seconds / (floor * left),
        "server_seconds": run.at_server.seconds,
        "unmask_memory_over_vector": run.at_server.peak / vectors[0].nbytes,
    }


def federation(directory: Path, num_nodes: int, num_values: int) -> tuple[list[Node], Roster, Cohort]:
    """Nodes with directories of their own, their roster, and a cohort of all."""
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from fedslm.privacy.keys import public_hex
    from fedslm.secagg.cohort import Cohort, Requirements, threshold_for
    from fedslm.secagg.kept import Kept
    from fedslm.secagg.node import Node
    from fedslm.secagg.roster import Member, signed_roster, verified

    authority = ec.generate_private_key(ec.SECP384R1())
    keys = [Ed25519PrivateKey.generate() for _ in range(num_nodes)]
    members = [Member(i, f"node {i}", public_hex(key.public_key())) for i, key in enumerate(keys)]
    roster = verified(signed_roster(authority, "benchmark", 1, members), authority.public_key())
    threshold = threshold_for(num_nodes, 0)
    cohort = Cohort("run", 1, 1, tuple(range(num_nodes)), threshold, 0, num_values, roster.sha256)
    nodes = [
        Node(key, roster, Requirements(0, 2), Kept(directory / str(i), "run", "benchmark"))
        for i, key in enumerate(keys)
    ]
    return nodes, roster, cohort


def seconds_of_add(vector: np.ndarray) -> float:
    """CPU seconds of NumPy's add of one vector to a sum, in place."""
    total, count, began = vector.copy(), 0, time.process_time()
    while (spent := time.process_time() - began) < FLOOR_SECONDS or count == 0:
        np.add(total, vector, out=total)
        count += 1
    return spent / count


def report(found: list[dict[str, float]], busy: float) -> None:
    """Prints the table, and everything as one JSON line."""
    rows = [
        [
            f"{row['nodes']:.0f} × {row['values']:,.0f}, {row['dropouts']:.0f} %",
            f"{row['node_seconds']:.2f}",
            f"{row['node_over_add']:,.0f}",
            f"{row['upload_over_vector']:.3f}",
            f"{row['node_memory_over_vector']:.2f}",
            f"{row['server_seconds']:.2f}",
            f"{row['server_over_adds']:,.0f}",
            f"{row['unmask_memory_over_vector']:.2f}",
        ]
        for row in found
    ]
    header = ["nodes × values, dropouts", "node CPU s", "in adds", "upload, vectors", "memory, vectors"]
    print_table([*header, "server CPU s", "in adds of all", "unmask memory, vectors"], rows)
    rounded = [{key: round(value, 4) for key, value in row.items()} for row in found]
    print(json.dumps({"benchmark": "secagg", "busy_cores": round(busy, 1), "attempts": rounded}))


if __name__ == "__main__":
    main()
