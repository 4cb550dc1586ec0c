"""The job on pfl-research: one process, or two under ``torchrun``, one thread each.

Prints one JSON line: when the first round began, and the seconds of each round.
"""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import job
import torch
from peft import get_peft_model_state_dict
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam.base import NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from safetensors.torch import save_file

MODEL, INPUTS, OUTPUT = (Path(os.environ[f"JOB_{name}"]) for name in ("MODEL", "INPUTS", "OUTPUT"))


class Network(torch.nn.Module):
    """What pfl asks of a network: a loss and metrics."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.inner = model

    def loss(self, tokens: torch.Tensor) -> torch.Tensor:
        """The mean loss of a batch."""
        return job.loss(self.inner, tokens)

    def metrics(self, tokens: torch.Tensor) -> dict[str, Weighted]:
        """Nothing is evaluated; pfl wants a metric in its first round."""
        return {"records": Weighted(0.0, len(tokens))}


class Watch(TrainingProcessCallback):
    """Notes when each round was over."""

    def __init__(self, clock: job.Clock) -> None:
        self._clock = clock

    def on_train_begin(self, *, model: PyTorchModel) -> Metrics:
        """The first round begins."""
        self._clock.note()
        return Metrics()

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: PyTorchModel, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        """A round is over; goes on."""
        self._clock.note()
        return False, Metrics()


def main() -> None:
    mine = job.load(MODEL, INPUTS)
    rounds, clients, steps, batch = mine.tokens.shape[:4]
    network = Network(mine.model)
    model = PyTorchModel(
        network,
        lambda parameters, lr: torch.optim.AdamW(
            [p for p in parameters if p.requires_grad], lr=lr, weight_decay=0.0
        ),
        torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=1.0),
    )
    numbers = itertools.count()

    def dataset(number: int) -> Dataset:
        """The records of a client in a round; clients are numbered through all rounds."""
        tokens = mine.tokens[number // clients, number % clients].flatten(0, 1)
        return Dataset(raw_data=[tokens], user_id=str(number))

    data = FederatedDataset(dataset, lambda: next(numbers))
    clock = job.Clock()
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=rounds,
            evaluation_frequency=rounds + 1,
            train_cohort_size=clients,
            val_cohort_size=0,
        ),
        backend=SimulatedBackend(training_data=data, val_data=data),
        model=model,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=None,
            local_num_steps=steps,
            local_learning_rate=mine.learning_rate,
            local_batch_size=batch,
        ),
        callbacks=[Watch(clock)],
    )
    if int(os.environ.get("RANK", "0")) == 0:
        save_file(get_peft_model_state_dict(mine.model), OUTPUT)
        print(json.dumps(clock.result()))


if __name__ == "__main__":
    main()
