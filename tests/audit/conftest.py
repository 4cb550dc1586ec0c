"""A node that was charged three times."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.audited import spend

from fedslm.privacy import keys
from fedslm.privacy.ledger import Ledger


@pytest.fixture
def node(tmp_path: Path) -> Path:
    """A node directory with three charges, one of them open."""
    ledger = Ledger(tmp_path / "ledger.jsonl", keys.signing_key(tmp_path))
    for number in (1, 2):
        spend(ledger, number)
    spend(ledger, 3, commit=False)
    return tmp_path
