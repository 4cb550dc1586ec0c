"""Tests of ``fedslm predict``, ``generate``, ``evaluate`` and ``export``."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import finished
from support.commands import run

from fedslm.config import Config
from fedslm.inference.generation import Sampling, prompts_of, write
from fedslm.inference.prediction import predict
from fedslm.inference.trained import load_trained, open_run

Finished = Callable[[str], Path]
COMMANDS = ("predict", "generate", "evaluate", "export")
TEXTS = ["chest pain", "wrist fracture", ""]


def answers_of(path: Path, column: str = "text") -> list[dict[str, Any]]:
    """What the library says of TEXTS."""
    return list(predict(load_trained(open_run(path)), [{column: text} for text in TEXTS]))


def lines(text: str) -> list[Any]:
    """JSON lines."""
    return [json.loads(line) for line in text.splitlines()]


def assert_refused(result: Any, kind: str, *parts: str) -> None:
    """What was given is at fault: exit status 2, one clear error, nothing on standard output."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "error: " in result.stderr
    assert kind not in result.stderr
    assert "Traceback" not in result.output
    for part in parts:
        assert part in result.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_help_holds_an_example(command: str) -> None:
    """Each command shows how it is called."""
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"Example: fedslm {command} runs/" in " ".join(result.stdout.split())


def test_predict_json_is_one_answer_a_line(finished_run: Finished) -> None:
    """Standard output is JSON lines, the library's answers, and nothing else."""
    path = finished_run("classification")
    options = [part for text in TEXTS for part in ("--text", text)]
    result = run("predict", str(path), *options, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    assert lines(result.stdout) == answers_of(path)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("classification", "heart ("),
        ("multi-label", "heart "),
        ("token-classification", "no text"),
        ("causal-lm", "), "),
    ],
)
def test_predict_shows_a_table(kind: str, expected: str, finished_run: Finished) -> None:
    """People see texts and answers; texts that were cut are said."""
    result = run("predict", str(finished_run(kind)), "--text", "chest [/b] pain " * 20, "--text", "")
    assert result.exit_code == 0
    assert "chest [/b] pain" in result.stdout
    assert expected in result.stdout
    assert "1 text truncated" in result.stderr


@pytest.mark.parametrize("name", ["in.txt", "in.jsonl", "in.csv"])
def test_predict_reads_and_writes_files(name: str, finished_run: Finished, tmp_path: Path) -> None:
    """A row of output for each row of input, in order, in JSON lines or CSV; nothing but that is left."""
    path = finished_run("classification")
    content = {
        "in.txt": "\n".join([*TEXTS, ""]),
        "in.jsonl": "".join(json.dumps({"text": text, "id": 1}) + "\n" for text in TEXTS),
        "in.csv": "id,text\n1,chest pain\n2,wrist fracture\n3,\n",
    }
    source = tmp_path / name
    source.write_text(content[name])
    expected = answers_of(path)
    result = run("predict", str(path), "--file", str(source), "--out", str(tmp_path / "out.jsonl"))
    assert result.exit_code == 0
    assert "out.jsonl: 3 rows" in result.stdout
    assert lines((tmp_path / "out.jsonl").read_text()) == expected
    result = run(
        "predict", str(path), "--file", str(source), "--out", str(tmp_path / "o.csv"), "--json"
    )
    assert json.loads(result.stdout) == {"out": str(tmp_path / "o.csv"), "rows": 3}
    with (tmp_path / "o.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["label"] for row in rows] == [each["label"] or "" for each in expected]
    assert json.loads(rows[0]["probabilities"]) == expected[0]["probabilities"]
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted([name, "out.jsonl", "o.csv"])


def test_predict_takes_lists_of_words(finished_run: Finished, tmp_path: Path) -> None:
    """A file with words gives tags for exactly these words."""
    source = tmp_path / "in.jsonl"
    source.write_text('{"words": ["palpitations", "and", "a", "swelling"]}\n')
    result = run("predict", str(finished_run("token-classification")), "--file", str(source), "--json")
    (answer,) = lines(result.stdout)
    assert answer["words"] == ["palpitations", "and", "a", "swelling"]
    assert len(answer["tags"]) == 4


def test_a_file_appears_whole_or_not_at_all(finished_run: Finished, tmp_path: Path) -> None:
    """A bad row far behind good ones leaves no output, and an older output as it was."""
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    good = json.dumps({"text": "chest pain"}) + "\n"
    source.write_text(good * 600 + json.dumps({"text": ["a"]}) + "\n")
    out.write_text("older")
    result = run(
        "predict", str(finished_run("classification")), "--file", str(source), "--out", str(out)
    )
    assert result.exit_code == 2
    assert out.read_text() == "older"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_a_wrong_column_lists_those_there(finished_run: Finished, tmp_path: Path) -> None:
    """The columns of the file are named."""
    source = tmp_path / "in.csv"
    source.write_text("note,age\na,1\n")
    for kind, command in (("classification", "predict"), ("instruction", "generate")):
        result = run(command, str(finished_run(kind)), "--file", str(source))
        assert_refused(result, "DataError", "no column 'text'", "note, age")


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_no_run_is_refused(command: str, tmp_path: Path, finished_run: Finished) -> None:
    """Missing, unfinished, of another version, of another base: exit status 2 from every command."""
    more = {
        "predict": ("--text", "a"),
        "generate": ("--prompt", "a"),
        "evaluate": (),
        "export": ("--merge", "--out", str(tmp_path / "out")),
    }[command]
    kind = "causal-lm" if command == "generate" else "classification"
    copy = Path(shutil.copytree(finished_run(kind), tmp_path / "copy"))
    report = json.loads((copy / "report.json").read_text())
    assert_refused(run(command, str(tmp_path / "no"), *more), "ModelError", "no such run directory")
    changes = [("base_sha256", "1" * 64, "--base"), ("fedslm_version", "9.9.9", "fedslm 9.9.9")]
    for key, value, part in changes:
        (copy / "report.json").write_text(json.dumps({**report, key: value}))
        assert_refused(run(command, str(copy), *more), "ModelError", part)
    (copy / "report.json").unlink()
    assert_refused(run(command, str(copy), *more), "ModelError", "not finished", "--resume")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("predict", "RUN"),
        ("predict", "RUN", "--text", "a", "--file", "b.txt"),
        ("predict", "RUN", "--text", "a", "--out", "b.pdf"),
        ("generate", "RUN"),
        ("generate", "RUN", "--prompt", "a", "--out", "b.txt"),
        ("evaluate", "RUN", "--split", "test"),
        ("evaluate", "RUN", "--max-records", "5"),
        ("evaluate", "RUN", "--query", "select 1"),
        ("export", "RUN"),
        ("export", "RUN", "--out", "x", "--dtype", "float16"),
        ("export", "RUN", "--out", "x", "--merge", "--dtype", "int3"),
    ],
)
def test_wrong_usage_is_said_before_any_work(
    arguments: tuple[str, ...], finished_run: Finished
) -> None:
    """Options that do not go together end with 2, and no traceback."""
    path = str(finished_run("classification"))
    result = run(*(path if part == "RUN" else part for part in arguments))
    assert result.exit_code == 2
    assert "Usage" in result.stderr
    assert "Traceback" not in result.output


def test_commands_point_to_each_other(finished_run: Finished) -> None:
    """Predicting with a model that writes, and writing with one that labels."""
    result = run("predict", str(finished_run("instruction")), "--text", "a")
    assert_refused(result, "ConfigError", "fedslm generate")
    result = run("generate", str(finished_run("classification")), "--prompt", "a")
    assert_refused(result, "ConfigError", "fedslm predict")


@pytest.mark.parametrize("kind", ["causal-lm", "instruction", "seq2seq"])
def test_generate_writes_aloud_and_as_json(kind: str, finished_run: Finished, tmp_path: Path) -> None:
    """Text for people, JSON lines for programs and a file: the library's texts in each."""
    path = finished_run(kind)
    trained = load_trained(open_run(path))
    prompts = prompts_of(trained, [{"text": "chest pain"}, {"text": "wrist"}], 6)
    expected = list(write(trained, prompts, Sampling(6)))
    options = ["--prompt", "chest pain", "--prompt", "wrist", "--max-tokens", "6"]
    result = run("generate", str(path), *options)
    assert (result.exit_code, result.stderr) == (0, "")
    begun = [prompt.text if kind == "causal-lm" else "" for prompt in prompts]
    assert result.stdout == "".join(f"{a}{b[0]}\n" for a, b in zip(begun, expected, strict=True))
    result = run("generate", str(path), *options, "--json")
    found = lines(result.stdout)
    assert [each["texts"] for each in found] == expected
    assert [each["prompt"] for each in found] == [prompt.text for prompt in prompts]
    out = tmp_path / "out.jsonl"
    assert run("generate", str(path), *options, "--out", str(out)).exit_code == 0
    assert lines(out.read_text()) == found


def test_a_prompt_of_several_columns_needs_a_file(
    config_in: Callable[..., Config], tmp_path: Path
) -> None:
    """One --prompt cannot fill two columns; a file with both can."""
    source, task = finished.write_sources(tmp_path), {"prompt": "{text} of a {label}:"}
    path = str(finished.train("instruction", tmp_path, source, config_in, task=task))
    result = run("generate", path, "--prompt", "a")
    assert result.exit_code == 2
    assert "text, label" in result.stderr
    file = tmp_path / "in.csv"
    file.write_text("text,label\nchest pain,heart\n")
    (found,) = lines(run("generate", path, "--file", str(file), "--max-tokens", "3", "--json").stdout)
    assert found["prompt"] == "chest pain of a heart:"
    file.write_text("text\nchest pain\n")
    assert_refused(run("generate", path, "--file", str(file)), "DataError", "no column 'label'")


def test_generate_draws_by_a_seed(finished_run: Finished) -> None:
    """Samples stand apart; the same seed gives the same output."""
    path = str(finished_run("causal-lm"))
    options = ["--prompt", "chest", "--max-tokens", "5", "--temperature", "1", "--samples", "3"]
    first, again, other = (
        run("generate", path, *options, "--seed", seed).stdout for seed in ("1", "1", "2")
    )
    assert first == again != other
    assert first.count("---\n") == 3
    assert first.count("chest") >= 3


def test_generate_refuses_what_it_cannot_draw(finished_run: Finished) -> None:
    """Values out of range, by their option."""
    path = str(finished_run("causal-lm"))
    result = run("generate", path, "--prompt", "a", "--samples", "3")
    assert_refused(result, "ConfigError", "--samples", "--temperature")
    result = run("generate", path, "--prompt", "a", "--max-tokens", "500")
    assert_refused(result, "ConfigError", "--max-tokens", "128 positions")


def test_evaluate_prints_writes_and_gives_json(finished_run: Finished, tmp_path: Path) -> None:
    """The same figures as a table, as Markdown and as one JSON line."""
    path = finished_run("classification")
    out = tmp_path / "table.md"
    result = run("evaluate", str(path), "--out", str(out), "--resamples", "1000")
    assert (result.exit_code, result.stderr) == (0, "")
    report = json.loads((path / "report.json").read_text())
    shown = f"{report['metrics_after']['loss']:.4f} ["
    assert shown in result.stdout
    assert "head is untrained" in " ".join(result.stdout.split())
    assert shown in out.read_text()
    result = run("evaluate", str(path), "--resamples", "1000", "--json")
    (values,) = lines(result.stdout)
    for key, name in (("tuned", "metrics_after"), ("base", "metrics_before")):
        found = {metric: each[key]["value"] for metric, each in values["metrics"].items()}
        assert found == pytest.approx(report[name], rel=1e-5)
    assert (values["records"], values["resamples"], values["confidence"]) == (30, 1000, 0.95)


def test_evaluate_takes_other_data(finished_run: Finished) -> None:
    """Another file and split; the training split is refused."""
    path = finished_run("seq2seq")
    source = open_run(path).data.source
    options = ["--data", source, "--split", "test", "--max-records", "8", "--generate"]
    result = run("evaluate", str(path), *options, "--max-generated", "3", "--json")
    (values,) = lines(result.stdout)
    assert (values["records"], values["written"]) == (8, 3)
    assert {"rouge1", "rouge2", "rougeL", "exact_match", "loss"} <= set(values["metrics"])
    result = run("evaluate", str(path), "--data", source, "--split", "train")
    assert_refused(result, "DataError", "private training split")
    result = run("evaluate", str(path), "--data", "./no/where.jsonl")
    assert_refused(result, "DataError", "no such file")


def test_export_says_where(finished_run: Finished, tmp_path: Path) -> None:
    """A merged folder, a copied adapter; a folder that is there is refused with 1, as by simulate."""
    path = str(finished_run("native"))
    plain, adapter = tmp_path / "plain", tmp_path / "adapter"
    result = run("export", path, "--merge", "--out", str(plain), "--dtype", "float16", "--json")
    assert json.loads(result.stdout) == {"out": str(plain), "merged": True, "dtype": "float16"}
    assert (plain / "model.safetensors").exists()
    result = run("export", path, "--out", str(adapter))
    assert result.stdout == f"{adapter}\n"
    assert (adapter / "adapter_model.safetensors").exists()
    result = run("export", path, "--merge", "--out", str(adapter))
    assert result.exit_code == 2
    assert "not empty" in result.stderr
