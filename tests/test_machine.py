"""The line about the machine, and how long tests wait."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support import pace, processors
from support.machine import machine

HERE = Path(__file__).parent


def pytest_on(text: str, directory: Path) -> str:
    """What pytest says of a file, with our conftest."""
    (directory / "test_it.py").write_text(text)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "conftest", "--rootdir", str(directory)]
    environ = processors.environment("default")
    environ |= {"PYTHONPATH": f"{HERE}:{HERE.parent}", "FEDSLM_TEST_THREADS": "2"}
    done = subprocess.run(
        [*command, str(directory)], env=environ, cwd=directory, capture_output=True, text=True
    )
    return done.stdout


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("def test_it():\n    assert False\n", 1),
        (
            "import pytest\n@pytest.fixture\ndef broken():\n    raise OSError\ndef test_it(broken): ...\n",
            1,
        ),
        ("def test_it(): ...\n", 0),
    ],
    ids=["failed", "error", "passed"],
)
def test_a_failure_says_on_what_machine(text: str, lines: int, tmp_path: Path) -> None:
    """One line with kernels, threads and versions if anything failed, and none otherwise."""
    found = [line for line in pytest_on(text, tmp_path).splitlines() if line.startswith("machine: ")]
    assert len(found) == lines
    for line in found:
        assert "kernels DEFAULT, 2 of " in line
        for name, version in (("torch", torch.__version__), ("numpy", np.__version__)):
            assert f"{name} {version}" in line
        for name in ("python", "transformers", "peft", "opacus", "flwr"):
            assert f" {name} " in line


def test_the_line_is_one_line() -> None:
    """It can be copied into a report."""
    assert len(machine().splitlines()) == 1


def test_a_slow_machine_waits_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit grows with the time of the workload, and never falls below what was asked."""
    assert pace.patient(3.0) >= 3.0
    ticks = iter(range(100))
    monkeypatch.setattr(pace.time, "perf_counter", lambda: 10 * pace.QUIET_SECONDS * next(ticks))
    assert pace.patient(3.0) == pytest.approx(30.0)
    monkeypatch.setattr(pace.time, "perf_counter", lambda: 0.0)
    assert pace.patient(3.0) == 3.0


def test_a_processor_is_not_asked_for_what_it_lacks() -> None:
    """Each capability runs once, and a reason is given for those that do not."""
    names = list(processors.KERNELS)
    for best, expected in {
        "AVX512": names,
        "AVX2": ["default", "avx2"],
        "DEFAULT": ["default"],
        "SVE256": ["default", "native"],
    }.items():
        assert [name for name in names if not processors.why_not(name, best)] == expected


def test_the_sensitive_files_are_there() -> None:
    """A file that was renamed would be left out with an error of pytest, much later."""
    assert all((HERE / file).is_file() for file in processors.SENSITIVE)
    assert len(set(processors.SENSITIVE)) == len(processors.SENSITIVE) > 10
