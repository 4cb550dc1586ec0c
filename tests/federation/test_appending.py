"""A run's growing files are appended to, and neither read again nor written again without need."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from support.tiny import PRIVATE

from fedslm import simulation
from fedslm.config import Config
from fedslm.errors import RunError
from fedslm.federation.checkpoint import RunDirectory
from fedslm.privacy import accounting

MANY = 200_000


@pytest.fixture(scope="module")
def run(config_in: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A finished run with two private rounds."""
    path = tmp_path_factory.mktemp("appending") / "run"
    config = config_in(path, privacy=PRIVATE, federation={"rounds": 2})
    simulation.simulate(config.resolved())
    return RunDirectory.open(path)[0]


def read_bytes(call: Callable[[], object]) -> int:
    """How many bytes this process reads meanwhile."""

    def count() -> int:
        lines = Path("/proc/self/io").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("rchar")))

    before = count()
    call()
    return count() - before


@pytest.mark.parametrize("torn", ["", "{", "{" * 3 * 4096], ids=["whole", "torn", "long torn"])
def test_appending_reads_the_end_alone(tmp_path: Path, torn: str) -> None:
    """However long a file is, a line is added after its last whole line, and little is read."""
    made = RunDirectory(tmp_path, "id")
    path = tmp_path / "lines.jsonl"
    whole = "".join(f"{number}\n" for number in range(MANY))
    path.write_text(whole + torn)
    assert read_bytes(lambda: made._append("lines.jsonl", ["new"])) < 40_000 < path.stat().st_size
    assert path.read_text() == whole + "new\n"


def test_appending_after_a_line_that_is_nothing_but_torn(tmp_path: Path) -> None:
    """A file without one whole line begins anew."""
    (tmp_path / "lines.jsonl").write_text("{" * 10_000)
    RunDirectory(tmp_path, "id")._append("lines.jsonl", ["a", "b"])
    assert (tmp_path / "lines.jsonl").read_text() == "a\nb\n"


def test_loading_leaves_a_file_alone_that_is_right(run: RunDirectory) -> None:
    """rounds.jsonl is written again only if it holds later rounds or a torn line."""
    path = run.path / "rounds.jsonl"
    before, content = path.stat().st_ino, path.read_bytes()
    assert run.load() is not None
    assert path.stat().st_ino == before
    path.write_bytes(content + b'{"round"')
    assert run.load() is not None
    assert path.read_bytes() == content
    os.remove(path)
    assert run.load() is not None
    assert path.read_bytes() == b""
    path.write_bytes(content)


def test_the_last_statements_are_the_checkpoints(run: RunDirectory) -> None:
    """Each client's last statement is read without the file of all statements."""
    last = dict(run.statements())
    assert len(run.statements()) == 6
    found = run.last_statements()
    assert {client: statement for client, (statement, _) in found.items()} == last
    assert {statement.round for statement in last.values()} == {2}
    for statement, epsilon in found.values():
        assert epsilon == accounting.epsilon(statement.events, PRIVATE["delta"])
    path = run.path / "checkpoint" / "state.json"
    content = path.read_text()
    path.write_text(content.replace('"epsilons"', '"others"'))  # as an older version wrote it
    assert {epsilon for _, epsilon in run.last_statements().values()} == {None}
    assert run.load() is not None
    path.write_text(content.replace('"statements"', '"others"'))
    with pytest.raises(RunError, match="damaged"):
        run.last_statements()
    path.write_text(content)


def test_before_the_first_checkpoint(tmp_path: Path) -> None:
    """A run that has not begun has no statements."""
    assert RunDirectory(tmp_path, "id").last_statements() == {}
