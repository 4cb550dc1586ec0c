"""Tests of databases as sources, on SQLite; tests/real/test_postgres.py has a server."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest

from fedslm.config import DataConfig, TaskConfig
from fedslm.data import database, sources
from fedslm.errors import DataError

TASK = TaskConfig(name="classification")
TRAIN = "SELECT text, label FROM notes WHERE split = 'train' ORDER BY id"
TEST = "SELECT text, label FROM notes WHERE split = 'test' ORDER BY id"


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """A database with notes of two splits, and with odd ones."""
    path = tmp_path / "odd name.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE notes (id INTEGER PRIMARY KEY, split, text, label, age)")
        connection.executemany(
            "INSERT INTO notes (split, text, label, age) VALUES (?, ?, ?, ?)",
            [
                *(("train", f"note {n}: 100 %", "ab"[n % 2], n) for n in range(2500)),
                *(("test", f"public {n}", "ab"[n % 2], None) for n in range(10)),
                ("mixed", "a", 1, 1),
                ("mixed", "b", "x", 1),
            ],
        )
    connection.close()
    return path


def config(path: Path, train: str = TRAIN, test: str = TEST) -> DataConfig:
    """A config for a SQLite file."""
    return DataConfig(source=f"sqlite:///{path}", train_query=train, evaluation_query=test)


def load_train(data: DataConfig) -> list[dict[str, Any]]:
    """The rows of the private query."""
    rows: list[dict[str, Any]] = sources.load_train(data, TASK, 0).to_list()
    return rows


def test_a_query_gives_its_rows(notes: Path) -> None:
    """All rows come, in order, however many; percent signs and colons are texts."""
    expected = [{"text": f"note {n}: 100 %", "label": "ab"[n % 2]} for n in range(2500)]
    assert load_train(config(notes)) == expected
    public = sources.load_evaluation(config(notes), TASK, 0)
    assert list(public["text"]) == [f"public {n}" for n in range(10)]
    like = "SELECT text, label FROM notes WHERE text LIKE '%1: 100 %' AND label <> ':a'"
    assert len(load_train(config(notes, like))) == 250


def test_the_public_query_is_not_the_private_one(notes: Path) -> None:
    """The same query, written a little differently, would publish private records."""
    again = TRAIN.replace(" FROM", "\n  from") + " ;"
    with pytest.raises(DataError, match="is the private training split"):
        sources.load_evaluation(config(notes, test=again), TASK, 0)


@pytest.mark.parametrize(
    ("query", "part"),
    [
        ("SELECT text, label FROM notes WHERE id < 0", "data.train_query gives no rows"),
        ("SELECT text, label FROM wards", "data.train_query fails: no such table: wards"),
        (
            "SELECT text FROM notes",
            "data.label_column='label' is not a column of the data; it has text",
        ),
        ("SELECT text, label AS text FROM notes", "names text twice"),
        ("DELETE FROM notes", "data.train_query fails: not authorized"),
        ("", "data.train_query"),
        (TRAIN.replace("train", "mixed"), "'label' cannot be read: int (rows 0) and str (rows 1)"),
    ],
)
def test_a_query_that_cannot_be_used_is_named(notes: Path, query: str, part: str) -> None:
    """No rows, an error, a missing column, a change: each is said in one line, and nothing changes."""
    before = notes.read_bytes()
    with pytest.raises(DataError) as caught:
        load_train(config(notes, query))
    assert part in str(caught.value)
    assert len(str(caught.value)) < 300
    assert notes.read_bytes() == before


def test_a_file_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    """SQLite would make an empty database of a misspelt name."""
    with pytest.raises(DataError, match="no such file"):
        load_train(config(tmp_path / "nothing.db"))
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    """Any other file is an error of ours."""
    (tmp_path / "notes.db").write_text("nothing of the kind, but long enough to have a header" * 20)
    with pytest.raises(DataError, match=r"data\.train_query fails: file is not a database"):
        load_train(config(tmp_path / "notes.db"))


@pytest.mark.parametrize(
    ("url", "part"),
    [
        ("postgresql+psycopg://127.0.0.1:1/notes", "the database cannot be reached: connection"),
        ("postgresql+psycopg://no.such.host.invalid/notes", "the database cannot be reached"),
        ("nothing://host/notes", "names no known kind of database"),
        ("postgresql+nothing://host/notes", "names no known kind of database"),
        ("mysql+pymysql://host/notes", "driver is not installed"),
        ("postgresql+psycopg://host:port/notes", "not a usable database URL"),
    ],
)
def test_a_database_that_cannot_be_used_is_said(
    monkeypatch: pytest.MonkeyPatch, url: str, part: str
) -> None:
    """Nobody there, no such kind, no driver, no port: an error of ours without the password."""
    monkeypatch.setenv(database.USER, "ada")
    monkeypatch.setenv(database.PASSWORD, "s3cret")
    with pytest.raises(DataError) as caught:
        load_train(DataConfig(source=url, train_query="SELECT 1"))
    assert part in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_credentials_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """User and password are the environment's; a user in the URL gives way."""
    url = "postgresql+psycopg://bob@host:5432/notes"
    monkeypatch.delenv(database.USER, raising=False)
    monkeypatch.delenv(database.PASSWORD, raising=False)
    assert (database._url(url).username, database._url(url).password) == ("bob", None)
    monkeypatch.setenv(database.USER, "ada")
    monkeypatch.setenv(database.PASSWORD, "p@ss:w/rd")
    made = database._url(url)
    assert (made.username, made.password, made.host, made.port) == ("ada", "p@ss:w/rd", "host", 5432)
    assert "p@ss" not in repr(made)


def test_a_url_with_a_password_is_refused_everywhere() -> None:
    """Also where no config was checked, and without showing it."""
    with pytest.raises(DataError, match=database.PASSWORD) as caught:
        load_train(DataConfig(source="postgresql://ada:s3cret@host/notes", train_query="SELECT 1"))
    assert "s3cret" not in str(caught.value)


def test_a_password_in_an_error_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a driver says, the password is not in it."""
    monkeypatch.setenv(database.PASSWORD, "s3cret")
    shown = database._without_password(ValueError("cannot use\n  s3cret here"))
    assert shown == "cannot use *** here"


def test_a_query_is_needed(notes: Path) -> None:
    """A database without a query says which key is missing."""
    with pytest.raises(DataError, match=r"data\.train_query is missing"):
        load_train(DataConfig(source=f"sqlite:///{notes}"))


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+psycopg://ada:correct horse@db/notes",
        "postgresql+psycopg://ada:tab\there@db/notes",
        "mssql+pyodbc:///?odbc_connect=DRIVER%3Dx%3BUID%3Dsa%3BPWD%3Dhunter2",
        "postgresql://db/notes?pass%77ord=x",
        "snowflake://db/notes?passcode=1",
        "athena://db?aws_secret_access_key=x",
        "bigquery://db?credentials_base64=x",
    ],
)
def test_passwords_are_seen_in_any_form(url: str) -> None:
    """Blanks, escapes and drivers' own names of secrets do not hide a password."""
    assert database.holds_password(url)


def test_a_query_leaves_no_file_behind(notes: Path, tmp_path: Path) -> None:
    """SQLite can attach and copy databases in a query; here it may read alone."""
    before = sorted(tmp_path.iterdir())
    for query in (f"ATTACH '{tmp_path}/other.db' AS other", f"VACUUM INTO '{tmp_path}/copy.db'"):
        with pytest.raises(DataError, match="authori"):
            load_train(config(notes, query))
    assert sorted(tmp_path.iterdir()) == before
