"""Blocks private training until exactly this code has passed the self-test on this machine."""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from fedslm.attestations import Places, attested, is_any_known
from fedslm.config import DeviceName
from fedslm.errors import PolicyRefused, RunError
from fedslm.fingerprint import code_fingerprint
from fedslm.storage import json_text, write_text

logger = logging.getLogger(__name__)
_KIND = "self-test"


def attest(places: Places, *, device: DeviceName = "auto", record: Path | None = None) -> None:
    """Runs the self-test unless this code has passed it on this machine before.

    Formal guarantees:
        * Returns only if the self-test has passed with exactly this source of fedslm, Opacus and
          dp-accounting, these versions of the other libraries, this machine, its CPU kernels and GPU,
          and with assertions, threads and precision of torch as they are in this process now; anything
          else refuses. A torch of the same version that was modified by hand is not noticed.
        * A result counts only where :mod:`fedslm.attestations` says so.

    Args:
        places: Where the result is kept.
        device: The device that trains, as in ``model.device``.
        record: Also gets the result, for the audit of a simulation.

    Raises:
        ModelError: This machine has no such device.
        PolicyRefused: The self-test failed or could not be recorded.
    """
    from fedslm.verification.self_test import kernels

    here = kernels(device)
    try:
        found = attested(places, _KIND, {"kernels": here}, lambda: _self_test(here, device))
        if record is not None:
            _write_record(record, found)
    except (OSError, RunError) as error:
        logger.exception("the self-test's result cannot be kept")
        raise PolicyRefused("this node cannot record its self-test, so it trains nothing") from error


def is_attested(places: Places) -> bool:
    """Whether this code has passed here before: for equal threads, :func:`attest` skips the test."""
    return is_any_known(places, _KIND)


@lru_cache(maxsize=1)
def _self_test(kernels: str, device: DeviceName) -> dict[str, Any]:
    """Runs the self-test, once per process and kernels if it passes; returns what was checked."""
    from fedslm.verification.self_test import run_self_test

    logger.info("the self-test runs: some ten seconds of one core")
    result = run_self_test(device)
    if not result.passed:
        logger.error("self-test failed: %s", "; ".join(result.failures))
        raise PolicyRefused("this node's self-test failed, so it trains nothing")
    checks = {check.name: check.detail for check in result.checks}
    return {
        "fingerprint": code_fingerprint(),
        "kernels": kernels,
        "time": int(time.time()),
        "checks": checks,
    }


def _write_record(path: Path, found: dict[str, Any]) -> None:
    """Writes the result next to a run's nodes, unless it is there."""
    text = json_text(found) + "\n"
    with suppress(OSError, ValueError):
        if path.read_text(encoding="utf-8") == text:
            return
    write_text(path, text)
