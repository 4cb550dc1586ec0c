"""``flwr run .``: run the same federation on Flower's own simulation or deployment engine."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

from fedslm import config as configuration
from fedslm import layout, validation
from fedslm.distillation.hooks import check_asked, distill_if_asked
from fedslm.errors import FedslmError, RunError, Unusable
from fedslm.federation.checkpoint import RunDirectory
from fedslm.progress import Bar
from fedslm.simulation import Run, with_layout
from fedslm.storage import write_text
from fedslm.workers import InlinePool


def serve_flower(grid: Grid, run_config: Mapping[str, Any], run_id: int) -> dict[str, Any]:
    """Runs a federation on Flower's grid; with real nodes, continues an interrupted one.

    Args:
        grid: Flower's grid.
        run_config: Flat run config, as in ``[tool.flwr.app.config]``.
        run_id: Flower's run identifier; names the run directory unless ``run.directory`` is set.

    Returns:
        The content of ``report.json``.

    Raises:
        FedslmError: As :func:`fedslm.simulation.simulate`; a relative ``run.directory`` is refused,
            because Flower starts apps in its own directories.
    """
    config = configuration.from_flat(run_config)
    validation.check(config)
    config = with_layout(config.resolved())
    named = config.run.directory
    path = Path(named or f"~/.fedslm/runs/{config.run.name}-{run_id}").expanduser()
    if not path.is_absolute():
        raise Unusable(f"run.directory={named!r} must be absolute under flwr run")
    again = config.engine.nodes is not None and (path / layout.CONFIG_JSON).exists()
    directory = RunDirectory.open(path, config)[0] if again else RunDirectory.create(path, config)
    directory.check_continues(config)
    pool = InlinePool(threads=config.engine.threads_per_worker)

    run = Run(config, directory, [Bar()])

    with _told(directory):
        check_asked(config.distill)
        report = run.serve(lambda plan, labels: run.rounds_on(grid, pool, plan, labels))
        distill_if_asked(directory.path, config.distill)
    print(f"fedslm: report in {directory.path}", file=sys.stderr, flush=True)
    if report["stopped"]:
        error = RunError(f"stopped early: {report['stopped']}")
        write_text(directory.path / layout.ERROR, str(error))
        raise error
    return report


@contextmanager
def _told(directory: RunDirectory) -> Iterator[None]:
    """Records the reason for a failure where the person who started the run can read it."""
    (directory.path / layout.ERROR).unlink(missing_ok=True)
    try:
        yield
    except Exception as error:
        kind = "" if isinstance(error, FedslmError) else f"{type(error).__name__}: "
        write_text(directory.path / layout.ERROR, f"{kind}{error}")
        raise
