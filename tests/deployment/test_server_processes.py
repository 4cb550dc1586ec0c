"""Tests of how the server keeps its processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedslm.deployment.server import Child, _Running
from fedslm.errors import RunError


@pytest.mark.parametrize("mode", [0o644, 0o755], ids=["not executable", "no interpreter"])
def test_a_program_that_cannot_be_started_is_an_error(tmp_path: Path, mode: int) -> None:
    """Ours, with the program and the remedy; such as Flower's, if its Python lies in a home that is hidden."""
    (tmp_path / "logs").mkdir()
    program = tmp_path / "flower-superlink"
    program.write_text("#!/home/hidden/bin/python\n")
    program.chmod(mode)
    with pytest.raises(RunError, match=r"flower-superlink cannot be started: .*must be able to run it"):
        _Running(tmp_path, Child("superlink", (str(program),)))
