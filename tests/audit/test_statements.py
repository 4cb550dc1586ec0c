"""Tests of statements held against a ledger: what a server received must be in it, word for word."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support.audited import DELTA, EVENT, audit, spend

from fedslm.audit.ledgers import Evidence
from fedslm.audit.statements import read_statements
from fedslm.errors import LedgerError
from fedslm.privacy import accounting, keys
from fedslm.privacy.ledger import Ledger


def test_statements(node: Path) -> None:
    """What the server was told must be in the ledger; a rolled-back ledger does not hold it."""
    ledger = Ledger(node / "ledger.jsonl", keys.signing_key(node))
    statement = ledger.statement("run-plan", 2, "release-2")
    path = node / "statements.jsonl"
    path.write_text(json.dumps({"client": 0, "statement": statement.to_json()}) + "\n")
    public = keys.read_public_key(node / keys.PUBLIC_KEY)
    assert audit(node, Evidence(statements=read_statements(path, public))).sound
    foreign = ledger.statement("run-plan", 9, "release-9")
    assert "does not hold" in audit(node, Evidence(statements=(foreign,))).findings[0]
    for run, number, release in (
        ("nobody", 1, "release-1"),
        ("run-plan", 1, "release-2"),
        ("run-plan", 3, "release-2"),
    ):
        (finding,) = audit(
            node, Evidence(statements=(ledger.statement(run, number, release),))
        ).findings
        assert "for a release that the ledger does not hold" in finding
    other = replace(statement, public_key="ab" * 32)
    assert "another key" in audit(node, Evidence(statements=(other,))).findings[0]
    for name in ("ledger.jsonl", "ledger.jsonl.head"):
        (node / name).unlink()
    fresh = Ledger(node / "ledger.jsonl", keys.signing_key(node))
    spend(fresh, 1)
    assert "another ledger" in audit(node, Evidence(statements=(statement,))).findings[0]


def test_a_statement_of_too_little_epsilon_is_a_finding(node: Path) -> None:
    """A node that states less than its whole ledger cost is found out by whoever has the ledger."""
    key = keys.signing_key(node)
    ledger = Ledger(node / "ledger.jsonl", key)
    true = ledger.statement("run-plan", 2, "release-2")
    assert audit(node, Evidence(statements=(true,))).sound
    less = replace(true, epsilon=accounting.epsilon([EVENT], DELTA))
    (finding,) = audit(node, Evidence(statements=(true, less))).findings
    assert f"says epsilon={less.epsilon:.3f}, and the ledger cost {true.epsilon:.3f}" in finding


def test_statements_of_others_are_left_out(
    node: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A server's file holds many nodes; a damaged file is an error, not an empty one."""
    other = tmp_path_factory.mktemp("other")
    ledger = Ledger(other / "ledger.jsonl", keys.signing_key(other))
    spend(ledger, 1)
    path = node / "statements.jsonl"
    text = ledger.statement("run-plan", 1, "release-1").to_json()
    path.write_text(json.dumps({"client": 1, "statement": text}) + "\n")
    public = keys.read_public_key(node / keys.PUBLIC_KEY)
    assert read_statements(path, public) == ()
    path.write_text("{}\n")
    with pytest.raises(LedgerError):
        read_statements(path, public)


@pytest.mark.parametrize(
    "line",
    [" " * (1 << 16) + "{}", "[" * 50_000, '{"statement": 7}', '{"statement": "%s"}' % ("x" * 9000)],
)
def test_statements_are_read_up_to_a_limit(tmp_path: Path, line: str) -> None:
    """A line that is too long, too deep or no statement is an error of one line."""
    path = tmp_path / "statements.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(LedgerError, match="cannot be read") as caught:
        read_statements(path, keys.signing_key(tmp_path).public_key())
    assert len(str(caught.value)) < 500
