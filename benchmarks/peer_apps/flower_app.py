"""The job on Flower's simulation, at its best: each of two Ray actors loads the model once.

``peers.py`` calls :func:`main`, which prints one JSON line, as ``pfl_app.py`` does.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import job
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file

MODEL, INPUTS, OUTPUT = (
    Path(os.environ.get(f"JOB_{name}", "")) for name in ("MODEL", "INPUTS", "OUTPUT")
)
app = ClientApp()


@lru_cache(maxsize=1)
def loaded() -> job.Job:
    """The job, once for each process."""
    return job.load(MODEL, INPUTS)


@app.train()
def train(message: Message, context: Context) -> Message:
    """One client's steps of a round."""
    mine = loaded()
    set_peft_model_state_dict(mine.model, message.content["arrays"].to_torch_state_dict())
    round_number = int(message.content["config"]["server-round"]) - 1
    job.train(mine, mine.tokens[round_number, int(context.node_config["partition-id"])])
    arrays = ArrayRecord(get_peft_model_state_dict(mine.model))
    metrics = MetricRecord({"num-examples": 1})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    mine, clock, server = loaded(), job.Clock(), ServerApp()
    rounds, clients = mine.tokens.shape[:2]

    @server.main()
    def serve(grid: Grid, context: Context) -> None:
        """Runs all rounds."""
        strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0, min_available_nodes=clients)
        done = strategy.start(
            grid,
            ArrayRecord(get_peft_model_state_dict(mine.model)),
            num_rounds=rounds,
            evaluate_fn=lambda number, arrays: clock.note(),
        )
        save_file(dict(done.arrays.to_torch_state_dict()), OUTPUT)

    options: dict[str, Any] = {
        "init_args": {"num_cpus": arguments.workers, "include_dashboard": False},
        "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
    }
    run_simulation(server, app, clients, backend_config=options)
    print(json.dumps(clock.result()))
