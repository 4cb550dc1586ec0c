"""A node trains under privacy only after this very code has passed the self-test on this machine."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import time
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock, Timeout

import fedslm
from fedslm.errors import PolicyRefused, RunError
from fedslm.storage import write_text

logger = logging.getLogger(__name__)
ATTESTATION = "self-test.json"
_LOCK_SECONDS = 300.0
_LIBRARIES = ("cryptography", "dp-accounting", "numpy", "opacus", "peft", "torch", "transformers")


@lru_cache(maxsize=64)
def attest(directory: Path) -> None:
    """Runs the self-test unless this code has passed it here before.

    Formal guarantees:
        * Returns only if the self-test has passed with this fedslm, these libraries and this machine's
          architecture; anything else refuses.

    Args:
        directory: Where the result is kept.

    Raises:
        PolicyRefused: The self-test failed or could not be recorded.
    """
    path, fingerprint = directory / ATTESTATION, code_fingerprint()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock", timeout=_LOCK_SECONDS):
            if _passed_with(path) == fingerprint:
                return
            logger.info("the self-test runs: some ten seconds of one core")
            values = {"fingerprint": fingerprint, "time": int(time.time()), "checks": _self_test()}
            write_text(path, json.dumps(values) + "\n")
    except (OSError, RunError, Timeout) as error:
        logger.exception("the self-test's result cannot be kept")
        raise PolicyRefused("this node cannot record its self-test, so it trains nothing") from error


def is_attested(directory: Path) -> bool:
    """Whether this code has passed the self-test here before: :func:`attest` does not run it then."""
    return _passed_with(directory / ATTESTATION) == code_fingerprint()


@lru_cache(maxsize=1)
def _self_test() -> dict[str, str]:
    """Runs the self-test, once per process if it passes; gives what was checked."""
    from fedslm.training.self_test import run_self_test

    result = run_self_test()
    if not result.passed:
        logger.error("self-test failed: %s", "; ".join(result.failures))
        raise PolicyRefused("this node's self-test failed, so it trains nothing")
    return {check.name: check.detail for check in result.checks}


@lru_cache(maxsize=1)
def code_fingerprint() -> str:
    """Hash of fedslm's source, the versions of its libraries, and the machine's architecture."""
    digest = hashlib.sha256()
    for path in sorted(Path(fedslm.__file__).parent.rglob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    for library in _LIBRARIES:
        digest.update(f"{library}=={version(library)}\0".encode())
    digest.update(f"{platform.python_version()} {platform.machine()} {platform.system()}".encode())
    return digest.hexdigest()


def _passed_with(path: Path) -> str | None:
    """Fingerprint of the code that passed here; None if none did."""
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
