"""A run's directory."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.checkpoints import CONFIG

from fedslm.federation.checkpoint import RunDirectory


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    """A new run directory."""
    return RunDirectory.create(tmp_path / "run", CONFIG)
