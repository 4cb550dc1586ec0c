"""Tests of the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.commands import DEMO, assert_clear, run, tiny

import fedslm
from fedslm import config as configuration


def test_help_lists_the_commands() -> None:
    """``--help`` says what there is."""
    result = run("--help")
    assert result.exit_code == 0
    for command in ("simulate", "demo", "config"):
        assert command in result.stdout


@pytest.mark.parametrize(
    "command",
    [
        ("simulate",),
        ("demo",),
        ("config",),
        ("config", "show"),
        ("config", "check"),
        ("config", "example"),
    ],
)
def test_every_command_has_help(command: tuple[str, ...]) -> None:
    """Each command explains itself."""
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.stdout


def test_version() -> None:
    """``--version`` prints the version and nothing else."""
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"{fedslm.__version__}\n")


def test_module_and_script_are_the_same() -> None:
    """``python -m fedslm`` is the command line too."""
    done = subprocess.run(
        [sys.executable, "-m", "fedslm", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{fedslm.__version__}\n"


def test_schema_is_a_json_schema() -> None:
    """``config schema`` describes every section and key, strictly."""
    result = run("config", "schema")
    schema = json.loads(result.stdout)
    assert result.exit_code == 0
    assert set(schema["properties"]) == set(configuration.Config.model_fields)
    assert schema["additionalProperties"] is False
    privacy = schema["$defs"]["PrivacyConfig"]
    assert privacy["required"] == ["unit"]
    assert all("description" in field for field in privacy["properties"].values())


def test_show_round_trips(tmp_path: Path) -> None:
    """What ``config show`` prints is a config that shows the same, with every choice made."""
    shown = run("config", "show", DEMO, "--set", "training.local_steps=7")
    path = tmp_path / "shown.toml"
    path.write_text(shown.stdout, encoding="utf-8")
    again = run("config", "show", str(path))
    assert (shown.exit_code, again.exit_code) == (0, 0)
    assert again.stdout == shown.stdout
    expected = configuration.from_toml(DEMO, ["training.local_steps=7"]).resolved()
    assert configuration.from_toml(path) == expected
    assert 'method = "ffa"' in shown.stdout


def test_check_accepts_a_good_config() -> None:
    """``config check`` says ok and exits with 0."""
    result = run("config", "check", DEMO)
    assert (result.exit_code, result.stderr) == (0, "")
    assert "demo.toml: ok" in result.stdout


def test_check_warns_and_accepts() -> None:
    """A warning goes to standard error, and the config can still be used."""
    result = run("config", "check", DEMO, "--set", "privacy.delta=0.1")
    assert result.exit_code == 0
    assert "warning: privacy.delta=0.1" in result.stderr


def test_check_refuses_contradictions_all_at_once() -> None:
    """Every contradiction is listed."""
    result = run(
        "config", "check", DEMO, "--set", "lora.dropout=0.5", "--set", "aggregation.weights=records"
    )
    assert_clear(result, "ConfigError", "2 problems", "lora.dropout", "aggregation.weights")


def test_an_unknown_key_is_refused(tmp_path: Path) -> None:
    """A misspelling is shown with what was meant."""
    result = run("config", "check", DEMO, "--set", "privacy.epsilonn=3")
    assert_clear(result, "ConfigError", "privacy.epsilonn", "did you mean 'epsilon'?")


@pytest.mark.parametrize("command", [("config", "check"), ("config", "show"), ("simulate",)])
def test_a_missing_file_is_refused(tmp_path: Path, command: tuple[str, ...]) -> None:
    """A config that is not there is named by every command that wants one."""
    assert_clear(run(*command, str(tmp_path / "no.toml")), "ConfigError", "no.toml", "no such file")


def test_bad_toml_is_refused(tmp_path: Path) -> None:
    """A file that is no TOML is shown with line and column."""
    path = tmp_path / "bad.toml"
    path.write_text("[run]\nname = \n")
    assert_clear(run("config", "check", str(path)), "ConfigError", "bad.toml", "line 2")


def test_odd_characters_in_an_error_are_printed_as_they_are(tmp_path: Path) -> None:
    """Square brackets in a value are text, not colours."""
    result = run("config", "check", DEMO, "--set", "run.name='[/red] [bold]'")
    assert_clear(result, "ConfigError", "[/red] [bold]")


def test_odd_characters_in_a_path_are_printed_as_they_are(tmp_path: Path) -> None:
    """The same for a file name."""
    assert_clear(run("config", "check", str(tmp_path / "[/x].toml")), "ConfigError", "[/x].toml")


@pytest.mark.parametrize("arguments", [("simulate",), ("config", "check"), ("fly",), ("--fly",)])
def test_wrong_usage_exits_with_2(arguments: tuple[str, ...]) -> None:
    """Wrong usage is told apart from a wrong config, and has no traceback."""
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_a_missing_label_column_is_refused(tmp_path: Path) -> None:
    """A column that the data does not have is named with those that it has."""
    overrides = tiny(tmp_path / "run", "data.label_column=diagnosis")
    result = run("simulate", DEMO, *overrides)
    assert_clear(result, "DataError", "data.label_column='diagnosis'", "text, label, client")


def test_a_missing_data_file_is_refused(tmp_path: Path) -> None:
    """Data that is not there is named."""
    result = run("simulate", DEMO, *tiny(tmp_path / "run", "data.source=./no/where.jsonl"))
    assert_clear(result, "DataError", "no/where.jsonl", "no such file")


def test_a_missing_model_is_refused(tmp_path: Path) -> None:
    """A model that is not there is named."""
    result = run("simulate", DEMO, *tiny(tmp_path / "run", "model.base=./no/model"))
    assert_clear(result, "ModelError", "model.base='./no/model'", "no such directory")


def test_the_end_of_a_run_says_what_evaluation_took(tmp_path: Path) -> None:
    """After the metrics there is one sentence with its share of the rounds' time, from the report."""
    result = run("simulate", DEMO, *tiny(tmp_path / "run"))
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    share = 100 * report["seconds_in_evaluations"] / report["seconds_in_rounds"]
    assert 0 < share < 100
    assert f"\nevaluation took {share:.0f} % of the time in rounds\n" in result.stdout


def test_an_existing_run_directory_is_refused(tmp_path: Path) -> None:
    """No run is overwritten, and the error says how to go on."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine")
    result = run("simulate", DEMO, *tiny(tmp_path / "run"))
    assert_clear(result, "Unusable", "exists", "--resume")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine.txt"]


def test_resuming_what_is_no_run_is_refused(tmp_path: Path) -> None:
    """A directory that is no run directory cannot be continued."""
    overrides = ["--resume", str(tmp_path)]
    result = run("simulate", DEMO, *overrides)
    assert_clear(result, "Unusable", "is not a run directory")


@pytest.mark.parametrize(
    "modules",
    [
        "fedslm",
        "fedslm.cli",
        "fedslm.config, fedslm.validation, fedslm.records, fedslm.rng, fedslm.storage",
        "fedslm.privacy.plan, fedslm.privacy.ledger, fedslm.aggregation.mean",
    ],
)
def test_light_modules_import_no_torch(modules: str) -> None:
    """Looking at a config, a plan or a ledger needs neither torch nor transformers."""
    code = f"import sys, {modules}; print(*{{'torch', 'transformers', 'datasets'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
