"""FedAvg over the LoRA tensors; says when each round was over."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from flwr.app import ArrayRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from plain.model import arrays_of, load

app = ServerApp()


class Complete(FedAvg):
    """Does not go on without a node, as FedAvg would."""

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Averages the tensors."""
        replies = list(replies)
        if len(replies) < self.min_train_nodes or any(reply.has_error() for reply in replies):
            raise RuntimeError(f"round {server_round}: a node failed")
        return super().aggregate_train(server_round, replies)


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

    strategy = Complete(
        fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=nodes, min_available_nodes=nodes
    )
    arrays = arrays_of(load(context))
    strategy.start(grid, arrays, num_rounds=int(config["rounds"]), evaluate_fn=note)
