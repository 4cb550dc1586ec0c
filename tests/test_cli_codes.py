"""Tests of how commands end: one table of exit codes, in docs/cli.md, that every command keeps."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from support.commands import ROOT, run
from typer.main import get_command

from fedslm import errors
from fedslm.cli import app, console
from fedslm.errors import FedslmError, plural

HEX = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"  # RFC 8032, test 1
CODES = {
    "ConfigError": console.INPUT,
    "DataError": console.INPUT,
    "ModelError": console.INPUT,
    "LedgerError": console.INPUT,
    "OutOfRange": console.INPUT,
    "MissingPackage": console.INPUT,
    "NeedsTime": console.FAILED,
    "NotRepeated": console.FAILED,
    "RolledBack": console.INPUT,
    "PrivacyError": console.REFUSED,
    "BudgetExceeded": console.REFUSED,
    "PolicyRefused": console.REFUSED,
    "Refused": console.REFUSED,
    "FedslmError": console.FAILED,
    "TrainingError": console.FAILED,
    "FederationError": console.FAILED,
    "FrozenMissing": console.FAILED,
    "Unanswered": console.FAILED,
    "RunError": console.FAILED,
    "Unusable": console.INPUT,
}
ENDS = {
    "simulate": ("no.toml", 2),
    "train": ("no.csv --base demo", 2),
    "demo": ("--directory", 2),
    "sweep": ("no.toml --over privacy.epsilon=1,2", 2),
    "tune": ("no.toml", 2),
    "distill": ("no", 2),
    "predict": ("no --text a", 2),
    "generate": ("no --prompt a", 2),
    "evaluate": ("no", 2),
    "export": ("no --out x", 2),
    "methods": ("", 0),
    "init": ("--data no.csv", 2),
    "doctor": ("--no", 2),
    "config schema": ("", 0),
    "config example": ("no", 2),
    "config show": ("no.toml", 2),
    "config check": ("no.toml", 2),
    "data preview": ("no.toml", 2),
    "data split": ("no.csv --out x", 2),
    "budget plan": ("no.toml", 2),
    "policy example": ("", 0),
    "policy check": ("no.toml", 2),
    "model info": ("no.toml", 2),
    "audit ledger": (f"no --public-key {HEX}", 1),
    "audit run": ("no", 2),
    "audit self-test": ("--fast", 2),
    "provision init": ("no.toml", 2),
    "provision renew": ("--server no", 2),
    "provision lab": ("x --config no.toml", 2),
    "provision admit": ("no.json", 2),
    "provision revoke": ("north --server no", 2),
    "provision readmit": ("north --server no --reason r", 2),
    "provision rekey": ("--server no", 2),
    "provision list": ("--server no", 2),
    "provision roster": ("--server no", 2),
    "server up": ("no", 2),
    "server run": ("no.toml", 2),
    "server status": ("--server no", 2),
    "server logs": ("--server no", 2),
    "server stop": ("north --server no", 2),
    "node example": ("no", 2),
    "node enroll": ("x --name /", 2),
    "node accept": ("no no.json", 2),
    "node check": ("no", 2),
    "node clock": ("no --reason r", 2),
    "node up": ("no", 2),
}


def leaves(group: click.Command, *path: str) -> Iterator[str]:
    """Every command that does something."""
    if not isinstance(group, click.Group):
        yield " ".join(path)
        return
    for name, command in group.commands.items():
        yield from leaves(command, *path, name)


def test_the_table_names_every_code() -> None:
    """docs/cli.md has a row for each exit code, and no other."""
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    table = re.search(r"\| code \| meaning \|\n\|---\|---\|\n((?:\|.*\n)+)", page)
    assert table is not None
    codes = {console.FINE, console.FAILED, console.INPUT, console.REFUSED, console.INTERRUPTED}
    assert set(map(int, re.findall(r"^\| (\d+) \|", table[1], re.MULTILINE))) == codes


def test_every_error_has_a_code() -> None:
    """What an error of ours ends with is decided for each kind."""
    kinds = {
        name: kind
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, FedslmError)
    }
    assert {name: console.code_of(kind) for name, kind in kinds.items()} == CODES


def test_every_command_is_tried() -> None:
    """A new command says here how it ends when it gets nonsense."""
    assert set(leaves(get_command(app))) == set(ENDS)


@pytest.mark.parametrize("command", ENDS)
def test_every_command_keeps_the_table(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nonsense ends with the code of the table and one clear message, without a traceback."""
    monkeypatch.chdir(tmp_path)
    arguments, code = ENDS[command]
    result = run(*command.split(), *arguments.split())
    assert isinstance(result.exception, SystemExit | None)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    assert not re.search(r"\b(\w+Error|RolledBack|PolicyRefused)\b", result.output)
    assert bool(result.stderr) == bool(code)
    assert not code or not list(tmp_path.iterdir())


def test_a_refusal_ends_with_3(tmp_path: Path) -> None:
    """A budget that does not suffice, and a node whose fingerprint is another."""
    known = ("--delta", "1e-5", "--sample-rate", "0.1", "--noise-multiplier", "0.5")
    assert run("budget", "plan", "--epsilon", "0.01", *known).exit_code == 3
    assert run("node", "enroll", str(tmp_path), "--name", "north").exit_code == 0
    request = str(tmp_path / "north.request.json")
    result = run("provision", "admit", request, "--fingerprint", "1a2b-3c4d")
    assert (result.exit_code, result.stdout) == (3, "")
    assert "its fingerprint is not 1a2b-3c4d" in " ".join(result.stderr.split())


@pytest.mark.parametrize(("number", "words"), [(0, "0 records"), (1, "1 record"), (2, "2 records")])
def test_one_is_not_many(number: int, words: str) -> None:
    """A count and its noun agree."""
    assert plural(number, "record") == words
