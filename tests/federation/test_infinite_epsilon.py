"""Tests of an infinite epsilon in the files of a run: one word for one thing."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from support.checkpoints import after, record

from fedslm.errors import RunError
from fedslm.federation.checkpoint import RunDirectory


def test_an_infinite_epsilon_is_one_word(directory: RunDirectory) -> None:
    """In a round's line and in the checkpoint; the null of older versions is read as well."""
    line = replace(record(1), epsilon=math.inf)
    directory.save(replace(after(directory, 0), round=1, epsilons={2: math.inf}), line)
    lines, state = directory.path / "rounds.jsonl", directory.path / "checkpoint" / "state.json"
    assert json.loads(lines.read_text())["epsilon"] == "infinite"
    assert json.loads(state.read_text())["epsilons"] == {"2": "infinite"}
    for _ in range(2):
        found = directory.load()
        assert found is not None
        assert (directory.records(), found.epsilons) == ([line], {2: math.inf})
        for path in (lines, state):
            path.write_text(path.read_text().replace('"infinite"', "null"))


def test_another_word_is_no_epsilon(directory: RunDirectory) -> None:
    """A file that says anything else is damaged, not without privacy."""
    after(directory, 1)
    lines = directory.path / "rounds.jsonl"
    lines.write_text(lines.read_text().replace('"epsilon": 0.5', '"epsilon": "endless"'))
    with pytest.raises(RunError, match="is damaged: epsilon='endless'"):
        directory.records()
