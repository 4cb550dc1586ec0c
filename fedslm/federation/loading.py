"""The model that a setup asks for, loaded once per process."""

from __future__ import annotations

from fedslm.federation.wire import Setup
from fedslm.models.loaded import LoadedModel, load


def model_for(setup: Setup) -> LoadedModel:
    """The base with the adapter that the setup's method trains.

    Raises:
        ModelError: The model, its tokenizer or its LoRA targets are not usable.
    """
    core = setup.method == "fed-sb"
    return load(setup.model, setup.lora, setup.task, len(setup.labels), core=core)
