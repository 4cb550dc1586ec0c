"""What a test's result depends on: the code that keeps the promises, and the machine."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fedslm import fingerprint


@pytest.mark.parametrize(
    "file",
    [
        "fedslm/training/steps.py",
        "opacus/optimizers/optimizer.py",
        "opacus/grad_sample/grad_sample_module.py",
        "dp_accounting/pld/pld_privacy_accountant.py",
    ],
)
def test_the_fingerprint_names_the_source_that_keeps_the_promise(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, file: str
) -> None:
    """One byte of the code that computes, or accounts for, a step: another fingerprint."""
    package, _, inside = file.partition("/")
    real, copy = fingerprint._directory, tmp_path / package
    shutil.copytree(real(package), copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(fingerprint, "_directory", lambda name: copy if name == package else real(name))
    anew = fingerprint.code_fingerprint.__wrapped__
    assert anew() == fingerprint.code_fingerprint()
    with (copy / inside).open("a") as source:
        source.write("#")
    assert anew() != fingerprint.code_fingerprint()


def test_the_fingerprint_names_code_and_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another version of a library gives another fingerprint; the same code the same."""
    own = fingerprint.code_fingerprint()
    fingerprint.code_fingerprint.cache_clear()
    assert fingerprint.code_fingerprint() == own
    fingerprint.code_fingerprint.cache_clear()
    monkeypatch.setattr(fingerprint, "version", lambda name: "0.0.0")
    assert fingerprint.code_fingerprint() != own
    fingerprint.code_fingerprint.cache_clear()


def test_the_fingerprint_names_assertions(tmp_path: Path) -> None:
    """Python leaves assertions out if told to; code without them has not passed."""
    script = "from fedslm.fingerprint import code_fingerprint; print(code_fingerprint())"
    command = [sys.executable, "-O", "-c", script]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert found.stdout.strip() != fingerprint.code_fingerprint()


@pytest.mark.parametrize("what", ["name", "processor", "kernels"])
def test_the_machine_is_its_name_processor_and_kernels(
    monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """A home directory that another machine mounts, or other kernels asked for: another machine."""
    own = fingerprint.machine_fingerprint()
    assert fingerprint.machine_fingerprint() == own
    match what:
        case "name":
            monkeypatch.setattr(fingerprint.platform, "node", lambda: "another")
        case "processor":
            monkeypatch.setattr(fingerprint, "_processor", lambda: "another")
        case _:
            monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    assert fingerprint.machine_fingerprint() != own


def test_the_processor_is_told_alike_at_any_moment() -> None:
    """Its clock, which changes all the time, is no part of it."""
    found = fingerprint._processor.__wrapped__()
    assert found == fingerprint._processor.__wrapped__()
    assert "MHz" not in found
