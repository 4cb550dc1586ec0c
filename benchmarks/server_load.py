"""What the processes and files of a server take at one moment; Linux only. For ``many_nodes.py``."""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

import scenario

SUPERLINK, RUN, PROXY, LAUNCHER, UP = "SuperLink", "run process", "proxy", "launcher", "server up"
NODES = "light nodes"
_WORDS = {"fedslm.deployment.guard": SUPERLINK, "nginx": PROXY, "flower-superexec": LAUNCHER}
_RUN_WORD = "flwr-serverapp"
_SPENDS, _DATABASE = "spends.json", "state/superlink.db"


@dataclass(frozen=True)
class Sample:
    """One moment of a server.

    Attributes:
        round: The last finished round.
        at: Seconds on :func:`time.monotonic`'s clock.
        cpu: Processor seconds so far, by process.
        memory: Resident bytes, by process.
        files: Sizes in bytes, by file or directory.
        calls: Calls of all nodes so far, by name.
        rows: Rows of the database, by table; only where they were asked for.
    """

    round: int
    at: float
    cpu: dict[str, float]
    memory: dict[str, int]
    files: dict[str, int]
    calls: dict[str, int]
    rows: dict[str, int]


@dataclass(frozen=True)
class Watched:
    """A server to look at.

    Attributes:
        up: The process of ``fedslm server up``.
        server: The server's directory.
        run: The run's directory.
        nodes: Processes of the light nodes.
        calls: The files with their calls.
    """

    up: int
    server: Path
    run: Path
    nodes: tuple[int, ...]
    calls: tuple[Path, ...]

    def sample(self, round: int = 0, *, with_rows: bool = False) -> Sample:
        """Looks at everything."""
        cpu: Counter[str] = Counter()
        memory: Counter[str] = Counter()
        at = time.monotonic()
        for name, process in self._processes():
            with suppress(OSError, KeyError):  # it ended meanwhile
                memory[name] += scenario.memory_bytes(process, "VmRSS")
                cpu[name] += own_cpu_seconds(process)
        rows = rows_of(self.server / _DATABASE) if with_rows else {}
        return Sample(round, at, dict(cpu), dict(memory), self._files(), self.all_calls(), rows)

    def all_calls(self) -> dict[str, int]:
        """Calls of all nodes so far, by name; "connected" counts the connected nodes."""
        total: Counter[str] = Counter()
        for path in self.calls:
            with suppress(FileNotFoundError):  # its process still starts
                total.update(json.loads(path.read_text()))
        return dict(total)

    def _processes(self) -> Iterator[tuple[str, int]]:
        """Names and numbers of all processes; everything that a run's process started is the run's."""
        yield UP, self.up
        for process in self.nodes:
            yield NODES, process
        in_run: set[int] = set()
        for process in scenario.descendants(self.up):
            with suppress(OSError):
                line = Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                found = [name for word, name in _WORDS.items() if word in line]
                if process not in in_run and _RUN_WORD in line:
                    in_run |= {process, *scenario.descendants(process)}
                if process in in_run or found:
                    yield RUN if process in in_run else found[0], process

    def _files(self) -> dict[str, int]:
        """Sizes of the files and directories that may grow."""
        log = Path(f"{self.server / _DATABASE}-wal")
        found = {
            "database": size_of([self.server / _DATABASE]),
            "its write-ahead log": size_of([log]),
            "state directory": size_of((self.server / "state").rglob("*")),
            "logs": size_of((self.server / "logs").glob("*")),
            _SPENDS: size_of([self.server / _SPENDS]),
            "run directory": size_of(self.run.rglob("*")),
        }
        for name in ("rounds.jsonl", "statements.jsonl", "standing.json", "checkpoint/state.json"):
            found[name] = size_of([self.run / name])
        return found


def own_cpu_seconds(process: int) -> float:
    """Processor time of one process, without what it started."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def size_of(paths: Iterable[Path]) -> int:
    """Bytes of the files among some paths."""
    total = 0
    for path in paths:
        with suppress(OSError):  # it was replaced meanwhile
            total += path.stat().st_size if path.is_file() else 0
    return total


def rows_of(database: Path) -> dict[str, int]:
    """Number of rows of each table that has any."""
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=10.0)) as opened:
        tables = opened.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        counted = {
            name: int(opened.execute(f'SELECT count(*) FROM "{name}"').fetchone()[0])  # noqa: S608
            for (name,) in tables
        }
    return {name: count for name, count in counted.items() if count}
