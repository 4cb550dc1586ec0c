"""Blocks private training until exactly this code has passed the self-test on this machine."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import sys
import time
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from filelock import FileLock, Timeout

from fedslm import layout
from fedslm.errors import PolicyRefused, RunError
from fedslm.storage import write_text

logger = logging.getLogger(__name__)
_LOCK_SECONDS = 300.0
_LIBRARIES = (
    "cryptography",
    "dp-accounting",
    "numpy",
    "opacus",
    "peft",
    "scipy",
    "torch",
    "transformers",
)
_READ = ("fedslm", "opacus", "dp_accounting")  # packages whose source implements the guarantees


def attest(directory: Path) -> None:
    """Runs the self-test unless this code has passed it here before.

    Formal guarantees:
        * Returns only if the self-test has passed with exactly this source of fedslm, Opacus and
          dp-accounting, these versions of the other libraries, this machine's architecture, CPU
          kernels and GPU, and with assertions, threads and precision of torch as they are in this
          process now; anything else refuses. A torch of the same version that was modified by hand is
          not noticed.

    Args:
        directory: Where the result is stored.

    Raises:
        PolicyRefused: The self-test failed or could not be recorded.
    """
    from fedslm.verification.self_test import kernels

    path, here = directory / layout.SELF_TEST, (code_fingerprint(), kernels())
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock", timeout=_LOCK_SECONDS):
            if _passed_with(path) == here:
                return
            logger.info("the self-test runs: some ten seconds of one core")
            checks = _self_test(here[1])
            values = {"fingerprint": here[0], "kernels": here[1], "time": int(time.time())}
            write_text(path, json.dumps({**values, "checks": checks}) + "\n")
    except (OSError, RunError, Timeout) as error:
        logger.exception("the self-test's result cannot be kept")
        raise PolicyRefused("this node cannot record its self-test, so it trains nothing") from error


def is_attested(directory: Path) -> bool:
    """Whether this code has passed here before: for equal threads, :func:`attest` skips the test."""
    passed = _passed_with(directory / layout.SELF_TEST)
    return passed is not None and passed[0] == code_fingerprint()


@lru_cache(maxsize=1)
def _self_test(kernels: str) -> dict[str, str]:
    """Runs the self-test, once per process and kernels if it passes; returns what was checked."""
    from fedslm.verification.self_test import run_self_test

    result = run_self_test()
    if not result.passed:
        logger.error("self-test failed: %s", "; ".join(result.failures))
        raise PolicyRefused("this node's self-test failed, so it trains nothing")
    return {check.name: check.detail for check in result.checks}


@lru_cache(maxsize=1)
def code_fingerprint() -> str:
    """Hash of the source that implements the guarantees, library versions, and the architecture."""
    digest = hashlib.sha256()
    for package in _READ:
        directory = _directory(package)
        for path in sorted(directory.rglob("*.py")):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(f"{package}/{path.relative_to(directory).as_posix()} {content}\0".encode())
    for library in _LIBRARIES:
        digest.update(f"{library}=={version(library)}\0".encode())
    digest.update(f"{platform.python_version()} {platform.machine()} {platform.system()}".encode())
    digest.update(f" -{'O' * sys.flags.optimize}".encode())  # which disables assertions
    return digest.hexdigest()


def _directory(package: str) -> Path:
    """Directory of a package's source; the package is not imported."""
    found = find_spec(package)
    if found is None or found.origin is None:
        raise RunError(f"package={package} is not installed: install fedslm again")
    return Path(found.origin).parent


def _passed_with(path: Path) -> tuple[str, str] | None:
    """Fingerprint of the code that passed here, and the kernels that it ran on; None if none passed."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return str(values["fingerprint"]), str(values["kernels"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
