"""The SuperLink's database is made smaller before a start, and nothing that is needed goes."""

from __future__ import annotations

import logging
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, RecordDict
from flwr.common.constant import SubStatus
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.superlink.config_loader import get_federation_manager, get_objectstore_linkstate_factories
from support.fleet_client import answer_to, arrays, instruction

from fedslm.deployment.database import tidy

MIB = 1 << 20
Found = tuple[Path, int, str]


def state_of(path: Path) -> Any:
    """Flower's own state on a database."""
    return get_objectstore_linkstate_factories(str(path), get_federation_manager())[1].state()


def run_in(state: Any, node: int, mib: float) -> tuple[int, str]:
    """A run with an instruction of a size and its reply; gives the run and the instruction's name."""
    run = state.create_run(
        *("fedslm/app", "1", "hash", {}, NOOP_FEDERATION_ID), None, None, TaskType.SERVER_APP
    )
    task = state.get_run_info(run_ids=[run])[0].primary_task_id
    assert state.claim_task(task)
    assert state.activate_task(task)
    asked = instruction(run, node, arrays(mib))
    answer = answer_to(asked, node, RecordDict({"reply": ConfigRecord({"a": 1})}))
    for message in (asked, answer):
        session = state.start_session(run)
        stored, wanted = state.store_message_and_object_tree(message, get_object_tree(message), session)
        assert stored
        for name, each in get_all_nested_objects(message).items():
            if name in wanted:
                assert state.store_object(run, session, name, each.deflate())
    return run, str(asked.metadata.message_id)


@pytest.fixture
def database(tmp_path: Path) -> Found:
    """What a SuperLink leaves that was killed: a finished run with 12 MiB, and one under way with 1 MiB."""
    path = tmp_path / "superlink.db"
    state = state_of(path)
    node = state.create_node("owner", "owner", b"key", 30)
    assert state.acknowledge_node_heartbeat(node, 30)
    finished, _ = run_in(state, node, 12)
    task = state.get_run_info(run_ids=[finished])[0].primary_task_id
    assert state.finish_task(task, SubStatus.COMPLETED, "")
    alive, asked = run_in(state, node, 1)
    state._engine.dispose()
    return path, alive, asked


def count(path: Path, table: str) -> int:
    """Rows of a table."""
    with sqlite3.connect(path) as found:
        return int(found.execute(f"SELECT count(*) FROM {table}").fetchone()[0])  # noqa: S608


def test_what_a_finished_run_left_goes(database: Found, caplog: pytest.LogCaptureFixture) -> None:
    """Its messages, objects and their room are gone; runs and nodes stay; a log line says how much."""
    path, _, _ = database
    before = path.stat().st_size
    assert before > 12 * MIB
    assert (count(path, "message_ins"), count(path, "message_res")) == (2, 2)
    with caplog.at_level(logging.INFO, "fedslm"):
        tidy(path)
    assert path.stat().st_size < 3 * MIB
    assert "MiB" in caplog.text
    assert (count(path, "message_ins"), count(path, "message_res")) == (1, 1)
    assert (count(path, "run"), count(path, "node")) == (2, 1)


def test_a_run_under_way_keeps_all(database: Found) -> None:
    """After a kill of the SuperLink its run goes on: each message and each object of it is as it was."""
    path, alive, asked = database
    tidy(path)
    state = state_of(path)
    tree = state.object_store.get_object_tree(asked)
    waiting, names = [tree], []
    while waiting:
        names.append(waiting[-1].object_id)
        waiting.extend(waiting.pop().children)
    assert len(names) == 5
    assert all(state.get_object(alive, name) for name in names)
    assert state.get_valid_message_ins(asked) is not None
    with sqlite3.connect(path) as found:
        assert found.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert not found.execute("PRAGMA foreign_key_check").fetchall()


def test_runs_do_not_add_up(tmp_path: Path) -> None:
    """Four runs of 4 MiB, with a restart between them, leave a database as large as after one."""
    path, sizes = tmp_path / "superlink.db", []
    state = state_of(path)
    node = state.create_node("owner", "owner", b"key", 30)
    assert state.acknowledge_node_heartbeat(node, 30)
    for _ in range(4):
        run, _ = run_in(state, node, 4)
        state.finish_task(state.get_run_info(run_ids=[run])[0].primary_task_id, SubStatus.COMPLETED, "")
        state._engine.dispose()
        tidy(path)
        sizes.append(path.stat().st_size)
        state = state_of(path)
    assert max(sizes) < MIB
    assert sizes[-1] - sizes[0] < 64 * 1024


def test_it_stops_in_time(database: Found, caplog: pytest.LogCaptureFixture) -> None:
    """Without the time for it, the database stays as it is, and the log says that it was skipped."""
    path, _, _ = database
    before = path.stat().st_size
    tidy(path, most_seconds=0.0)
    assert path.stat().st_size == before
    assert count(path, "message_ins") == 2
    assert "was not compacted: interrupted (limit 0 s)" in caplog.text


def test_a_database_in_use_is_left_alone(database: Found, caplog: pytest.LogCaptureFixture) -> None:
    """Somebody else writes to it: nothing is removed, and the log says why."""
    path, _, _ = database
    with sqlite3.connect(path, isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        tidy(path)
        other.execute("ROLLBACK")
    assert "was not compacted: database is locked" in caplog.text
    assert count(path, "message_ins") == 2


def test_what_is_no_database_stops_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A missing file is none of its business; one of another kind is Flower's to refuse."""
    tidy(tmp_path / "missing.db")
    assert not caplog.text
    (tmp_path / "odd.db").write_text("no database" * 100)
    tidy(tmp_path / "odd.db")
    assert "was not compacted: file is not a database" in caplog.text
