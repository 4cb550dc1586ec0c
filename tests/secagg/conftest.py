"""Whole attempts write a hundred files: only tests of crashes wait for the disk."""

from __future__ import annotations

import pytest

from fedslm import storage


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are renamed into place without a sync, but for tests that ask for ``syncs``."""
    if "syncs" not in request.fixturenames:
        monkeypatch.setattr(storage, "_sync", lambda path: None)
