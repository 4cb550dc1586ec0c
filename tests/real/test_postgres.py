"""A real PostgreSQL server as the source: the test starts one of its own, and stops it."""

from __future__ import annotations

import gzip
import json
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from sqlalchemy import URL, Engine, NullPool, create_engine, text
from sqlalchemy.exc import OperationalError
from typer.testing import CliRunner

from fedslm.cli import app
from fedslm.data import database, store
from fedslm.errors import DataError

pytestmark = pytest.mark.real
ROOT = Path(__file__).parent.parent.parent
USER = "ada"
STARTING_SECONDS = 30.0


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        url: Without user and password.
        password: Of the user ``ada``.
        process: The server itself.
    """

    url: str
    password: str
    process: subprocess.Popen[bytes]

    def engine(self) -> Engine:
        """An engine for the test's own work on the server."""
        port = int(self.url.rsplit(":", 1)[1].split("/")[0])
        url = URL.create("postgresql+psycopg", USER, self.password, "127.0.0.1", port, "postgres")
        return create_engine(url, poolclass=NullPool)

    def config(self, train: str, evaluation: str, directory: Path) -> list[str]:
        """Options of ``fedslm simulate`` for a tiny private run on two queries."""
        values = {
            "run.directory": str(directory),
            "engine.workers": 0,
            "data.source": self.url,
            "data.train_query": train,
            "data.evaluation_query": evaluation,
            "data.partition": "iid",
            "data.max_evaluation_records": 100,
            "lora.rank": 1,
            "training.local_steps": 2,
            "training.batch_size": 8,
            "federation.num_clients": 3,
            "federation.rounds": 2,
        }
        pairs = [f"{key}={json.dumps(value)}" for key, value in values.items()]
        return [part for pair in pairs for part in ("--set", pair)]


def binaries() -> Path:
    """The directory with initdb and postgres; Debian does not put it on the path."""
    found = [*Path("/usr/lib/postgresql").glob("*/bin/initdb"), *Path("/usr/pgsql").glob("bin/initdb")]
    on_path = shutil.which("initdb")
    if on_path is not None:
        found.append(Path(on_path).resolve())
    if not found:
        pytest.skip("PostgreSQL is not installed (initdb is neither on the path nor in /usr/lib)")
    return found[0].parent


def unprivileged() -> str | None:
    """Whom the server runs as: it refuses root."""
    if os.geteuid() != 0:
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server of this test's own: its own directory, port and password."""
    bin_directory, user, password = binaries(), unprivileged(), secrets.token_urlsafe(24)
    directory = Path(tempfile.mkdtemp(prefix="fedslm-postgres-"))
    who: dict[str, Any] = {"user": user, "extra_groups": []} if user is not None else {}
    (directory / "password").write_text(password)
    if user is not None:
        entry = pwd.getpwnam(user)
        who["group"] = entry.pw_gid
        for path in (directory, directory / "password"):
            os.chown(path, entry.pw_uid, entry.pw_gid)
    options = [f"--pwfile={directory}/password", "--auth=scram-sha-256", "--encoding=UTF8"]
    made = [str(bin_directory / "initdb"), "-D", f"{directory}/data", "-U", USER, "--no-sync", *options]
    subprocess.run(made, check=True, capture_output=True, cwd="/", **who)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = ["listen_addresses=127.0.0.1", "unix_socket_directories=", "fsync=off"]
    started = [str(bin_directory / "postgres"), "-D", f"{directory}/data", "-p", str(port)]
    started += [part for setting in settings for part in ("-c", setting)]
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(started, stdout=log, stderr=log, cwd="/", **who)
    running = Server(f"postgresql+psycopg://127.0.0.1:{port}/postgres", password, process)
    try:
        _wait(running, directory / "log")
        yield running
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=30)
        shutil.rmtree(directory)


def _wait(running: Server, log: Path) -> None:
    """Waits until the server answers."""
    deadline = time.monotonic() + STARTING_SECONDS
    while True:
        try:
            running.engine().connect().close()
            return
        except OperationalError:
            assert running.process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)


@pytest.fixture(scope="module")
def messages(server: Server, assets: Path) -> dict[str, list[dict[str, Any]]]:
    """Real text messages, in two tables of the server."""
    rows = {}
    with server.engine().begin() as connection:
        for split in ("train", "test"):
            file = assets / "data" / "sms_spam" / f"{split}.jsonl.gz"
            with gzip.open(file, "rt", encoding="utf-8") as lines:
                rows[split] = [json.loads(line) for line in lines][:900]
            made = (
                "(id serial PRIMARY KEY, text text, label text, client text, at timestamptz, unit uuid)"
            )
            connection.execute(text(f"CREATE TABLE {split} {made}"))
            connection.execute(
                text(
                    f"INSERT INTO {split} (text, label, client, at, unit) VALUES "  # noqa: S608
                    f"(:text, :label, :client, now(), gen_random_uuid())"
                ),
                rows[split],
            )
    return rows


def run(*arguments: str) -> Result:
    """Runs the command line in this process."""
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200", "TERM": "dumb"})


def as_user(monkeypatch: pytest.MonkeyPatch, password: str) -> None:
    """Gives credentials, as an operator does."""
    monkeypatch.setenv(database.USER, USER)
    monkeypatch.setenv(database.PASSWORD, password)


DEMO = str(ROOT / "simulations" / "demo.toml")
TRAIN, TEST = "SELECT text, label FROM train ORDER BY id", "SELECT text, label FROM test ORDER BY id"


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_a_private_simulation_runs_from_a_database(
    server: Server,
    messages: dict[str, list[dict[str, Any]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    streaming: str,
) -> None:
    """Clients train on the rows of the query within their budget, and no file holds the password."""
    as_user(monkeypatch, server.password)
    options = server.config(TRAIN, TEST, tmp_path / "run")
    done = run("simulate", DEMO, *options, "--set", f"data.streaming={streaming}", "--json")
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["stopped"] == ""
    assert 0 < report["epsilon"] <= 8.0
    assert report["labels"] == ["ham", "spam"]
    got = [row for client in range(3) for row in store.read_client(tmp_path / "run" / "data", client)]
    expected = [(row["text"], row["label"]) for row in messages["train"]]
    assert sorted((row["text"], row["label"]) for row in got) == sorted(expected)
    assert server.password not in done.output
    for path in (tmp_path / "run").rglob("*"):
        assert path.is_dir() or server.password.encode() not in path.read_bytes()


def test_a_wrong_password_is_refused_and_not_shown(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the user and no password, and leaves no run behind."""
    as_user(monkeypatch, "not-the-pass-word")
    done = run("simulate", DEMO, *server.config(TRAIN, TEST, tmp_path / "run"))
    assert done.exit_code == 2
    assert "error: " in done.stderr
    assert "the database cannot be reached" in done.stderr
    assert f'password authentication failed for user "{USER}"' in done.stderr
    assert "not-the-pass-word" not in done.output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("query", "part"),
    [
        ("SELECT text, label FROM train WHERE id < 0", "gives no rows"),
        ("SELECT note FROM train", 'column "note" does not exist'),
        ("DELETE FROM train RETURNING text, label", "fails"),
        ("SELECT nextval('train_id_seq') AS text", "read-only transaction"),
        ("SELECT text, text FROM train", "names text twice"),
    ],
)
def test_a_query_that_cannot_be_used_is_named(
    server: Server,
    messages: dict[str, list[dict[str, Any]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    query: str,
    part: str,
) -> None:
    """A query without rows, with an error, or that would change something: one line, and nothing changed."""
    as_user(monkeypatch, server.password)
    done = run("simulate", DEMO, *server.config(query, TEST, tmp_path / "run"))
    assert done.exit_code == 2
    assert part in done.stderr
    assert "data.train_query" in done.stderr
    assert not (tmp_path / "run").exists()
    with server.engine().connect() as connection:
        count = connection.execute(text("SELECT count(*) FROM train")).scalar_one()
    assert count == len(messages["train"])


def test_rows_come_in_pieces(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first thousand of a billion rows are there at once: the server keeps the rest."""
    as_user(monkeypatch, server.password)
    query = "SELECT generate_series(1, 1000000000) AS id"
    tables = database.tables_from(server.url, query, "data.train_query")
    first = next(tables)
    assert first["id"].to_pylist() == list(range(1, 1001))
    tables.close()  # type: ignore[attr-defined]


def test_types_of_the_database_are_kept(
    server: Server, messages: dict[str, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers, times, lists, JSON and identifiers come as what they are, and %, : and casts pass."""
    as_user(monkeypatch, server.password)
    query = """SELECT id, at, unit, ARRAY['O', 'B-x'] AS tags, 2.50::numeric(6, 2) AS price,
        '{"a": 1}'::jsonb AS more, 'a:b %s 12:30' AS text FROM train WHERE text LIKE '%' LIMIT 2"""
    (table,) = database.tables_from(server.url, query, "data.train_query")
    row = table.to_pylist()[0]
    assert (row["tags"], str(row["price"]), row["more"]) == (["O", "B-x"], "2.50", {"a": 1})
    assert row["text"] == "a:b %s 12:30"
    assert len(row["unit"]) == 36
    assert row["at"].tzinfo is not None


def test_a_server_that_is_gone_is_said_at_once(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A port where nobody listens is an error within seconds, without the password."""
    as_user(monkeypatch, server.password)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"postgresql+psycopg://127.0.0.1:{probe.getsockname()[1]}/postgres"
        with pytest.raises(DataError, match="the database cannot be reached") as caught:
            next(database.tables_from(url, "SELECT 1", "data.train_query"))
    assert server.password not in str(caught.value)
