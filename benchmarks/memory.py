"""Does memory stay flat, at the server in clients and in a worker in rounds?

The server (the process that runs the round loop) is measured with 10, 100 and 1,000 clients in a
round. A worker with a base model of about 50 M parameters is measured after one client and after many;
what it holds at the end, against that of a worker with a tiny base, tells how often the base is in it.
Linux only: the gauges are in /proc.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import scenario
from scenario import LARGE, SMALL

from fedslm import Observer

if TYPE_CHECKING:
    from fedslm.records import RoundRecord

POPULATIONS = (10, 100, 1000)
FLAT_GOAL, COPIES_GOAL = 1.1, 1.5
_MEGABYTE = 1e6
_BYTES_PER_PARAMETER = 4


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=80, help="clients of a worker (default: 80)")
    parser.add_argument("--simulate", type=Path, metavar="CONFIG", help="gauge one run; internal")
    arguments = parser.parse_args()
    if arguments.simulate:
        gauge_simulation(arguments.simulate)
        return
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        small, large = directory / "small", directory / "large"
        sizes = [scenario.write_model(small, SMALL), scenario.write_model(large, LARGE)]
        servers = [measure_server(directory, small, population) for population in POPULATIONS]
        workers = [measure_worker(directory, base, arguments.clients) for base in (small, large)]
    report(servers, workers, sizes, arguments.clients)


class Gauge(Observer):
    """An observer that reads its own memory and that of the workers after every round."""

    def __init__(self) -> None:
        self.rounds: list[dict[str, int]] = []

    def on_round(self, record: RoundRecord) -> None:
        """Reads the gauges; a client that failed would have used none."""
        assert record.completed == record.cohort, record.reasons
        below = list(scenario.descendants("self"))
        self.rounds.append(
            {
                "server_peak": scenario.memory_bytes("self", "VmHWM"),
                "worker_peak": max(scenario.memory_bytes(process, "VmHWM") for process in below),
                "worker_now": max(scenario.memory_bytes(p, "VmRSS") for p in below),
            }
        )


def gauge_simulation(path: Path) -> None:
    """Runs a config as ``fedslm simulate`` does and prints the first and the last reading."""
    from fedslm.workers import preload

    preload()
    import fedslm

    gauge = Gauge()
    fedslm.simulate(path, observers=[gauge])
    last = gauge.rounds[-1]
    last["server_peak"] = scenario.memory_bytes("self", "VmHWM")  # the report is written by now
    print(json.dumps({"first": gauge.rounds[0], "last": last}))


def measure_server(directory: Path, model: Path, population: int) -> dict[str, Any]:
    """One round of a whole population, in a process of its own."""
    federation = {"num_clients": population, "rounds": 1, "evaluate_every": 2}
    return _measure(directory / f"server-{population}", model, population, federation, workers=2)


def measure_worker(directory: Path, model: Path, clients: int) -> dict[str, Any]:
    """One worker that works for one client in each round, another one in most of them."""
    federation = {
        "num_clients": clients,
        "clients_per_round": 1,
        "rounds": clients,
        "evaluate_every": clients + 1,
    }
    return _measure(directory / f"worker-{model.name}", model, clients, federation, workers=1)


def _measure(
    directory: Path, model: Path, clients: int, federation: dict[str, int], *, workers: int
) -> dict[str, Any]:
    """Writes texts and config, and runs them."""
    scenario.write_texts(directory / "texts", num_train=2 * clients)
    values = scenario.config(
        model,
        directory / "texts",
        directory / "run",
        training={"local_steps": 1, "batch_size": 1},
        federation=federation,
        engine={"workers": workers},
    )
    path = directory / "config.toml"
    path.write_text(scenario.to_toml(values))
    return scenario.measured([__file__, "--simulate", path])[0]


def report(
    servers: list[dict[str, Any]], workers: list[dict[str, Any]], sizes: list[int], clients: int
) -> None:
    """Prints the table, and everything as one JSON line."""
    peaks = [server["last"]["server_peak"] for server in servers]
    rows = [
        [f"server, {population} clients", _megabytes(peak), f"{peak / peaks[0]:.3f}", f"≤ {FLAT_GOAL}"]
        for population, peak in zip(POPULATIONS, peaks, strict=True)
    ]
    small, large = workers
    first, last = large["first"]["worker_peak"], large["last"]["worker_peak"]
    rows += [
        ["worker, 50M base, 1 client", _megabytes(first), "1.000", "–"],
        [
            f"worker, 50M base, {clients} rounds",
            _megabytes(last),
            f"{last / first:.3f}",
            f"≤ {FLAT_GOAL}",
        ],
    ]
    more = large["last"]["worker_now"] - small["last"]["worker_now"]
    copies = more / (_BYTES_PER_PARAMETER * (sizes[1] - sizes[0]))
    rows.append(
        [
            "worker, 50M base, over a tiny base",
            _megabytes(more),
            f"{copies:.3f} copies",
            f"≤ {COPIES_GOAL}",
        ]
    )
    scenario.print_table(["", "MB", "ratio", "goal"], rows)
    values = {
        "benchmark": "memory",
        "goals": [FLAT_GOAL, COPIES_GOAL],
        "populations": POPULATIONS,
        "server_peak_bytes": peaks,
        "server_ratios": [round(peak / peaks[0], 3) for peak in peaks],
        "worker_peak_bytes": [first, last],
        "worker_ratio": round(last / first, 3),
        "base_copies": round(copies, 3),
        "num_parameters": sizes,
    }
    print(json.dumps(values))


def _megabytes(num_bytes: float) -> str:
    """Whole megabytes."""
    return f"{num_bytes / _MEGABYTE:.0f}"


if __name__ == "__main__":
    main()
