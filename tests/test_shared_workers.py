"""Several runs in the same workers: each gives what it gives in workers of its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from support.tiny import PRIVATE

from fedslm.config import Config
from fedslm.errors import RunError
from fedslm.federation.observers import Observer
from fedslm.simulation import simulate, workers_for
from fedslm.workers import Pool

Make = Callable[..., Config]
ENGINE = {"workers": 2}


@pytest.fixture
def pool(config_in: Make, tmp_path: Path) -> Iterator[Pool]:
    """Two workers."""
    with closing(workers_for(config_in(tmp_path / "any", engine=ENGINE), tmp_path / "log")) as workers:
        yield workers


class Breaks(Observer):
    """Ends a run while clients of its first round are still at work."""

    def on_client(self, round: int, done: int, cohort: int) -> None:
        """The first reply has come."""
        raise RunError("ended by the test")


def test_runs_do_not_change_each_other(config_in: Make, pool: Pool, tmp_path: Path) -> None:
    """Without noise bit for bit, also after a private run; a private one has ledgers of its own."""
    alone = simulate(config_in(tmp_path / "alone", engine=ENGINE))
    first = simulate(config_in(tmp_path / "first", engine=ENGINE), pool=pool)
    private = [
        simulate(config_in(tmp_path / name, engine=ENGINE, privacy=PRIVATE), pool=pool)
        for name in ("private", "private too")
    ]
    last = simulate(config_in(tmp_path / "last", engine=ENGINE), pool=pool)
    assert alone["adapter_sha256"] == first["adapter_sha256"] == last["adapter_sha256"]
    spent = [json.dumps(report["privacy"], sort_keys=True) for report in private]
    assert spent[0] == spent[1]


def test_a_run_that_breaks_leaves_no_job_behind(config_in: Make, pool: Pool, tmp_path: Path) -> None:
    """The next run in the same workers is whole, and nothing of the broken one is waited for."""
    with pytest.raises(RunError, match="ended by the test"):
        simulate(config_in(tmp_path / "broken", engine=ENGINE), [Breaks()], pool)
    assert (list(pool._queue), pool._results) == ([], {})  # type: ignore[union-attr]
    alone = simulate(config_in(tmp_path / "alone", engine=ENGINE))
    after = simulate(config_in(tmp_path / "after", engine=ENGINE), pool=pool)
    assert after["adapter_sha256"] == alone["adapter_sha256"]
