"""Kinds of data that no scenario has, from files to a trained adapter: by ``fedslm init`` and its config alone."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.commands import run
from support.tiny import WORDS, write_rows

import fedslm

pytestmark = pytest.mark.slow
Make = Callable[[Path], list[str]]
SITES = ("harbour", "valley", "market", "bridge")
PEOPLE = ("anna", "bilal", "chen", "dora")


def entities(directory: Path) -> list[str]:
    """JSON lines of words and tags, in a directory with both splits."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 60), ("test", 20)):
        rows = []
        for _ in range(count):
            person, site = generator.choice(PEOPLE), generator.choice(SITES)
            words = [str(person), "walked", "to", "the", str(site), "today"]
            rows.append({"tokens": words, "tags": ["B-PERSON", "O", "O", "O", "B-PLACE", "O"]})
        write_rows(directory / f"{split}.jsonl", rows)
    return ["--data", str(directory), "--unit", "record"]


def notes(directory: Path) -> list[str]:
    """A database of notes with their patients; a column says which are public."""
    generator = np.random.default_rng(1)
    base = sqlite3.connect(directory / "clinic.db")
    base.execute("CREATE TABLE visits (open INTEGER, finding TEXT, ward TEXT, patient TEXT)")
    for number in range(104):
        ward = ("heart", "bone")[number % 2]
        text = " ".join(generator.choice(WORDS[ward], size=6))
        values = (number >= 80, text, ward, f"patient {number // 4}")
        base.execute("INSERT INTO visits VALUES (?, ?, ?, ?)", values)
    base.commit()
    base.close()
    query = "SELECT finding, ward, patient FROM visits WHERE open = 0"
    public = "SELECT finding, ward, patient FROM visits WHERE open = 1"
    return [
        *("--data", f"sqlite:///{directory / 'clinic.db'}", "--unit", "patient"),
        *("--query", query, "--evaluation-query", public),
    ]


def problems(directory: Path) -> list[str]:
    """Word problems with a number as the answer, in two Parquet files."""
    generator = np.random.default_rng(2)
    for name, count in (("own", 60), ("open", 20)):
        rows = []
        for _ in range(count):
            left, right = map(int, generator.integers(1, 30, size=2))
            text = f"{generator.choice(PEOPLE)} has {left} apples and buys {right} more. How many?"
            rows.append({"question": text, "answer": left + right, "level": int(left > 15)})
        pq.write_table(pa.Table.from_pylist(rows), directory / f"{name}.parquet")
    return [
        *("--data", str(directory / "own.parquet"), "--unit", "record"),
        *("--evaluation", str(directory / "open.parquet")),
    ]


@pytest.mark.parametrize(
    ("make", "family", "task"),
    [
        (entities, None, "token-classification"),
        (notes, None, "classification"),
        (problems, "llama", "instruction"),
    ],
    ids=["entities", "notes", "problems"],
)
def test_own_data_from_init_to_an_adapter(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family_directory: Callable[[str, str], Path],
    make: Make,
    family: str | None,
    task: str,
) -> None:
    """The task is guessed, the config passes its check, and the run keeps its epsilon and can be used."""
    data = tmp_path / "data"
    data.mkdir()
    arguments = make(data)
    base = "demo" if family is None else str(family_directory(family, task))
    monkeypatch.chdir(tmp_path)
    drafted = run("init", "my.toml", *arguments, "--base", base, "--epsilon", "6", "--no-timing")
    assert drafted.exit_code == 0, drafted.output
    assert f"task: {task} (a guess: " in drafted.stderr
    checked = run("config", "check", "my.toml", "--data")
    assert checked.exit_code == 0, checked.output
    few = ("--set", "federation.rounds=2", "--set", "engine.workers=0")
    done = run("simulate", "my.toml", *few, "--json")
    assert done.exit_code == 0, done.output
    values: dict[str, Any] = json.loads(done.stdout)
    directory = Path(values["directory"])
    assert values["rounds"] == 2
    assert 0 < values["epsilon"] <= 6
    assert f"ε = {values['epsilon']:.3f}" in (directory / "report.md").read_text()
    result = fedslm.resume(directory)
    assert result.audit(empirical=False)["findings"] == []
    assert result.load_adapter().peft_config
    if task == "instruction":
        assert result.generate(["anna has 2 apples. How many?"], max_tokens=3)[0]
    else:
        given: Any = [["anna", "walked"]] if task == "token-classification" else "chest pain"
        assert len(result.predict(given)) == 1
