"""Real weights and real data: FEDSLM_ASSETS names the directory that holds them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="session")
def assets() -> Path:
    """The directory with models/ and data/."""
    directory = (ROOT / os.environ.get("FEDSLM_ASSETS", "../shared/assets")).resolve()
    if not (directory / "models").is_dir():
        pytest.skip(f"no real weights and data in FEDSLM_ASSETS={directory}")
    os.environ["FEDSLM_ASSETS"] = str(directory)  # scenario files name it, in worker processes too
    return directory
