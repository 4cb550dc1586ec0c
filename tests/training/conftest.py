"""The models that the tests of a step share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.families import FAMILIES, load_family, task_of, wild_token

from fedslm.models.loaded import LoadedModel
from fedslm.tasks.base import Task


@pytest.fixture(params=FAMILIES, ids="-".join, scope="module")
def family(
    request: pytest.FixtureRequest, family_directory: Callable[[str, str], Path]
) -> tuple[LoadedModel, Task]:
    """A loaded model and its task."""
    architecture, task, pooling = request.param
    return load_family(family_directory(architecture, task), task, pooling), task_of(task)


@pytest.fixture
def wild(family: tuple[LoadedModel, Task]) -> Iterator[tuple[LoadedModel, Task]]:
    """The same, with a token that makes its record infinite."""
    with wild_token(family[0]):
        yield family
