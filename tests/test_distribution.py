"""The test of sdist, wheel and a core installation, which make dist runs too; it needs a package index."""

from __future__ import annotations

import subprocess
import sys

import pytest
from support.commands import ROOT


@pytest.mark.slow
def test_the_distributions_can_be_installed() -> None:
    """Metadata, contents, a wheels-only installation without extras, its size and its commands."""
    script = str(ROOT / "tests" / "support" / "distribution.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    assert "a core installation takes" in done.stdout
