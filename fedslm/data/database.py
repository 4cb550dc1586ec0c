"""Rows of a database, by URL and query. User and password come only from the environment.

Read-only: a query cannot change anything on SQLite and PostgreSQL. Rows come through a server-side
cursor, so a result may exceed memory.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

from fedslm.data.columns import Wanted
from fedslm.data.tables import BATCH_ROWS, tables_of
from fedslm.errors import DataError
from fedslm.storage import is_text

if TYPE_CHECKING:
    import pyarrow as pa
    from sqlalchemy import URL, Engine

USER, PASSWORD = "FEDSLM_DATABASE_USER", "FEDSLM_DATABASE_PASSWORD"
_CONNECT_SECONDS = 5
_SECRET_KEY = re.compile(r"(pass|pwd|token|secret|credential)\w*\s*=", re.IGNORECASE)
_OPTIONS: dict[str, dict[str, Any]] = {
    "postgresql": {"connect_timeout": _CONNECT_SECONDS},
    "mysql": {"connect_timeout": _CONNECT_SECONDS},
    "mariadb": {"connect_timeout": _CONNECT_SECONDS},
    "sqlite": {"timeout": _CONNECT_SECONDS},
}


def is_url(source: str) -> bool:
    """True for a database URL.

    >>> is_url("postgresql+psycopg://host/notes"), is_url("owner/name")
    (True, False)
    """
    return re.match(r"[A-Za-z][A-Za-z0-9+]*://", source) is not None


def holds_password(source: str) -> bool:
    """True for a (possibly malformed) URL with a password, which config files and logs would expose.

    >>> holds_password("postgresql://ada:secret@host/notes"), holds_password("postgresql://ada@host/notes")
    (True, False)
    """
    rest = unquote(re.sub(r"^[A-Za-z0-9+]*:?//?", "", source))
    return bool(re.search(r":[^@]*@", rest) or _SECRET_KEY.search(rest))


def refuse_password(source: str) -> None:
    """Refuses a URL with a password.

    Raises:
        DataError: The URL has a password; the message does not show it.
    """
    if holds_password(source):
        raise DataError(f"the database's URL holds a password; set {PASSWORD} in the environment")


def tables_from(source: str, query: str, key: str, wanted: Wanted | None = None) -> Iterator[pa.Table]:
    """Runs a query and reads its rows in chunks.

    Args:
        source: URL without a password, such as ``postgresql+psycopg://host:5432/notes``.
        query: One SQL statement that returns rows.
        key: Dotted key of the query, for errors.
        wanted: Columns to read; None: all.

    Raises:
        DataError: The URL, its driver, the connection or the query cannot be used, or the query returns
            no rows. No message contains the password.
    """
    if holds_password(source):
        raise DataError(
            f"the database's URL holds a password; set {PASSWORD} in the environment instead"
        )
    return tables_of(_rows(source, query, key), f"the result of {key}", wanted or Wanted())


def _rows(source: str, query: str, key: str) -> Iterator[Mapping[str, Any]]:
    """Yields the rows of a query."""
    from sqlalchemy.exc import SQLAlchemyError

    engine = _engine(source)
    options = {"stream_results": True, "yield_per": BATCH_ROWS, "no_parameters": True}
    if engine.dialect.name == "postgresql":
        engine = engine.execution_options(postgresql_readonly=True)
    connected, number = False, 0
    try:
        with engine.connect() as connection:
            connected = True
            if engine.dialect.name == "sqlite":
                connection.connection.driver_connection.set_authorizer(_reads)  # type: ignore[union-attr]
            result = connection.exec_driver_sql(query, execution_options=options)
            if not result.returns_rows:
                raise DataError(f"{key} gives no rows: it must be a SELECT")
            _refuse_twins(list(result.keys()), key)
            for number, row in enumerate(result.mappings(), 1):  # noqa: B007
                yield dict(row)
    except SQLAlchemyError as error:
        what = f"{key} fails" if connected else "the database cannot be reached"
        raise DataError(f"{what}: {_without_password(error)}") from None
    finally:
        engine.dispose()
    if number == 0:
        raise DataError(f"{key} gives no rows; check its conditions")


def _reads(action: int, *_: str | None) -> int:
    """SQLite's authorizer: allows reading and nothing else, such as attaching a file."""
    import sqlite3

    allowed = (
        sqlite3.SQLITE_SELECT,
        sqlite3.SQLITE_READ,
        sqlite3.SQLITE_FUNCTION,
        sqlite3.SQLITE_RECURSIVE,
        sqlite3.SQLITE_TRANSACTION,
    )
    return sqlite3.SQLITE_OK if action in allowed else sqlite3.SQLITE_DENY


def _engine(source: str) -> Engine:
    """Creates an engine that has not connected yet."""
    from sqlalchemy import NullPool, create_engine
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError

    try:
        url = _url(source)
        options = _OPTIONS.get(url.get_backend_name(), {})
        return create_engine(url, poolclass=NullPool, connect_args=options)
    except NoSuchModuleError as error:
        kinds = "postgresql+psycopg://…, sqlite:////…"
        raise DataError(f"data.source names no known kind of database: {error}; use {kinds}") from None
    except ModuleNotFoundError as error:
        remedy = 'pip install "fedslm[sql]" for PostgreSQL'
        raise DataError(f"the database's driver is not installed: {error}; {remedy}") from None
    except (ArgumentError, ValueError) as error:
        raise DataError(
            f"data.source is not a usable database URL: {_without_password(error)}"
        ) from None


def _url(source: str) -> URL:
    """Returns the URL with the environment's user and password; a SQLite file is opened read-only."""
    from sqlalchemy import make_url

    url = make_url(source)
    if url.get_backend_name() == "sqlite":
        if not url.database or not Path(url.database).is_file():
            raise DataError(f"data.source={source!r}: no such file; a path begins with sqlite:////")
        name = f"file:{quote(str(Path(url.database).absolute()))}"
        return url.set(database=name, query={"mode": "ro", "uri": "true"})
    for name in (USER, PASSWORD):
        if not is_text(os.environ.get(name, "")):
            raise DataError(f"{name} is not text; set it in UTF-8")
    return url.set(
        username=os.environ.get(USER) or url.username, password=os.environ.get(PASSWORD) or None
    )


def _refuse_twins(names: list[str], key: str) -> None:
    """Refuses duplicate column names: one column would hide the other."""
    twins = sorted({name for name in names if names.count(name) > 1})
    if twins:
        raise DataError(f"{key} names {', '.join(twins)} twice; rename one with AS")


def _without_password(error: Exception) -> str:
    """Returns a driver's error message on one line, without the password."""
    text = " ".join(str(getattr(error, "orig", None) or error).split())
    password = os.environ.get(PASSWORD)
    return text.replace(password, "***") if password else text
