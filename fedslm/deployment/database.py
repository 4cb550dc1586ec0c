"""Shrinks the SuperLink's database before the SuperLink starts.

Flower removes a run's messages and objects when somebody queries a finished run, and never releases the
disk space. Before the SuperLink starts, and while no other process uses the file, data that belong to
no resumable run are removed, and the file is rewritten (SQLite's VACUUM) if a quarter of it is empty.
"""

from __future__ import annotations

import logging
import shutil
import sqlite3
import time
from contextlib import closing
from pathlib import Path

logger = logging.getLogger(__name__)
_MOST_SECONDS, _STEPS = 60.0, 100  # an object of 5 MiB takes few of SQLite's steps
_SMALLEST_BYTES, _EMPTY_SHARE, _LOG_SECONDS = 1 << 20, 0.25, 30 * 86_400.0
_UNFINISHED = """(SELECT run.run_id FROM run JOIN task ON task.task_id = run.primary_task_id
    WHERE task.finished_at IS NULL)"""
_REMOVE = (
    f"DELETE FROM message_ins WHERE run_id IS NULL OR run_id NOT IN {_UNFINISHED}",  # noqa: S608
    f"DELETE FROM message_res WHERE run_id IS NULL OR run_id NOT IN {_UNFINISHED}",  # noqa: S608
    f"DELETE FROM object_push_sessions WHERE run_id NOT IN {_UNFINISHED}",  # noqa: S608
    f"DELETE FROM run_objects WHERE run_id NOT IN {_UNFINISHED}",  # noqa: S608
    "DELETE FROM objects WHERE object_id NOT IN (SELECT object_id FROM run_objects)",
    "DELETE FROM task_logs WHERE timestamp < :now - :log_seconds",
    "DELETE FROM nonce_store WHERE expires_at < :now",
)


def tidy(path: Path, most_seconds: float = _MOST_SECONDS) -> None:
    """Removes data of finished runs, and releases the disk space; skips steps that fail.

    Args:
        path: The database; nothing happens if it does not exist.
        most_seconds: It stops after this time, with the database as it was before that step.
    """
    if not path.exists():
        return
    before, deadline = path.stat().st_size, time.monotonic() + most_seconds
    try:
        with closing(sqlite3.connect(path, timeout=1.0, isolation_level=None)) as database:
            database.set_progress_handler(lambda: time.monotonic() > deadline, _STEPS)
            database.execute("PRAGMA foreign_keys = ON")
            _remove(database)
            _vacuum(database, path)
    except (sqlite3.Error, OSError) as error:
        logger.warning("%s was not compacted: %s (limit %g s)", path, error, most_seconds)
        return
    after = path.stat().st_size
    if after < before:
        logger.info("%s has %.1f MiB, %.1f before", path, after / (1 << 20), before / (1 << 20))


def _remove(database: sqlite3.Connection) -> None:
    """Removes all of these data, or none."""
    database.execute("BEGIN IMMEDIATE")
    try:
        for statement in _REMOVE:
            database.execute(statement, {"now": time.time(), "log_seconds": _LOG_SECONDS})
    except sqlite3.Error:
        if database.in_transaction:
            database.execute("ROLLBACK")
        raise
    database.execute("COMMIT")


def _vacuum(database: sqlite3.Connection, path: Path) -> None:
    """Rewrites the file if enough of it is empty, and there is room for a copy."""
    (empty,), (pages,), (size,) = (
        database.execute(f"PRAGMA {name}").fetchone()
        for name in ("freelist_count", "page_count", "page_size")
    )
    if empty * size >= _SMALLEST_BYTES and empty >= _EMPTY_SHARE * pages:
        needed = 2 * (pages - empty) * size
        if shutil.disk_usage(path.parent).free < needed:
            raise OSError(f"the disk has less than {needed / (1 << 20):.0f} MiB free")
        database.execute("VACUUM")
    database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
