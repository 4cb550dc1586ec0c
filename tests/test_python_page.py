"""The code of docs/python.md runs, block after block, as in a notebook."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parent.parent / "docs" / "python.md"


def test_every_block_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one namespace and one process; what is deleted at the end is gone, and the rest still works."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) >= 5
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "python.md", "exec"), names)  # noqa: S102  (our own page)
    printed = capsys.readouterr().out
    assert "accuracy" in printed
    assert "['north', 'south']" in printed
    assert not (tmp_path / "runs" / "notes" / "data").exists()
    assert list(names["run"].history.index) == [1, 2]
    assert names["model"].peft_config
