"""Tests of records in memory: a run on them equals the run on a file, and nothing is left of a failed call."""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
from support.tiny import PATIENT, PRIVATE, make_rows

import fedslm
from fedslm.config import Config
from fedslm.errors import ConfigError, DataError, RunError

Make = Callable[..., Config]
Rows = list[dict[str, Any]]
TRAIN, PUBLIC = make_rows(90, 0), make_rows(40, 1)


def without_client(rows: Rows) -> Rows:
    """Rows without the column that names the client."""
    return [{name: value for name, value in row.items() if name != "client"} for row in rows]


def by_client(rows: Rows) -> dict[str, Rows]:
    """The same rows as one list for each client."""
    names = sorted({row["client"] for row in rows})
    return {name: without_client([row for row in rows if row["client"] == name]) for name in names}


def sections_in(config: Config) -> dict[str, Any]:
    """A config without a source of data, and without what a mapping of clients says."""
    sections = config.model_dump(exclude_unset=True)
    sections["data"] = {}
    del sections["federation"]["num_clients"]
    return sections


@pytest.fixture(scope="module")
def from_file(config_in: Make, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The adapter of a run on the same rows in files."""
    result = fedslm.simulate(config_in(tmp_path_factory.mktemp("file") / "run"))
    return str(result.report["adapter_sha256"])


@pytest.mark.parametrize(
    "made",
    [
        list,
        datasets.Dataset.from_list,
        pd.DataFrame,
        lambda rows: pd.DataFrame(rows, index=[7] * len(rows)),
    ],
    ids=["list", "dataset", "frame", "frame with an index"],
)
def test_each_kind_trains_what_a_file_trains(
    config_in: Make, tmp_path: Path, from_file: str, made: Callable[[Rows], Any]
) -> None:
    """Without noise the adapter is that of the same rows in files, to the last bit."""
    config = config_in(tmp_path / "run")
    result = fedslm.simulate(config, train=made(TRAIN), evaluation=made(PUBLIC))
    assert result.report["adapter_sha256"] == from_file


@pytest.mark.parametrize("made", [list, datasets.Dataset.from_list, pd.DataFrame])
def test_a_mapping_names_the_clients(
    config_in: Make, tmp_path: Path, from_file: str, made: Callable[[Rows], Any]
) -> None:
    """It gives the partition and the number of clients; the run equals one on a file with a column."""
    sections = sections_in(config_in(tmp_path / "run"))
    clients = {name: made(rows) for name, rows in by_client(TRAIN).items()}
    result = fedslm.simulate(sections, train=clients, evaluation=PUBLIC)
    assert result.report["adapter_sha256"] == from_file
    assert sorted(result.report["clients"]) == sorted(clients)


def test_only_what_is_read_is_copied(config_in: Make, tmp_path: Path) -> None:
    """Other columns, whatever they hold, stay out of the run directory; nobody else can read the rest."""
    name = "Ms Whoever"
    rows = [{**row, "name": name, "odd": object()} for row in TRAIN]
    config = config_in(tmp_path / "run", privacy=PRIVATE)
    result = fedslm.simulate(config, train=rows, evaluation=PUBLIC, overrides={"federation.rounds": 1})
    assert not any(
        name.encode() in each.read_bytes() for each in result.directory.rglob("*") if each.is_file()
    )
    folder = result.directory / "data" / "given"
    modes = {each.name: stat.S_IMODE(each.stat().st_mode) for each in folder.iterdir()}
    assert modes == {"train.arrow": 0o600, "evaluation.arrow": 0o600}
    assert [stat.S_IMODE(each.stat().st_mode) for each in (folder, folder.parent)] == [0o700, 0o700]
    assert fedslm.resume(result.directory) == result


def test_a_run_on_given_records_is_resumed(config_in: Make, tmp_path: Path, from_file: str) -> None:
    """After an interruption it continues without the caller's objects, to the same adapter."""

    class Stops(fedslm.Observer):
        def on_round(self, record: object) -> None:
            raise KeyboardInterrupt

    config = config_in(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        fedslm.simulate(config, train=TRAIN, evaluation=PUBLIC, observers=[Stops()])
    assert fedslm.resume(tmp_path / "run").report["adapter_sha256"] == from_file


def test_class_numbers_become_names(config_in: Make, tmp_path: Path) -> None:
    """A ClassLabel of a data set is read as its names."""

    def made(rows: Rows) -> datasets.Dataset:
        return datasets.Dataset.from_list(rows).class_encode_column("label")

    overrides = {"federation.rounds": 1}
    result = fedslm.simulate(
        config_in(tmp_path / "run"), train=made(TRAIN), evaluation=made(PUBLIC), overrides=overrides
    )
    assert result.report["labels"] == ["bone", "heart"]


def test_train_alone_keeps_the_public_split_of_the_config(
    config_in: Make, tmp_path: Path, from_file: str
) -> None:
    """So does evaluation alone with the private split."""
    one = fedslm.simulate(config_in(tmp_path / "one"), train=TRAIN)
    two = fedslm.simulate(config_in(tmp_path / "two"), evaluation=PUBLIC)
    assert one.report["adapter_sha256"] == two.report["adapter_sha256"] == from_file
    assert one.metrics_after == two.metrics_after


def test_patients_are_read_from_given_records(config_in: Make, tmp_path: Path) -> None:
    """The unit's column is copied too; a missing one is named."""
    config = config_in(tmp_path / "run", privacy=PATIENT)
    small = {"federation.rounds": 1}
    named = r"no column \'patient\' \(privacy.unit_column\)"
    with pytest.raises(ConfigError, match=named):
        fedslm.simulate(config, train=without(TRAIN, "patient"), evaluation=PUBLIC, overrides=small)
    rows = [{**row, "patient": f"{row['client']}-{number % 20}"} for number, row in enumerate(TRAIN)]
    result = fedslm.simulate(config, train=rows, evaluation=PUBLIC, overrides=small)
    assert result.report["plan"]["unit"] == "user"


def without(rows: Rows, column: str) -> Rows:
    """Rows without a column."""
    return [{name: value for name, value in row.items() if name != column} for row in rows]


SPLITS = datasets.DatasetDict(train=datasets.Dataset.from_list(TRAIN))
STREAM = datasets.Dataset.from_list(TRAIN).to_iterable_dataset()
CLIENTS = by_client(TRAIN)
TWICE = pd.DataFrame([["a", "b"]], columns=["text", "text"])


@pytest.mark.parametrize(
    ("train", "part"),
    [
        ((row for row in TRAIN), "type generator: it can be read only once; give a list"),
        (iter(TRAIN), "type list_iterator: it can be read only once"),
        (STREAM, "IterableDataset: it is a stream"),
        (SPLITS, "holds 'train', which are splits and not clients"),
        ({"text": ["a"], "label": ["b"]}, "maps columns to values"),
        ("notes.csv", "type str: it names a source; set data.source"),
        (7, "type int: should be a datasets.Dataset, a list of dicts or a pandas frame"),
        ([], "train: is empty"),
        ({}, "train: has no clients"),
        (pd.DataFrame({"text": [], "label": []}), "train: is empty"),
        (TWICE, "train: has two columns of one name"),
        ([*TRAIN, "text"], "train: row 90 is of type str: should be a dict"),
        ({3: TRAIN}, "client 3: a name must be a text"),
        ({" a": TRAIN}, "client ' a': a name must be a text without spaces"),
        ({**CLIENTS, "b": []}, r"train\['b'\]: is empty"),
        ({**CLIENTS, "b": {"a": TRAIN}}, "only train may be a mapping"),
        (
            {**CLIENTS, "b": [{"text": "a"}]},
            r"train\['b'\]: has no column 'label' \(data.label_column\)",
        ),
        ({"a": TRAIN}, "has a column 'client' already"),
        (
            [{"note": "a", "label": "b", "client": "c"}],
            r"no column 'text' .*; it has note, label, client",
        ),
    ],
)
def test_what_is_no_data_is_named(config_in: Make, tmp_path: Path, train: Any, part: str) -> None:
    """It is said what was given and what may be; nothing is left."""
    config = config_in(tmp_path / "run")
    config = config if not isinstance(train, dict) else fedslm.Config(**sections_in_full(config))
    with pytest.raises(ConfigError, match=part):
        fedslm.simulate(config, train=train, evaluation=PUBLIC)
    assert not (tmp_path / "run").exists()


def sections_in_full(config: Config) -> dict[str, Any]:
    """Sections for a mapping of clients, with a source."""
    return {**sections_in(config), "data": {"source": "demo"}}


@pytest.mark.parametrize("train", [TRAIN, datasets.Dataset.from_list(TRAIN), pd.DataFrame(TRAIN)])
def test_train_is_not_the_evaluation_split(config_in: Make, tmp_path: Path, train: Any) -> None:
    """One object for both is refused, also as one client's records."""
    config = config_in(tmp_path / "run")
    with pytest.raises(ConfigError, match="evaluation: is train itself"):
        fedslm.simulate(config, train=train, evaluation=train)
    with pytest.raises(ConfigError, match=r"evaluation: is train\['a'\] itself"):
        fedslm.simulate(config, train={"a": train}, evaluation=train)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"federation.num_clients": 5}, "federation.num_clients: value 5: train has 3 clients"),
        ({"data.partition": "iid"}, "data.partition: value 'iid': train names the clients already"),
    ],
)
def test_a_mapping_and_a_config_agree(
    config_in: Make, tmp_path: Path, changes: dict[str, Any], part: str
) -> None:
    """The config does not say something else about the clients than the mapping."""
    sections = sections_in(config_in(tmp_path / "run"))
    with pytest.raises(ConfigError, match=part):
        fedslm.simulate(sections, train=CLIENTS, evaluation=PUBLIC, overrides=changes)


def test_public_records_are_required(config_in: Make, tmp_path: Path) -> None:
    """Without any in the config they are asked for; they are never taken from the private ones."""
    sections = sections_in(config_in(tmp_path / "run"))
    with pytest.raises(ConfigError, match="evaluation: is missing: give the public records"):
        fedslm.simulate(sections, train=CLIENTS)


def test_a_failed_call_leaves_nothing(config_in: Make, tmp_path: Path) -> None:
    """Whatever fails before the first round; an existing run is not touched."""
    config = config_in(tmp_path / "run")
    mixed = [*TRAIN, {**TRAIN[0], "text": 3}]
    with pytest.raises(DataError, match="train: column 'text' cannot be read"):
        fedslm.simulate(config, train=mixed, evaluation=PUBLIC)
    with pytest.raises(DataError, match="unknown"):
        fedslm.simulate(config, train=[*TRAIN, {**TRAIN[0], "label": "unknown"}], evaluation=PUBLIC)
    with pytest.raises(ConfigError, match="clients_per_round"):
        fedslm.simulate(
            config, train=TRAIN, evaluation=PUBLIC, overrides={"federation.clients_per_round": 9}
        )
    assert not (tmp_path / "run").exists()
    (tmp_path / "run" / "data" / "given").mkdir(parents=True)
    (tmp_path / "run" / "data" / "given" / "train.arrow").write_text("of another run")
    with pytest.raises(RunError, match="exists; continue it"):
        fedslm.simulate(config, train=TRAIN, evaluation=PUBLIC)
    assert (tmp_path / "run" / "data" / "given" / "train.arrow").read_text() == "of another run"


def test_private_records_do_not_become_public(notes: Path, config_in: Make, tmp_path: Path) -> None:
    """What was the private split stays private when records in memory take its place."""
    config = config_in(tmp_path / "run")
    sections = config.model_dump(exclude_unset=True)
    sections["data"] = {"source": str(notes / "train.jsonl"), "partition": "iid"}
    with pytest.raises(DataError, match="evaluation split is the private training split"):
        fedslm.simulate(sections, train=TRAIN)
    sections["data"] = {"source": str(notes), "public_split": "train", "partition": "iid"}
    with pytest.raises(DataError, match="public split is the private training split"):
        fedslm.simulate(sections, train=TRAIN, evaluation=PUBLIC)
    assert not (tmp_path / "run").exists()


def test_copies_are_refused(config_in: Make, tmp_path: Path) -> None:
    """Records of train are not public, nor those of two clients, in whatever object they come."""
    sections = sections_in(config_in(tmp_path / "run"))
    rows = without_client(TRAIN)
    for twin in (rows, list(rows), pd.DataFrame(rows)):
        private = {**PRIVATE, "overlapping": False}
        with pytest.raises(ConfigError, match=r"train\['b'\].*privacy\.overlapping = true"):
            fedslm.simulate(
                {**sections, "privacy": private}, train={"a": rows, "b": twin}, evaluation=PUBLIC
            )
    with pytest.raises(ConfigError, match="evaluation: has the records of train"):
        fedslm.simulate(sections, train=by_client(TRAIN), evaluation=pd.DataFrame(TRAIN))


@pytest.mark.parametrize(
    ("names", "part"),
    [
        (("train", "test", "unsupervised"), "splits and not clients"),
        (("train_sft", "more"), "splits and not clients"),
        (("\ud800", "b"), "a name must be a text"),
        (("\u00e9", "e\u0301"), "different Unicode forms"),
    ],
)
def test_what_is_no_client_is_named(
    config_in: Make, tmp_path: Path, names: tuple[str, ...], part: str
) -> None:
    """Splits would be trained on as clients; two forms of one name would be one client."""
    with pytest.raises(ConfigError, match=part):
        fedslm.simulate(
            sections_in(config_in(tmp_path / "run")),
            train={name: without_client(TRAIN) for name in names},
            evaluation=PUBLIC,
        )
