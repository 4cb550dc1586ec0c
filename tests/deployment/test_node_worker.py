"""Tests of a node's worker: it stays, or it leaves no memory taken."""

from __future__ import annotations

import os
from multiprocessing import active_children
from pathlib import Path

import pytest

from fedslm.deployment.enrolment import Admission
from fedslm.deployment.node import Ready, workers
from fedslm.deployment.settings import NodeFile


def ready(directory: Path, *, warm: bool) -> Ready:
    """A node."""
    admission = Admission("test", "127.0.0.1:1", "", 0, 7, "", "", "")
    return Ready(directory, NodeFile(name="north", source="demo", warm=warm), admission)


@pytest.mark.parametrize("warm", [True, False])
def test_a_worker_stays_only_if_it_is_warm(tmp_path: Path, warm: bool) -> None:
    """Two messages meet the same process, or two; a cold one is gone when its message is answered."""
    seen = []
    with workers(ready(tmp_path, warm=warm)) as next_worker:
        for _ in range(2):
            with next_worker() as pool:
                seen.append(pool.call(os.getpid))
            alive = {process.pid for process in active_children()}
            assert (seen[-1] in alive) == warm
    assert (len(set(seen)) == 1) == warm
    assert not active_children()


def test_a_cold_worker_is_nobodys_fork(tmp_path: Path) -> None:
    """Its parent is the node itself: no process that holds the imports stays between messages."""
    with workers(ready(tmp_path, warm=False)) as next_worker, next_worker() as pool:
        assert pool.call(os.getppid) == os.getpid()
