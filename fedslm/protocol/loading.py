"""Loads the model and the task that a setup requests."""

from __future__ import annotations

from fedslm.models.loaded import LoadedModel, load
from fedslm.protocol.setup import Setup
from fedslm.tasks import build
from fedslm.tasks.base import Task


def model_for(setup: Setup) -> LoadedModel:
    """The base with the adapter that the setup's method trains, loaded once per process.

    Raises:
        ModelError: The model, its tokenizer or its LoRA targets are not usable.
    """
    sections = (setup.model, setup.lora, setup.task, len(setup.labels))
    match setup.method:
        case "fed-sb":
            return load(*sections, trains="core")
        case "head":
            return load(*sections, trains="head")
        case _:
            return load(*sections)


def task_for(setup: Setup) -> Task:
    """The task, with the run's columns and labels."""
    return build(setup.task, setup.data, setup.labels)
