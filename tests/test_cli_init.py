"""``fedslm init``: a config that passes its own check, from data that nobody has described."""

from __future__ import annotations

import csv
import json
import os
import pty
import sqlite3
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import Result
from support.commands import ROOT, assert_clear, run
from support.tiny import make_rows, write_rows

from fedslm.errors import TrainingError
from fedslm.training import probe

RENAMED = {"text": "note", "label": "department", "client": "site", "patient": "patient"}
CLASSES = ("--task", "classification", "--base", "demo")
PRIVATE = ("--unit", "record", "--epsilon", "8")
ALL = (*CLASSES, *PRIVATE, "--evaluation", "public.csv")


def rows_of(count: int, seed: int) -> list[dict[str, Any]]:
    """Rows whose columns no config knows by default."""
    return [{RENAMED[key]: row[key] for key in RENAMED} for row in make_rows(count, seed)]


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes rows as CSV."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two turns are enough: how long a pass takes is not tested."""
    monkeypatch.setattr(probe, "_MOST_TURNS", 2)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory with private and public records, in which the commands run."""
    monkeypatch.chdir(tmp_path)
    write_csv(tmp_path / "notes.csv", rows_of(90, 0))
    write_csv(tmp_path / "public.csv", rows_of(40, 1))
    return tmp_path


def written(path: str = "my.toml") -> dict[str, Any]:
    """The file, read; it passes its own check."""
    result = run("config", "check", path, "--data")
    assert result.exit_code == 0, result.output
    return tomllib.loads(Path(path).read_text())


def test_a_csv_becomes_a_config(place: Path) -> None:
    """Columns are guessed, and said to be; the file leaves the mechanism to a recipe, and holds no count."""
    before = {path.name for path in place.iterdir()}
    result = run("init", "my.toml", "--data", "notes.csv", *ALL, "--client-column", "site")
    assert result.exit_code == 0, result.output
    assert "text column: note (a guess; --text names another" in result.stderr
    assert "label column: department (a guess; --label names another" in result.stderr
    assert "classes: 2 (heart 45, bone 45)" in result.stderr
    assert "they stay on this screen" in result.stderr
    for part in (
        "ε = 8.000 at δ = 0.001 for one record",
        "noise multiplier",
        "simulate my.toml --plan",
    ):
        assert part in result.stdout
    assert ("signal-to-noise ratio" in result.stdout) != ("this will not learn" in result.stderr)
    assert {path.name for path in place.iterdir()} - before == {"my.toml"}
    values = written()
    assert values["data"] == {
        "source": "notes.csv",
        "evaluation_source": "public.csv",
        "text_column": "note",
        "label_column": "department",
        "partition": "natural",
        "natural_column": "site",
    }
    assert values["privacy"] == {"unit": "record", "epsilon": 8.0}
    assert values["federation"] == {"num_clients": 3}
    assert values["task"]["max_length"] == 16
    assert "45" not in Path("my.toml").read_text()


def test_a_database_with_people(place: Path) -> None:
    """A SQLite file by query; the unit is a column, and a plan that cannot learn says what would."""
    base = sqlite3.connect(place / "notes.db")
    base.execute("CREATE TABLE notes (note TEXT, department TEXT, site TEXT, patient TEXT)")
    values = [tuple(row.values()) for row in rows_of(90, 0)]
    base.executemany("INSERT INTO notes VALUES (?, ?, ?, ?)", values)
    base.commit()
    base.close()
    source = f"sqlite:///{place / 'notes.db'}"
    arguments = ("--data", source, "--query", "SELECT * FROM notes", "--evaluation", "public.csv")
    missing = run("init", "my.toml", "--data", source, *CLASSES)
    assert_clear(missing, "Unusable", "--query", "--evaluation-query", "--unit", "--epsilon")
    unit = ("--unit", "patient", "--epsilon", "0.5")
    result = run("init", "my.toml", *arguments, *CLASSES, *unit)
    assert result.exit_code == 0, result.output
    assert "people: 18 different values of patient, 5.0 records each" in result.stderr
    assert "this will not learn" in result.stderr
    assert "users at each client" in result.stderr
    found = written()
    assert found["privacy"] == {"unit": "user", "unit_column": "patient", "epsilon": 0.5}
    assert found["data"]["train_query"] == "SELECT * FROM notes"
    assert "train_split" not in found["data"]


def test_a_layout_needs_no_names(place: Path, family_directory: Callable[[str, str], Path]) -> None:
    """JSON lines with prompt and completion, without privacy: no column is written, and no privacy is claimed."""
    rows = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(12)]
    write_rows(place / "train.jsonl", rows)
    write_rows(place / "test.jsonl", rows[:1] + [{"prompt": "other", "completion": "word"}] * 3)
    base = str(family_directory("llama", "instruction"))
    result = run(
        "init", "my.toml", "--data", ".", "--task", "instruction", "--base", base, "--unit", "none"
    )
    assert result.exit_code == 0, result.output
    assert "columns: prompt, completion, a layout that the task knows" in result.stderr
    assert "none: anybody who gets the adapter may learn about single records" in result.stdout
    values = written()
    assert values["data"] == {"source": ".", "evaluation_split": "test"}
    assert values["privacy"] == {"unit": "none"}


def test_tags_in_parquet(place: Path, family_directory: Callable[[str, str], Path]) -> None:
    """Lists of words and of tags are told apart by their values, whatever they are called."""
    rows = [{"marks": ["O", "B-sign"], "terms": ["patient", f"sign{i}"], "id": i} for i in range(30)]
    pq.write_table(pa.Table.from_pylist(rows), place / "train.parquet")
    pq.write_table(pa.Table.from_pylist(rows[:8]), place / "test.parquet")
    base = str(family_directory("bert", "token-classification"))
    task = ("--data", str(place), "--task", "token-classification", "--base", base, "--unit", "none")
    assert run("init", "my.toml", *task).exit_code == 0
    values = written()
    assert (values["data"]["text_column"], values["data"]["label_column"]) == ("terms", "marks")


def test_the_task_is_guessed(place: Path, family_directory: Callable[[str, str], Path]) -> None:
    """Without --task the columns and the base decide, and it is said to be a guess."""
    arguments = (*PRIVATE, "--evaluation", "public.csv")
    result = run("init", "my.toml", "--data", "notes.csv", "--base", "demo", *arguments)
    assert result.exit_code == 0, result.output
    guess = "task: classification (a guess: department has 2 different values; --task names another)"
    assert guess in result.stderr
    assert written()["task"]["name"] == "classification"
    rows = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(12)]
    write_rows(place / "train.jsonl", rows)
    write_rows(place / "test.jsonl", [{"prompt": "other", "completion": "word"}] * 3)
    for family, task in (("llama", "instruction"), ("t5", "seq2seq")):
        base = ("--base", str(family_directory(family, task)), "--unit", "none")
        result = run("init", f"{task}.toml", "--data", ".", *base)
        assert result.exit_code == 0, result.output
        assert f"task: {task} (a guess: prompt, completion;" in result.stderr
        assert written(f"{task}.toml")["task"]["name"] == task


def test_the_time_is_an_estimate(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said to be one, is left out on request, and a base that cannot be timed stops nothing."""
    arguments = ("init", "my.toml", "--force", "--data", "notes.csv", *ALL)
    told = " ".join(run(*arguments).stdout.split())
    assert "time an estimate: about" in told
    assert "from passes timed on this machine" in told
    without = run(*arguments, "--no-timing")
    assert "not estimated (--no-timing)" in without.stdout
    assert "timing passes" not in without.stderr

    def untimed(*_: Any) -> float:
        raise TrainingError("no pass could be timed: too large")

    monkeypatch.setattr(probe, "seconds_per_token", untimed)
    failed = run(*arguments)
    assert failed.exit_code == 0, failed.output
    assert "unknown: no pass could be timed: too large" in failed.stdout


def test_an_open_guess_is_an_error(place: Path, family_directory: Callable[[str, str], Path]) -> None:
    """Without a terminal: what fits, what the base cannot do, and the remedy; nothing is written."""
    write_csv(place / "sites.csv", [{"line": f"some words {i}", "ward": "ab"[i % 2]} for i in range(9)])
    write_csv(place / "lines.csv", [{"line": f"some words {i}"} for i in range(9)])
    decoder = str(family_directory("llama", "instruction"))
    for data, base, parts in (
        ("sites.csv", decoder, ("fit classification (ward has 2 different values); causal-lm (line",)),
        ("lines.csv", "demo", ("fit causal-lm (line has texts), which --base=demo cannot do",)),
    ):
        evaluation = ("--evaluation", "public.csv", *PRIVATE)
        result = run("init", "my.toml", "--data", data, "--base", base, *evaluation)
        assert_clear(result, "Unusable", "--task is missing", "give one of classification", *parts)
        assert not Path("my.toml").exists()


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ((), "Unusable", ("--data: private records", "--base", "--unit", "--epsilon")),
        (("--data", "notes.csv", *CLASSES, *PRIVATE), "Unusable", ("--evaluation", "data split")),
        (("--data", "no.csv", *ALL), "DataError", ("--data='no.csv'", "no such file")),
        (
            ("--data", "notes.csv", *ALL, "--evaluation", "no.csv"),
            "DataError",
            ("--evaluation='no.csv': no such file",),
        ),
        (
            ("--data", ".", *CLASSES, *PRIVATE, "--train-split", "notes"),
            "DataError",
            ("--data='.' has no split 'test'", "--train-split or --evaluation-split"),
        ),
        (
            ("--data", "notes.csv", *ALL, "--evaluation", "notes.csv"),
            "DataError",
            ("is the private training split", "set --evaluation"),
        ),
        (
            ("--data", "notes.csv", *ALL, "--text", "notte"),
            "DataError",
            ("--text='notte'", "note, dep"),
        ),
        (
            ("--data", "notes.csv", *ALL, "--unit", "person"),
            "DataError",
            ("--unit='person'", '"record"'),
        ),
        (("--data", "notes.csv", *ALL, "--base", "./no"), "ModelError", ("--base='./no'",)),
        (("--data", "notes.csv", *ALL, "--epsilon", "-1"), "ConfigError", ("--epsilon: value -1.0",)),
        (
            ("--data", "notes.csv", *ALL, "--task", "causal-lm"),
            "ModelError",
            ("a bert base cannot do --task='causal-lm'",),
        ),
        (
            ("--data", "many.csv", *ALL, "--epsilon", "1e-4"),
            "PrivacyError",
            ("out of reach", "more units"),
        ),
        (
            ("--data", "notes.csv", *ALL, "--unit", "none"),
            "Unusable",
            ("--epsilon is only for a unit",),
        ),
        (
            ("--data", "three.csv", *ALL, "--clients", "5"),
            "DataError",
            ("--clients=5 must be at most 3",),
        ),
        (
            ("--data", "notes.csv", *ALL, "--unit", "patient", "--clients", "3"),
            "DataError",
            ("divide the records of one patient", "--client-column"),
        ),
        (("--data", "one.csv", *ALL), "DataError", ("all records have the same class, 'heart'",)),
        (("--data", "texts.csv", *ALL), "DataError", ("no column looks like the label", "--label")),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, tuple) else None,
)
def test_bad_wishes(place: Path, arguments: tuple[str, ...], kind: str, words: tuple[str, ...]) -> None:
    """Each ends with one clear error that names the option or the bound, and writes nothing."""
    write_csv(place / "many.csv", rows_of(2000, 0))
    write_csv(place / "three.csv", rows_of(3, 0))
    write_csv(place / "one.csv", [row for row in rows_of(20, 0) if row["department"] == "heart"])
    write_csv(place / "texts.csv", [{"note": f"some words {i}", "id": i} for i in range(9)])
    result = run("init", "my.toml", *arguments)
    assert_clear(result, kind, *words)
    assert not Path("my.toml").exists()


def test_three_records_are_said_to_be_too_few(place: Path) -> None:
    """A plan for three records is written, and says that it will not learn and what would."""
    write_csv(place / "three.csv", rows_of(3, 0))
    result = run(
        "init", "my.toml", "--data", "three.csv", *CLASSES, "--evaluation", "public.csv", *PRIVATE
    )
    assert result.exit_code == 0, result.output
    assert "this will not learn" in result.stderr
    assert "records at each client" in result.stderr


def test_nothing_is_overwritten(place: Path) -> None:
    """An existing file stays, unless --force is given; a place that cannot be written is refused first."""
    Path("my.toml").write_text("mine")
    arguments = ("--data", "notes.csv", *ALL)
    assert_clear(run("init", "my.toml", *arguments), "Unusable", "exists", "--force")
    assert Path("my.toml").read_text() == "mine"
    assert_clear(run("init", ".", *arguments), "Unusable", "is a directory")
    assert_clear(run("init", "my.toml/a.toml", *arguments), "Unusable", "not a writable directory")
    assert run("init", "my.toml", *arguments, "--force").exit_code == 0
    assert written()["privacy"]["epsilon"] == 8.0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_cannot_be_written(place: Path) -> None:
    """Nothing is asked and nothing is read."""
    (place / "closed").mkdir(mode=0o500)
    assert_clear(run("init", "closed/my.toml"), "Unusable", "cannot be written")


def test_a_person_is_asked(place: Path) -> None:
    """On a terminal everything that is missing is asked for, and a guess is the default answer."""
    answers = ("notes.csv", "demo", "record", "8", "public.csv", "", "", "department")
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "fedslm", "init", "my.toml"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "dumb"},
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.write(ours, "".join(f"{answer}\n" for answer in answers).encode())
    out, err = process.communicate(timeout=600)
    os.close(ours)
    os.close(theirs)
    assert process.returncode == 0, err
    assert "wrote my.toml" in out
    assert "none is assumed" in err
    assert "the columns fit classification: department has 2 different values" in err
    assert "[classification]" in err
    assert "text column" in err
    assert "[note]" in err
    assert written()["data"]["label_column"] == "department"


def test_a_json_value_stays_text(place: Path) -> None:
    """Paths with quotes and backslashes are written so that they are read back."""
    odd = place / 'a "b" \\ ü'
    odd.mkdir()
    write_rows(odd / "train.jsonl", rows_of(30, 0))
    write_rows(odd / "test.jsonl", rows_of(20, 1))
    result: Result = run("init", "my.toml", "--data", str(odd), *CLASSES, "--unit", "none")
    assert result.exit_code == 0, result.output
    assert written()["data"]["source"] == str(odd)
    assert json.dumps(str(odd), ensure_ascii=False) in Path("my.toml").read_text()
