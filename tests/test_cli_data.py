"""Tests of ``fedslm data``, and of what the command line says of bad data."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.commands import DEMO, assert_clear, run, tiny
from support.tiny import PRIVATE

from fedslm.config import Config
from fedslm.federation.checkpoint import RunDirectory


@pytest.fixture(autouse=True)
def own_level() -> Iterator[None]:
    """The command line's level of logging does not outlive a test."""
    logger = logging.getLogger("fedslm")
    before = logger.level
    yield
    logger.setLevel(before)


def preview(*arguments: str) -> dict[str, Any]:
    """``fedslm data preview --json``."""
    result = run("data", "preview", DEMO, *arguments, "--json")
    assert result.exit_code == 0, result.stderr
    values: dict[str, Any] = json.loads(result.stdout)
    return values


def notes(directory: Path, train: list[dict[str, Any]], test: list[dict[str, Any]]) -> str:
    """Writes a source, and gives its override."""
    for split, rows in (("train", train), ("test", test)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / f"{split}.jsonl").write_text(lines)
    return f"data.source={directory}"


def test_preview_counts_the_demo() -> None:
    """Five hospitals of 600 notes with six specialties each; no text is longer than the limit."""
    found = preview()
    assert [client["records"] for client in found["clients"]] == [600] * 5
    assert all(sum(client["labels"].values()) == 600 for client in found["clients"])
    assert len(found["labels"]) == 6
    assert (found["records"], found["left_out"], found["duplicates"]) == (3000, 0, 0)
    assert (found["cut_share"], found["unusable"], found["looked_at"]) == (0.0, 0, 3000)
    assert {client["units"] for client in found["clients"]} == {None}


def test_preview_says_which_columns_it_took(tmp_path: Path) -> None:
    """Conversations are found by their column; one that the base cannot read is counted."""
    turns = [{"from": "human", "value": "why"}, {"from": "gpt", "value": "because"}]
    rows = [{"conversations": turns} for _ in range(12)]
    source = notes(tmp_path, [*rows, {"conversations": turns[::-1]}], rows)
    options = [source, "data.partition=iid", "task.name=instruction", "task.pooling=native"]
    flags = [part for value in options for part in ("--set", value)]
    result = run("data", "preview", DEMO, *flags)
    assert "columns: data.text_column=conversations" in result.stdout
    assert "unusable: 1 of them" in result.stdout


def test_columns_that_pandas_wrote_are_named(tmp_path: Path) -> None:
    """A table by columns is one record to us: the error says how to write records."""
    table = {"text": {"0": "a", "1": "b"}, "label": {"0": "x", "1": "y"}}
    source = ("--set", notes(tmp_path, [table], [table]), "--set", "data.partition=iid")
    result = run("data", "preview", DEMO, *source)
    assert result.exit_code == 2
    assert_clear(result, "DataError", "data.text_column='text'", 'to_json(path, orient="records"')


def test_preview_counts_patients_and_long_texts() -> None:
    """Units are counted where the unit is the patient, and texts beyond the limit are measured."""
    patients = ["privacy.unit=patient", "privacy.unit_column=patient", "privacy.max_records_per_unit=4"]
    options = [part for value in (*patients, "task.max_length=20") for part in ("--set", value)]
    found = preview(*options)
    assert all(100 < client["units"] < 600 for client in found["clients"])
    assert found["cut_share"] > 0.5


def test_preview_shows_a_table_and_a_picture(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without --json there is a table with every client, the remarks, and a picture if one is asked for."""
    rows = [
        {"text": f"note {n}", "label": f"label-{n % 20:02d}", "site": f"s{n % 7}"} for n in range(200)
    ]
    source = notes(tmp_path, rows, [*rows[:20], {"text": "more", "label": "label-00", "site": "x"}])
    values = (source, "data.natural_column=site", "federation.num_clients=6")
    options = [part for value in values for part in ("--set", value)]
    result = run("data", "preview", DEMO, *options, "--plot", str(tmp_path / "data.png"))
    assert result.exit_code == 0, result.stderr
    for part in ("s0", "s5", "label-00 2", "…", "left out: 28", "duplicates: 20 (10.0%)", "data.png"):
        assert part in result.stdout
    assert "s6" not in result.stdout
    assert "20 of 200 training records" in caplog.text
    assert (tmp_path / "data.png").read_bytes().startswith(b"\x89PNG")


def test_preview_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    """A base on the hub is not fetched for a preview: lengths are left out, and that is said."""
    result = run("data", "preview", DEMO, "--set", "model.base=some-owner/some-model")
    assert result.exit_code == 0, result.stderr
    assert "lengths: not measured; some-owner/some-model is not a local directory" in result.stdout


@pytest.mark.parametrize("partition", ["iid", "dirichlet", "shard", "size"])
def test_preview_is_what_a_simulation_gets(tmp_path: Path, partition: str) -> None:
    """The preview's clients are those that a run of the same config trains."""
    from fedslm.config import from_toml
    from fedslm.data import store

    changes = [f"data.partition={partition}", notes(tmp_path, GOOD * 10, GOOD)]
    found = preview(*(part for change in changes for part in ("--set", change)))
    config = from_toml(DEMO, changes)
    written = store.write(
        tmp_path / "data",
        config.data,
        config.task,
        privacy=config.privacy,
        num_clients=config.federation.num_clients,
        seed=config.run.seed,
    )
    assert [client["name"] for client in found["clients"]] == list(written.names)
    assert [client["records"] for client in found["clients"]] == list(written.sizes)


def test_split_says_what_it_wrote(tmp_path: Path) -> None:
    """One file becomes two, and the two can be a source."""
    rows = [{"text": f"note {n}", "label": "ab"[n % 2], "patient": n // 4} for n in range(80)]
    (tmp_path / "notes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ("data", "split", str(tmp_path / "notes.jsonl"), "--unit", "patient", "--out")
    result = run(*arguments, str(tmp_path / "out"))
    assert result.exit_code == 0, result.stderr
    assert "train.parquet: 64 records, 16 values of patient" in result.stdout
    assert "test.parquet: 16 records, 4 values of patient" in result.stdout
    options = [f"data.source={tmp_path / 'out'}", "data.partition=iid"]
    found = preview(*(part for value in options for part in ("--set", value)))
    assert (found["records"], found["evaluation_records"]) == (64, 16)
    assert_clear(run(*arguments, str(tmp_path / "out")), "DataError", "exists")
    as_json = json.loads(run(*arguments, str(tmp_path / "json"), "--json").stdout)
    assert as_json["test_units"] == 4


def test_one_record_is_not_many(tmp_path: Path) -> None:
    """Numbers and their nouns agree in what is printed."""
    (tmp_path / "two.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    # Each unit draws its side by its own key: seed 2 puts one on each.
    options = ("--fraction", "0.5", "--seed", "2", "--out", str(tmp_path / "out"))
    result = run("data", "split", str(tmp_path / "two.jsonl"), *options)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("parquet: 1 record\n") == 2


def test_split_refuses_a_password_and_a_share_of_all(tmp_path: Path) -> None:
    """A URL with a password is refused without showing it; a share must be one."""
    out = ("--out", str(tmp_path / "out"))
    result = run("data", "split", "postgresql://ada:s3cret@host/notes", "--query", "SELECT 1", *out)
    assert_clear(result, "DataError", "FEDSLM_DATABASE_PASSWORD")
    assert "s3cret" not in result.output
    assert run("data", "split", "notes.csv", "--fraction", "1", *out).exit_code == 2


GOOD = [{"text": f"note {n}", "label": "ab"[n % 2]} for n in range(20)]


@pytest.mark.parametrize(
    ("train", "changes", "parts"),
    [
        (GOOD, ["data.text_column=body"], ["data.text_column='body'", "it has text, label"]),
        ([*GOOD, {"text": "x", "label": 3}], [], ["'label' cannot be read", "int (rows 20)"]),
        ([*GOOD, {"text": "x", "label": "c"}], [], ["'c' (1) in rows 20", "known: a, b"]),
        ([*GOOD, {"text": " ", "label": "a"}], [], ["no text in column 'text' (rows 20)"]),
        ([], [], ["train.jsonl is empty"]),
        (GOOD, ["data.source=$NOTES_UNSET/data"], ["an environment variable in it is not set"]),
        (GOOD, ["data.source=notse"], ["no such file or directory"]),
        (GOOD, ["federation.num_clients=30"], ["20 records cannot be divided"]),
        (GOOD, ["data.partition=shard", "data.shards_per_client=9"], ["cannot be cut into 45 shards"]),
    ],
)
def test_bad_data_is_one_clear_message(
    tmp_path: Path, train: list[dict[str, Any]], changes: list[str], parts: list[str]
) -> None:
    """Exit code 2, at most a screen, the row and the remedy, and no run directory left behind."""
    (tmp_path / "notes").mkdir()
    values = [notes(tmp_path / "notes", train, GOOD[:4]), "data.partition=iid", *changes]
    result = run("simulate", DEMO, *tiny(tmp_path / "run", *values))
    assert_clear(result, "DataError", *parts)
    assert len(result.stderr) < 1000
    assert not (tmp_path / "run").exists()


def source_of(directory: Path, kind: str) -> None:
    """Writes a source that a run cannot use."""
    meta = pa.array([[("k", "v")]] * len(GOOD), pa.map_(pa.string(), pa.string()))
    lines = [json.dumps(row) + "\n" for row in GOOD]
    (directory / "test.jsonl").write_text("".join(lines[:4]))
    match kind:
        case "a map":
            table = pa.table({"text": [row["text"] for row in GOOD], "label": meta})
            pq.write_table(table, directory / "train.parquet")
        case "parts":
            for number in (1, 2):
                (directory / f"train.part{number}.jsonl").write_text("".join(lines))
        case "a piece":
            (directory / "train-00000-of-00002.jsonl").write_text("".join(lines))
        case "NaN":
            missing = json.dumps({"text": "a note", "label": float("nan")})
            (directory / "train.jsonl").write_text("".join(lines) + missing)
        case _:
            (directory / "train.csv").write_text("text;label\na note;a\n")


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("a map", ["column 'label' holds map<string, string>", "convert it"]),
        ("parts", ["train.part1.jsonl, train.part2.jsonl", "keep one"]),
        ("a piece", ["lacks 1 of 2 pieces", "train-00000-of-00002.jsonl"]),
        ("NaN", ["no label in column 'label' (rows 20)", "remove them"]),
        ("semicolons", ["separated by ';'", "save it with ','"]),
    ],
)
def test_a_source_that_cannot_be_used_is_one_clear_message(
    tmp_path: Path, kind: str, parts: list[str]
) -> None:
    """Whatever the format: exit code 2, what is wrong, the remedy, and no run directory left behind."""
    (tmp_path / "notes").mkdir()
    source_of(tmp_path / "notes", kind)
    values = [f"data.source={tmp_path / 'notes'}", "data.partition=iid"]
    assert_clear(run("simulate", DEMO, *tiny(tmp_path / "run", *values)), "DataError", *parts)
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


def test_a_column_that_nobody_reads_stops_no_run(tmp_path: Path) -> None:
    """Beside the columns that a run reads, Parquet may hold whatever it can."""
    columns = {key: [row[key] for row in GOOD] for key in GOOD[0]}
    meta = pa.array([[("k", "v")]] * len(GOOD), pa.map_(pa.string(), pa.string()))
    for split in ("train", "test"):
        pq.write_table(pa.table({**columns, "meta": meta}), tmp_path / f"{split}.parquet")
    values = [f"data.source={tmp_path}", "data.partition=iid"]
    result = run("simulate", DEMO, *tiny(tmp_path / "run", *values))
    assert result.exit_code == 0, result.stderr


def test_an_error_before_the_first_round_leaves_the_log_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever is raised, the run directory is gone, the clients' log is beside it, and is named."""
    from fedslm import simulation

    def fails(config: Config, directory: RunDirectory) -> None:
        (directory.path / "clients.log").write_text("what a client said")
        raise ZeroDivisionError

    monkeypatch.setattr(simulation, "_written", fails)
    result = run("simulate", DEMO, *tiny(tmp_path / "run"))
    assert isinstance(result.exception, ZeroDivisionError)
    assert [path.name for path in tmp_path.iterdir()] == ["run.clients.log"]
    assert (tmp_path / "run.clients.log").read_text() == "what a client said"
    assert str(tmp_path / "run.clients.log") in caplog.text


def test_check_with_data_finds_what_a_preview_finds(tmp_path: Path) -> None:
    """With --data a check refuses what a preview refuses, and makes its remarks."""
    source = ("--set", notes(tmp_path, GOOD, GOOD[:4]), "--set", "data.partition=iid")
    missing = (*source, "--set", "data.label_column=diagnosis")
    assert run("config", "check", DEMO, *missing).exit_code == 0
    for command in (("config", "check", "--data"), ("data", "preview")):
        result = run(*command, DEMO, *missing)
        assert_clear(result, "DataError", "data.label_column='diagnosis' is not a column")
    result = run("config", "check", DEMO, "--data", *source)
    assert result.exit_code == 0
    for part in ("training: 20 records", "duplicates: 4", "longer than task.max_length", "ok"):
        assert part in result.stdout


def test_a_run_reports_what_is_in_both_splits(tmp_path: Path) -> None:
    """The report of a run says how many training records the public split holds too."""
    (tmp_path / "notes").mkdir()
    values = [notes(tmp_path / "notes", GOOD, GOOD[:4]), "data.partition=iid"]
    result = run("simulate", DEMO, *tiny(tmp_path / "run", *values))
    assert result.exit_code == 0, result.stderr
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["training_records_in_public_split"] == 4
    assert "are in the public split too: 4." in (tmp_path / "run/report.md").read_text()


def test_a_private_run_reports_no_exact_count(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Under privacy the number of records in both splits stays with the researcher's data."""
    (tmp_path / "notes").mkdir()
    values = [
        notes(tmp_path / "notes", GOOD, GOOD[:4]),
        "data.partition=iid",
        *(f"privacy.{key}={value}" for key, value in PRIVATE.items()),
    ]
    result = run("simulate", DEMO, *tiny(tmp_path / "run", *values))
    assert result.exit_code == 0, result.stderr
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["plan"]["unit"] == "record"
    assert report["training_records_in_public_split"] is None
    assert "are in the public evaluation split too" in caplog.text
    assert "are in the public split" not in (tmp_path / "run/report.md").read_text()


def test_a_password_in_a_config_reaches_nothing(tmp_path: Path) -> None:
    """Neither the error nor a file holds it."""
    url = "data.source=postgresql://ada:s3cret@host/notes"
    for command in (("simulate",), ("config", "check"), ("config", "show"), ("data", "preview")):
        result = run(*command, DEMO, *tiny(tmp_path / "run", url, "data.train_query=SELECT 1"))
        assert_clear(result, "ConfigError", "data.source: holds a password", "FEDSLM_DATABASE_PASSWORD")
        assert "s3cret" not in result.output
    assert list(tmp_path.iterdir()) == []
