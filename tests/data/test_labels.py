"""Tests of what a task demands of records, and of where names come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from fedslm.config import DataConfig, PrivacyConfig, TaskConfig
from fedslm.data.federated import Shared, share_out
from fedslm.data.labels import check
from fedslm.errors import DataError
from fedslm.models.base import DEMO_DIRECTORY, load_tokenizer
from fedslm.tasks import build

Rows = list[dict[str, Any]]
CLASSES: Rows = [{"text": f"note {n}", "label": "ab"[n % 2]} for n in range(6)]
MANY: Rows = [
    {"text": "one", "label": ["x", "y"]},
    {"text": "two", "label": []},
    {"text": "three", "label": ["z"]},
]
TEXTS: Rows = [
    {"text": "one", "label": "y; x"},
    {"text": "two", "label": ""},
    {"text": "3", "label": "z"},
]
TAGGED: Rows = [
    {"text": ["chest", "pain"], "label": ["B-Symptom", "I-Symptom"]},
    {"text": ["no", "fever"], "label": ["O", "B-Symptom"]},
    {"text": ["left", "arm"], "label": ["O", "A"]},
]
ANSWERS: Rows = [{"text": f"question {n}", "label": f"answer {n}", "topic": "t"} for n in range(3)]


def shared(directory: Path, task: TaskConfig, train: Rows, test: Rows, **data: Any) -> Shared:
    """Shares rows out between two clients."""
    for split, rows in (("train", train), ("test", test)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / f"{split}.jsonl").write_text(lines)
    config = DataConfig(source=str(directory), **data)
    return share_out(config, task, PrivacyConfig(unit="none"), num_clients=2, seed=0)


@pytest.mark.parametrize(
    ("name", "rows", "labels"),
    [
        ("classification", CLASSES, ("a", "b")),
        ("multi-label", MANY, ("x", "y", "z")),
        ("multi-label", TEXTS, ("x", "y", "z")),
        ("token-classification", TAGGED, ("O", "A", "B-Symptom", "I-Symptom")),
        ("instruction", ANSWERS, ()),
        ("seq2seq", ANSWERS, ()),
        ("causal-lm", ANSWERS, ()),
    ],
)
def test_names_come_from_the_public_split(
    tmp_path: Path, name: Any, rows: Rows, labels: tuple[str, ...]
) -> None:
    """All names that are seen there, sorted, O first; tasks that write have none."""
    assert shared(tmp_path, TaskConfig(name=name), rows[:2], rows).labels == labels


@pytest.mark.parametrize(
    ("name", "rows", "part"),
    [
        ("classification", CLASSES, "'b' (3) in rows 1, 3, 5; known: a, c"),
        ("multi-label", MANY, "'z' (1) in rows 2; known: x, y"),
        ("token-classification", TAGGED, "'A' (1) in rows 2; known: O, B-Symptom, I-Symptom"),
    ],
)
def test_a_private_name_that_is_not_public_is_refused(
    tmp_path: Path, name: Any, rows: Rows, part: str
) -> None:
    """A name that only private records have is shown to the researcher, with rows, and never learned."""
    public = [{"text": "x", "label": each} for each in "ac"] if name == "classification" else rows[:2]
    with pytest.raises(DataError, match="the training split has labels") as caught:
        shared(tmp_path, TaskConfig(name=name), rows, public)
    assert part in str(caught.value)


@pytest.mark.parametrize("name", ["classification", "multi-label", "token-classification"])
@pytest.mark.parametrize("where", ["config", "split"])
def test_spaces_around_a_label_are_not_part_of_it(tmp_path: Path, name: Any, where: str) -> None:
    """In every task "a " is the class "a", and no such record is left out of training."""
    labels = ["a ", "O\t", " a", "O"]
    rows: Rows = [{"text": "chest pain", "label": label} for label in labels]
    if name != "classification":
        rows = [{"text": row["text"], "label": [row["label"]] * 2} for row in rows]
    if name == "token-classification":
        rows = [{**row, "text": ["chest", "pain"]} for row in rows]
    given = TaskConfig(name=name, labels=[" O", "a "] if where == "config" else ())
    found = shared(tmp_path, given, rows, rows)
    assert found.labels == ("O", "a")
    task = build(given, DataConfig(source="x"), found.labels)
    assert len(task.prepare(rows, load_tokenizer(DEMO_DIRECTORY)).kept) == 4


def test_names_come_from_a_public_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One on each line, in that order, also with names that no record has."""
    (tmp_path / "names.txt").write_text("\ufeffb\n\n c \na\n", encoding="utf-8")
    monkeypatch.setenv("NAMES_ROOT", str(tmp_path))
    task = TaskConfig(name="classification", labels_file="$NAMES_ROOT/names.txt")
    assert shared(tmp_path, task, CLASSES, CLASSES).labels == ("b", "c", "a")


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (None, "cannot be read"),
        (b"a\nb\na\n", "'a' twice"),
        (b"a\n", "1 label"),
        (b"\xe9t\xe9\nb", "utf-8"),
    ],
)
def test_a_file_of_names_must_be_one(tmp_path: Path, content: bytes | None, part: str) -> None:
    """A file that is missing, in another encoding, too short or ambiguous is named."""
    path = tmp_path / "names.txt"
    if content is not None:
        path.write_bytes(content)
    task = TaskConfig(name="classification", labels_file=str(path))
    with pytest.raises(DataError, match="task.labels_file=") as caught:  # noqa: RUF043
        shared(tmp_path, task, CLASSES, CLASSES)
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("name", "row", "part"),
    [
        ("token-classification", {"text": ["a"], "label": ["O", "O"]}, "tags of different lengths"),
        ("token-classification", {"text": [], "label": []}, "no list of words in column 'text'"),
        ("token-classification", {"text": None, "label": ["O"]}, "no list of words in column 'text'"),
        ("token-classification", {"text": ["a"], "label": [None]}, "no list of tags in column 'label'"),
        ("token-classification", {"text": ["a"], "label": None}, "no list of tags in column 'label'"),
        ("instruction", {"text": "a", "label": "  "}, "no text in column 'label'"),
        ("seq2seq", {"text": None, "label": "a"}, "no text in column 'text'"),
        ("causal-lm", {"text": "", "label": "a"}, "no text in column 'text'"),
    ],
)
def test_a_record_that_lacks_something_is_named(
    tmp_path: Path, name: Any, row: dict[str, Any], part: str
) -> None:
    """Whatever the task reads must be there; the row is named, of either split."""
    good = TAGGED if name == "token-classification" else ANSWERS
    for bad in ("training", "evaluation"):
        rows = {"training": good, "evaluation": good, bad: [*good, row]}
        with pytest.raises(DataError) as caught:
            shared(tmp_path, TaskConfig(name=name), rows["training"], rows["evaluation"])
        assert part in str(caught.value)
        assert f"in the {bad} split, 1 record has " in str(caught.value)
        assert "(rows 3)" in str(caught.value)


TURNS = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]


@pytest.mark.parametrize(
    ("name", "value", "part"),
    [
        ("causal-lm", b"chest pain", "but bytes (rows 0); decode them"),
        ("seq2seq", {"id": 1, "body": "x"}, "but an object with id, body (rows 0); put its text"),
        ("classification", TURNS, 'but turns of a conversation (rows 0); task.name="instruction"'),
        ("causal-lm", [{"from": "human", "value": "Why?"}], "but turns of a conversation (rows 0)"),
        ("seq2seq", ["a", "b"], "but a list of str values (rows 0); join each list into one text"),
        ("instruction", [], "but an empty list (rows 0); remove them"),
        ("causal-lm", {"0": "a", "1": "b"}, "pandas writes columns (rows 0); write it with to_json("),
        ("causal-lm", None, "no text in column 'text' (rows 0); remove them"),
        ("causal-lm", float("nan"), "no text in column 'text' (rows 0); remove them"),
    ],
)
def test_another_type_is_named_with_its_own_way_out(name: Any, value: Any, part: str) -> None:
    """What is there is said, and what to do about it; only what is missing is to be removed."""
    rows = Dataset.from_list([{"text": value, "label": "a"}])
    with pytest.raises(DataError) as caught:
        check(rows, DataConfig(source="x"), TaskConfig(name=name), "training")
    start = "data.text_column='text': in the training split, 1 record has no text in column 'text'"
    assert str(caught.value).startswith(start)
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "part"),
    [
        ("multi-label", ["a", None], "but a list in which a value is missing (rows 0); remove what"),
        ("multi-label", ["a", " "], "but a list in which a value is missing (rows 0); remove what"),
        (
            "token-classification",
            [None],
            "but a list in which a value is missing (rows 0); remove what",
        ),
        ("classification", b"a", "but bytes (rows 0); decode them"),
        ("classification", {"name": "a"}, "but an object with name (rows 0); put its text"),
        ("classification", ["a"], "but a list of str values (rows 0); name one class"),
    ],
)
def test_another_label_is_named_with_its_own_way_out(name: Any, value: Any, part: str) -> None:
    """Bytes stay bytes with another task, and a list with a hole is a list."""
    text = ["a"] if name == "token-classification" else "a"
    rows = Dataset.from_list([{"text": text, "label": value}])
    with pytest.raises(DataError) as caught:
        check(rows, DataConfig(source="x"), TaskConfig(name=name), "training")
    assert part in str(caught.value)


@pytest.mark.parametrize("values", [[1, 2], [0, 1], [2.5, 0.1], [True, False]], ids=str)
@pytest.mark.parametrize(
    "name", ["classification", "causal-lm", "instruction", "seq2seq", "preference"]
)
def test_a_number_is_text_where_text_is_meant(name: Any, values: list[Any]) -> None:
    """Codes, counts and yes or no are read as they are written; 0 is an answer too."""
    rows = [{"text": value, "label": value, "worse": "x"} for value in values]
    data = DataConfig(source="x", rejected_column="worse" if name == "preference" else None)
    task = TaskConfig(name=name)
    check(Dataset.from_list(rows), data, task, "training")
    made = build(task, data, tuple(map(str, values)) if name == "classification" else ())
    as_text = [{"text": str(value), "label": str(value), "worse": "x"} for value in values]
    tokenizer = load_tokenizer(DEMO_DIRECTORY)
    found = made.prepare(rows, tokenizer)
    assert found.kept == (0, 1)
    assert found == made.prepare(as_text, tokenizer)


def test_words_that_are_one_text_are_refused(tmp_path: Path) -> None:
    """Token classification on plain text says that it wants lists."""
    with pytest.raises(DataError, match="no list of words in column 'text'"):
        shared(tmp_path, TaskConfig(name="token-classification"), CLASSES, CLASSES)


def test_a_prompt_reads_its_own_columns(tmp_path: Path) -> None:
    """Columns in braces are needed, the text column is not, and one of them may be blank."""
    rows = [{"question": f"q{n}", "hint": "", "label": "a"} for n in range(3)]
    task = TaskConfig(name="instruction", prompt="{question} ({hint})")
    assert len(shared(tmp_path, task, rows, rows).train) == 3
    missing = TaskConfig(name="instruction", prompt="{question} {reason}")
    message = r"task\.prompt \{reason\}='reason' is not a column .* question, hint, label"
    with pytest.raises(DataError, match=message):
        shared(tmp_path, missing, rows, rows)


def test_a_preference_needs_both_answers(tmp_path: Path) -> None:
    """The worse answer's column is checked like the better one's."""
    rows = [
        {"text": "q", "label": "good", "worse": "bad"},
        {"text": "q", "label": "good", "worse": None},
    ]
    task = TaskConfig(name="preference")
    with pytest.raises(DataError, match=r"no text in column 'worse' \(rows 1\)"):
        shared(tmp_path, task, rows, rows[:1], rejected_column="worse")
    good = shared(tmp_path, task, rows[:1] * 2, rows[:1], rejected_column="worse")
    assert good.duplicates == 2


def test_duplicates_are_counted_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Case, spaces and Unicode forms make no other record; a label does not either."""
    train = [
        {"text": "Chest  pain,\n left", "label": "a"},
        {"text": "cafe\u0301", "label": "b"},
        {"text": "something else", "label": "a"},
        {"text": "chest pain, left", "label": "b"},
    ]
    test = [{"text": "chest pain, LEFT", "label": "a"}, {"text": "caf\u00e9", "label": "b"}]
    found = shared(tmp_path, TaskConfig(name="classification"), train, test)
    assert found.duplicates == 3
    assert "3 of 4 training records (75.0 %) are in the public evaluation split too" in caplog.text
    caplog.clear()
    assert shared(tmp_path, TaskConfig(name="classification"), train[2:3] * 2, test).duplicates == 0
    assert caplog.text == ""


def test_duplicates_of_a_prompt_are_those_of_all_its_columns(tmp_path: Path) -> None:
    """The same question about another text is another record."""
    rows = [{"context": f"text {n % 2}", "question": "why?", "label": "a"} for n in range(4)]
    task = TaskConfig(name="instruction", prompt="{context} {question}")
    assert shared(tmp_path, task, rows, rows[:1]).duplicates == 2
