"""The disk is full while a run's records are written: an error that names the file, and no half of a run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

CONFIG = """
[run]
name = "full"
directory = "{directory}"
[model]
base = "demo"
[data]
source = "{source}"
partition = "iid"
[task]
name = "classification"
[privacy]
unit = "none"
[federation]
num_clients = 4
[training]
batch_size = 8
"""
# The kernel refuses to let a file grow further, as it does on a full disk; a tiny disk needs root.
LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
from fedslm.cli import app
app(["simulate", sys.argv[1]])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on a file's size")
@pytest.mark.parametrize(
    ("generated", "said"),
    [
        (False, r"error: \S+/source/train\.jsonl cannot be copied to \S+: .*it needs as much space"),
        (True, r"error: \S+/run/data/train\.arrow cannot be written: "),
    ],
)
def test_a_run_whose_records_do_not_fit_leaves_nothing(
    tmp_path: Path, generated: bool, said: str
) -> None:
    """The message names the file and the cause, whichever copy of the records is being made."""
    source = tmp_path / "source"
    source.mkdir()
    for split, count in (("train", 4000), ("test", 10)):
        rows = [
            json.dumps({"text": f"{n} " + "word " * 80, "label": "ab"[n % 2]}) for n in range(count)
        ]
        (source / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    config = tmp_path / "config.toml"
    config.write_text(CONFIG.format(directory=tmp_path / "run", source="demo" if generated else source))
    script = tmp_path / "limited.py"
    script.write_text(LIMITED.format(limit=200_000))
    done = subprocess.run(
        [sys.executable, str(script), str(config)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode != 0
    assert re.search(said, " ".join(done.stderr.split())), done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
