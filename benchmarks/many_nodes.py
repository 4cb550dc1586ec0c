"""What does a server do in each round of a federation of many nodes, and does it grow?

The server is a real one (``fedslm server up`` and ``server run``: SuperLink, guard, proxy, database).
The nodes are light ones: admitted, connected, signing and charging as real nodes do, in a few
processes, but without a model (``light_nodes.py``). So a round is overhead only. Each node is charged
for each round, and asks the server every ``--poll`` seconds while it has nothing to do.

The table shows the first, the middle and the last fifth of the rounds, without the first round (the
nodes fetch the run's bundle) and the last one (the server evaluates). CPU is processor time for each
node and round. On a machine whose cores are all busy, the wall time is that of the nodes as well: count
CPU. A real node asks every second by default, which is 200 requests a second from 200 nodes.

    python benchmarks/many_nodes.py --nodes 200 --rounds 4      # the default
    python benchmarks/many_nodes.py --nodes 200 --rounds 200    # all of it: hours
    python benchmarks/many_nodes.py --nodes 3 --rounds 200      # growth over the rounds, in ten minutes
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import federation
import scenario
from server_load import LAUNCHER, NODES, PROXY, RUN, SUPERLINK, Sample, Watched

_ROUNDS = 200  # of a long run
_NODES_IN_PROCESS = 40  # so the lines of their ledgers fit into the cache that verified them
_GLANCE_SECONDS, _CONNECT_SECONDS, _ROUND_SECONDS = 0.02, 300.0, 600.0
_SCRIPT = Path(__file__).with_name("light_nodes.py")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, default=200, help="admitted nodes (default: 200)")
    parser.add_argument("--rounds", type=int, default=4, help="rounds of the run (default: 4)")
    parser.add_argument("--idle", type=float, default=20.0, help="seconds to watch idle nodes first")
    parser.add_argument("--poll", type=float, default=5.0, help="poll_seconds of a node (default: 5)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the directories and logs here")
    arguments = parser.parse_args()
    assert arguments.rounds >= 3, "the first and the last round are left out: 3 rounds at least"
    busy = scenario.busy_cores()
    with tempfile.TemporaryDirectory() as temporary:
        root = (arguments.keep or Path(temporary)).absolute()
        root.mkdir(parents=True, exist_ok=True)
        with federation.Processes(root, federation.FLOWER).stopped() as processes:
            watched, idle = connected(processes, root, arguments)
            samples = run(processes, watched, nodes=arguments.nodes, rounds=arguments.rounds)
    report(samples, idle, nodes=arguments.nodes, busy=busy)


def connected(
    processes: federation.Processes, root: Path, options: argparse.Namespace
) -> tuple[Watched, list[Sample]]:
    """Starts a server, admits and starts the nodes, and watches them with nothing to do.

    Returns:
        What to watch, and samples: before any node connected, and at both ends of the idle time.
    """
    server = root / "server"
    server.mkdir()
    (server / "federation.toml").write_text(
        f'name = "bench"\nhost = "127.0.0.1"\nport = {federation.free_port()}\n'
        f"inner_port = {federation.free_port()}\n"
    )
    processes.output("fedslm", "provision", "init", server / "federation.toml")
    up = processes.start("server", "fedslm", "server", "up", server)
    federation.wait_until(lambda: "the server is up" in processes.log("server").read_text(), up)
    directories = admitted(server, root / "nodes", options.nodes)
    before = Watched(up.pid, server, server / "runs" / "bench", (), ()).sample()
    started, files = [], []
    for first in range(0, options.nodes, _NODES_IN_PROCESS):
        part = directories[first : first + _NODES_IN_PROCESS]
        files.append(root / f"calls-{first}.json")
        command = ("python", _SCRIPT, files[-1], str(options.poll), *part)
        started.append(processes.start(f"nodes-{first}", *command))
    pids = tuple(process.pid for process in started)
    watched = Watched(up.pid, server, server / "runs" / "bench", pids, tuple(files))
    deadline = time.monotonic() + _CONNECT_SECONDS
    while (found := watched.all_calls().get("connected", 0)) < options.nodes:
        assert all(process.poll() is None for process in started), "light nodes ended: see their logs"
        assert time.monotonic() < deadline, f"{found} of {options.nodes} nodes connected"
        time.sleep(0.2)
    time.sleep(6 * options.poll + 2)  # an idle node asks less and less often, up to its period
    begun = watched.sample()
    time.sleep(options.idle)
    return watched, [before, begun, watched.sample()]


def admitted(server: Path, parent: Path, nodes: int) -> list[Path]:
    """Enrols and admits nodes; gives their directories."""
    from fedslm.deployment import admission, control, enrolment

    directories = []
    with control.connected(server) as connection:
        for index in range(nodes):
            directory = parent / f"node-{index:03d}"
            directory.mkdir(parents=True)
            request = enrolment.enroll(directory, directory.name)
            _, told = admission.admit(server, request, connection.register)
            admission.accept(directory, told)
            directories.append(directory)
    return directories


def run(processes: federation.Processes, watched: Watched, *, nodes: int, rounds: int) -> list[Sample]:
    """Runs a private federation; gives a sample after each round."""
    config = watched.server / "bench.toml"
    config.write_text(scenario.to_toml(config_of(watched.run, nodes, rounds)))
    command = ("fedslm", "server", "run", config, "--server", watched.server)
    process = processes.start("run", *command)
    samples, shown = [], {last for _, last in windows_of(rounds).values()}
    for record in records_of(watched.run / "rounds.jsonl", process):
        assert record["completed"] == nodes, record["reasons"][:3]
        samples.append(watched.sample(record["round"], with_rows=record["round"] in shown))
        if record["round"] == rounds:
            break
    assert process.wait(federation.START_SECONDS) == 0, processes.log("run").read_text()
    return samples


def records_of(path: Path, process: subprocess.Popen[bytes]) -> Iterator[dict[str, Any]]:
    """The lines of a growing file, as soon as each is there."""
    seen, deadline = 0, time.monotonic() + _ROUND_SECONDS
    while True:
        text = path.read_bytes()[seen:] if path.exists() else b""
        whole = text[: text.rfind(b"\n") + 1]
        for line in whole.splitlines():
            yield json.loads(line)
            deadline = time.monotonic() + _ROUND_SECONDS
        seen += len(whole)
        assert time.monotonic() < deadline, f"no round in {_ROUND_SECONDS:g} s"
        assert process.poll() in (None, 0), f"{process.args!r} failed"
        time.sleep(_GLANCE_SECONDS)


def config_of(run: Path, nodes: int, rounds: int) -> dict[str, dict[str, Any]]:
    """A private run of the embedded base; only its last round evaluates."""
    return {
        "run": {"name": "bench", "directory": str(run)},
        "model": {"base": "demo", "device": "cpu"},
        "lora": {"rank": federation.RANK, "alpha": float(federation.RANK)},
        "data": {"source": "demo", "max_evaluation_records": 2},
        "task": {"name": "classification", "pooling": "mean", "max_length": 96},
        "training": {"local_steps": 1, "batch_size": 1},
        "privacy": {
            "unit": "record",
            "epsilon": 8.0,
            "delta": 1e-5,
            "clip_norm": 1.0,
            "sample_rate": 0.1,
        },
        "federation": {
            "num_clients": nodes,
            "rounds": rounds,
            "evaluate_every": rounds + 1,
            "round_deadline_seconds": _ROUND_SECONDS,
        },
    }


def windows_of(rounds: int) -> dict[str, tuple[int, int]]:
    """First and last round of the early, middle and late fifth, without the run's first and last."""
    width = max(1, (rounds - 2) // 5)
    middle = (rounds - width) // 2 + 1
    return {
        "early": (2, 1 + width),
        "middle": (middle, middle + width - 1),
        "late": (rounds - width, rounds - 1),
    }


def figures_of(samples: list[Sample], first: int, last: int, nodes: int) -> dict[str, float]:
    """What some rounds took, for each node and round, and what there was after them."""
    window = samples[first - 2 : last]  # from the end of the round before; samples[0] is of round 1
    begun, ended = window[0], window[-1]
    node_rounds = nodes * (last - first + 1)
    seconds = [after.at - before.at for before, after in pairwise(window)]
    found = {"a round, wall s": statistics.median(seconds)}
    for name in (SUPERLINK, RUN, PROXY, LAUNCHER, NODES):
        used = ended.cpu[name] - begun.cpu[name]
        found[f"{name}, CPU ms"] = 1000 * used / node_rounds
    for name in ("receive", "pull_object", "push_object"):
        found[f"{name} calls"] = (ended.calls[name] - begun.calls[name]) / node_rounds
    for name in (SUPERLINK, RUN, PROXY):
        found[f"{name}, MB"] = ended.memory[name] / 1e6
    for name, size in ended.files.items():
        found[f"{name}, MB"] = size / 1e6
    found["database, rows"] = sum(ended.rows.values())
    return found


def idle_of(samples: list[Sample], nodes: int) -> dict[str, float]:
    """What connected nodes cost that have nothing to do."""
    before, begun, ended = samples
    polls = ended.calls["receive"] - begun.calls["receive"]
    seconds = ended.at - begun.at
    used = {name: ended.cpu[name] - begun.cpu[name] for name in (SUPERLINK, PROXY)}
    kept = {name: ended.memory[name] - before.memory[name] for name in (SUPERLINK, PROXY)}
    return {
        "polls a second": polls / seconds,
        "SuperLink, CPU ms a poll": 1000 * used[SUPERLINK] / polls,
        "proxy, CPU ms a poll": 1000 * used[PROXY] / polls,
        "SuperLink, cores": used[SUPERLINK] / seconds,
        "SuperLink, MB before": before.memory[SUPERLINK] / 1e6,
        "SuperLink, KB a connected node": kept[SUPERLINK] / nodes / 1e3,
        "proxy, KB a connected node": kept[PROXY] / nodes / 1e3,
    }


def report(samples: list[Sample], idle: list[Sample], *, nodes: int, busy: float) -> None:
    """Prints the tables, and everything as one JSON line."""
    rounds = samples[-1].round
    windows = windows_of(rounds)
    found = {name: figures_of(samples, *each, nodes) for name, each in windows.items()}
    resting = idle_of(idle, nodes)
    if busy > 0.3:
        print(f"the machine was not quiet ({busy:.1f} cores busy): wall times count roughly")
    scenario.print_table(
        [f"{nodes} idle nodes", ""], [[name, f"{value:.3g}"] for name, value in resting.items()]
    )
    print()
    header = [f"{nodes} nodes, {rounds} rounds"]
    header += [f"{name}, {first}–{last}" for name, (first, last) in windows.items()]
    rows = [[name, *(f"{found[each][name]:.4g}" for each in windows)] for name in found["early"]]
    scenario.print_table([*header, "late/early"], [[*row, _ratio(found, row[0])] for row in rows])
    spends = samples[-1].files["spends.json"] / nodes
    statements = [sample.files["statements.jsonl"] for sample in (samples[0], samples[-1])]
    grown = (statements[1] - statements[0]) / (nodes * (rounds - 1))
    if rounds < _ROUNDS:
        print(f"{rounds} rounds: what grows slowly shows only in more, up to {_ROUNDS}")
    print(f"spends.json: {spends:.0f} bytes a node; statements.jsonl: {grown:.0f} a node and round")
    wanted = [f"{name}, CPU ms" for name in (SUPERLINK, RUN, PROXY)]
    wanted += [f"{name}, MB" for name in (SUPERLINK, RUN, PROXY, "database")]
    values = {
        "benchmark": "many_nodes",
        "nodes": nodes,
        "rounds": rounds,
        "busy_cores": round(busy, 2),
        "ratios": {name: float(_ratio(found, name)) for name in wanted if found["early"][name]},
        "idle": {name: round(value, 4) for name, value in resting.items()},
        **{name: {key: round(value, 4) for key, value in each.items()} for name, each in found.items()},
        "spends_bytes_per_node": round(spends),
        "statements_bytes_per_node_round": round(grown),
        "tables": {name: samples[first - 1].rows for name, (_, first) in windows.items()},
    }
    print(json.dumps(values))


def _ratio(found: dict[str, dict[str, float]], name: str) -> str:
    """The late value relative to the early one."""
    early, late = found["early"][name], found["late"][name]
    return f"{late / early:.2f}" if early else "–"


if __name__ == "__main__":
    main()
