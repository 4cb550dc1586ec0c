"""Does the server stay small and quick, however many clients send how large an adapter?

A round of linear aggregation (`fedslm.aggregation.server.Round`: norm bound, streaming mean, server
optimizer) takes updates one at a time, as the round loop does. Its peak memory is counted in adapters
beyond what the process had before, and its speed against a plain NumPy in-place add of the same
arrays. Flower's own FedAvg gets the same updates as it gets them: all replies of the round at once.
Each measurement has a process of its own; updates are made outside the timed parts.

    python benchmarks/aggregation.py --clients 1000 --parameters 4000000

Linux only: the gauge is in /proc.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
from scenario import busy_cores, memory_bytes

from fedslm.records import AdapterState, FloatArray

WIDTH, RANK = 512, 8
MEMORY_GOAL, SPEED_GOAL = 3.0, 0.7
KINDS = ("numpy", "fedslm", "flower")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=1000, help="clients of a round (default: 1000)")
    parser.add_argument(
        "--flower-clients", type=int, default=200, help="the same for Flower's FedAvg (default: 200)"
    )
    parser.add_argument(
        "--parameters", type=int, default=4_000_000, help="values of an adapter (default: 4 million)"
    )
    parser.add_argument("--measure", choices=KINDS, help="measure one kind in this process; internal")
    arguments = parser.parse_args()
    if arguments.measure:
        kinds = {"numpy": numpy_adds, "fedslm": fedslm_round, "flower": flower_fedavg}
        start = adapter(arguments.parameters)
        print(json.dumps(kinds[arguments.measure](start, arguments.clients)))
        return
    busy = busy_cores()
    found = {kind: measured(kind, arguments) for kind in KINDS}
    report(found, arguments, busy)


def adapter(parameters: int) -> AdapterState:
    """An adapter of about so many values, in layers as a language model has them."""
    generator = np.random.default_rng(0)
    layers = max(1, parameters // (2 * RANK * WIDTH))
    parts = {"lora_A": (RANK, WIDTH), "lora_B": (WIDTH, RANK)}
    shapes = {
        f"layer.{layer:04d}.{part}.weight": shape
        for layer in range(layers)
        for part, shape in parts.items()
    }
    flat = generator.standard_normal(layers * 2 * RANK * WIDTH, dtype=np.float32)
    return AdapterState.of_flat(flat, shapes)


def updates(start: AdapterState, clients: int) -> Iterator[AdapterState]:
    """One client's update after another, each in one buffer of its own, as a message brings it."""
    for client in range(clients):
        yield scaled(start, 1 + 0.1 * (client % 7))


def scaled(start: AdapterState, factor: float) -> AdapterState:
    """One update."""
    update = AdapterState.of_flat(flat_of(start) * np.float32(factor), start.shapes)
    _ = update.shapes  # the check of a reply has compared them
    return update


def flat_of(state: AdapterState) -> FloatArray:
    """The buffer of an adapter that has one."""
    if state.flat is None:
        raise SystemExit("the adapter has no buffer of its own")
    return state.flat


def numpy_adds(start: AdapterState, clients: int) -> dict[str, float]:
    """The floor: add each update to a sum in place, as one array."""
    total = np.zeros(start.num_parameters, np.float32)
    seconds = 0.0
    for update in updates(start, clients):
        began = time.perf_counter()
        total += flat_of(update)
        seconds += time.perf_counter() - began
    return {"seconds": seconds}


def fedslm_round(start: AdapterState, clients: int) -> dict[str, float]:
    """A whole round of ours; a round before it has left a median norm, as all but the first have."""
    from fedslm.aggregation.server import Aggregation, Round, ServerState
    from fedslm.config import AggregationConfig, LoraConfig
    from fedslm.records import ClientUpdate

    config, lora = AggregationConfig(method="fedit"), LoraConfig(rank=RANK)
    how = Aggregation(config, lora, clients, fixed_denominator=False, fresh=start)
    norms = {"all": start.norm()}
    seconds = 0.0

    def work() -> None:
        nonlocal seconds
        with tempfile.TemporaryDirectory() as directory:
            state = ServerState(start, 1, norms=norms)
            with closing(Round(how, state, list(range(clients)), Path(directory))) as aggregate:
                sent = updates(start, clients)
                for client in range(clients):
                    update = next(sent)
                    began = time.perf_counter()
                    aggregate.add(ClientUpdate(client, update, 1.0))
                    seconds += time.perf_counter() - began
                    del update  # one reply in memory at a time
                began = time.perf_counter()
                aggregate.finish()
                seconds += time.perf_counter() - began

    grown = growth_of(work)
    return {"seconds": seconds, "adapters": grown / start.num_bytes}


def flower_fedavg(start: AdapterState, clients: int) -> dict[str, float]:
    """Flower's FedAvg on the replies of a round."""
    import logging

    from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
    from flwr.serverapp.strategy import FedAvg

    from fedslm.engines.local import LocalGrid
    from fedslm.workers import InlinePool

    logging.disable(logging.INFO)
    LocalGrid(1, InlinePool())  # tells Flower who sends
    seconds = 0.0

    def work() -> None:
        nonlocal seconds
        replies = [
            Message(
                RecordDict(
                    {
                        "arrays": ArrayRecord({key: Array(update[key]) for key in update}),
                        "metrics": MetricRecord({"num-examples": 1}),
                    }
                ),
                2,
                "train",
            )
            for update in updates(start, clients)
        ]
        began = time.perf_counter()
        FedAvg().aggregate_train(1, replies)
        seconds = time.perf_counter() - began

    grown = growth_of(work)
    return {"seconds": seconds, "adapters": grown / start.num_bytes}


def growth_of(work: Callable[[], None]) -> int:
    """Peak resident memory during some work beyond what there was before, in bytes.

    The kernel keeps the peak; a thread that looked at it would take time from the work.
    """
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory_bytes("self", "VmRSS")
    work()
    return memory_bytes("self", "VmHWM") - before


def measured(kind: str, arguments: argparse.Namespace) -> dict[str, float]:
    """One kind in a process of its own."""
    clients = arguments.flower_clients if kind == "flower" else arguments.clients
    command = [sys.executable, __file__, "--measure", kind, "--clients", str(clients)]
    command += ["--parameters", str(arguments.parameters)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600, check=False)
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return {**found, "per_client": found["seconds"] / clients, "clients": clients}


def report(found: dict[str, dict[str, float]], arguments: argparse.Namespace, busy: float) -> None:
    """The table, with goals."""
    floor = found["numpy"]["per_client"]
    print(f"an adapter of {arguments.parameters:,} values, float32")
    print("| | clients | ms for each client | speed of the NumPy add | peak memory, adapters |")
    print("|---|---|---|---|---|")
    for kind, row in found.items():
        adapters = f"{row['adapters']:.1f}" if "adapters" in row else ""
        print(
            f"| {kind} | {row['clients']:.0f} | {1e3 * row['per_client']:.2f} | "
            f"{floor / row['per_client']:.2f} | {adapters} |"
        )
    ours = found["fedslm"]
    print(f"goals: memory ≤ {MEMORY_GOAL:g} adapters, speed ≥ {SPEED_GOAL:g} of the add: ", end="")
    speed = floor / ours["per_client"]
    print("met" if ours["adapters"] <= MEMORY_GOAL and speed >= SPEED_GOAL else "missed")
    ratios = {"speed": round(speed, 3), "adapters": round(ours["adapters"], 2)}
    print(json.dumps({"benchmark": "aggregation", "busy_cores": busy, "ratios": ratios}))


if __name__ == "__main__":
    main()
