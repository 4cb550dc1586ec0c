"""FedAvg over the LoRA tensors; says when each round was over."""

from __future__ import annotations

import json
from pathlib import Path

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from plain.model import arrays_of, load

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Runs all rounds."""
    config = context.run_config
    rounds_file, nodes = Path(str(config["rounds-file"])), int(config["nodes"])

    def note(number: int, arrays: ArrayRecord) -> None:
        """Writes a line when a round is over."""
        size = sum(array.numpy().nbytes for array in arrays.values())
        line = json.dumps({"round": number, "tensors": len(arrays), "bytes": size})
        with rounds_file.open("a") as file:
            file.write(line + "\n")

    strategy = FedAvg(
        fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=nodes, min_available_nodes=nodes
    )
    arrays = arrays_of(load(context))
    result = strategy.start(grid, arrays, num_rounds=int(config["rounds"]), evaluate_fn=note)
    answered = [metrics["num-examples"] for metrics in result.train_metrics_clientapp.values()]
    if len(answered) != config["rounds"]:
        raise RuntimeError(f"only {len(answered)} rounds had replies")
