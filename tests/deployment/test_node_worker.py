"""Tests of a node's worker: it stays, or it leaves no memory taken."""

from __future__ import annotations

import logging
import os
import threading
import time
from dataclasses import replace
from multiprocessing import active_children
from pathlib import Path

import pytest
from support.commands import run
from support.places import NODE, admitted_node

from fedslm import layout
from fedslm.deployment.admission import Admission
from fedslm.deployment.authority import AUTHORITY, create_authority
from fedslm.deployment.node import Ready, alone, open_node, run_node, workers
from fedslm.deployment.settings import NodeFile
from fedslm.errors import RunError


def ready(directory: Path, *, warm: bool) -> Ready:
    """A node."""
    admission = Admission("test", "127.0.0.1:1", "", "", 7, "", "", "")
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


def test_a_server_that_is_not_up_yet_is_no_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A node that starts before its server says so once, as information, and tries again until it is stopped."""
    create_authority(tmp_path, "t", 2)
    node_here = ready(tmp_path, warm=True)
    known = replace(node_here.admission, authority=(tmp_path / AUTHORITY).read_text())
    stop = threading.Event()
    logger = logging.getLogger("fedslm.deployment.node")
    logger.addHandler(caplog.handler)  # whatever an earlier test made of the loggers above
    logger.propagate = False
    with caplog.at_level(logging.INFO, logger.name):
        node = threading.Thread(target=run_node, args=(replace(node_here, admission=known), stop))
        node.start()
        time.sleep(5)  # two tries and more
        stop.set()
        node.join(30)
    logger.removeHandler(caplog.handler)
    logger.propagate = True
    assert not node.is_alive()
    said = [(each.levelname, each.getMessage()) for each in caplog.records]
    assert said.count(("INFO", "127.0.0.1:1 cannot be reached; retrying")) == 1
    assert {level for level, _ in said} == {"INFO"}


def test_a_second_start_does_not_touch_the_records(tmp_path: Path) -> None:
    """`node up` of a node that runs says so before it reads records, which later runs would train on."""
    directory = admitted_node(tmp_path, NODE, 1)
    before = sorted(directory.rglob("*"))
    with alone(open_node(directory)):
        result = run("node", "up", str(directory))
        assert result.exit_code == 1
        assert "another process runs the node" in result.stderr
        assert {each.name for each in directory.rglob("*")} - {each.name for each in before} == {
            "node.lock"
        }


def test_a_second_process_does_not_end_the_session_of_the_first(tmp_path: Path) -> None:
    """A start that is refused leaves the running node in its round of secure aggregation."""
    create_authority(tmp_path, "t", 2)
    node_here = ready(tmp_path, warm=True)
    known = replace(node_here.admission, authority=(tmp_path / AUTHORITY).read_text())
    (tmp_path / layout.SESSION).write_text("ab" * 16)
    with alone(node_here), pytest.raises(RunError, match="another process runs the node"):
        run_node(replace(node_here, admission=known), threading.Event())
    assert (tmp_path / layout.SESSION).read_text() == "ab" * 16
