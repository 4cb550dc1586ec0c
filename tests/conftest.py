"""Small real things that many tests use: tiny models of each architecture, tiny data, tiny configs."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.machine import machine, threads
from support.tiny import make_rows, write_base, write_rows

from fedslm import config as configuration
from fedslm.config import Config

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", str(threads()))  # whichever test is the first to import torch


def pytest_configure(config: pytest.Config) -> None:
    """The tests of a session share a cache of their own, with its workers and what they start."""
    if not hasattr(config, "workerinput"):  # before pytest-xdist starts workers, which inherit it
        directory = tempfile.TemporaryDirectory()
        patch = pytest.MonkeyPatch()
        patch.setenv("FEDSLM_CACHE", directory.name)
        config.add_cleanup(patch.undo)
        config.add_cleanup(directory.cleanup)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Tests compute with one thread, as clients do; FEDSLM_TEST_THREADS asks for more."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(threads())


@pytest.fixture(autouse=True)
def kept_umask() -> Iterator[None]:
    """A command that runs in this process lets nobody else read its files; the next test starts afresh."""
    before = os.umask(0o022)
    os.umask(before)
    yield
    os.umask(before)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """After a failure one line says on what, so that a report from elsewhere can be understood."""
    if terminalreporter.stats.get("failed") or terminalreporter.stats.get("error"):
        terminalreporter.write_line(machine())


@pytest.fixture(scope="session")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with train.jsonl and test.jsonl."""
    directory = tmp_path_factory.mktemp("notes")
    write_rows(directory / "train.jsonl", make_rows(90, 0))
    write_rows(directory / "test.jsonl", make_rows(40, 1))
    return directory


@pytest.fixture(scope="session")
def config_in(notes: Path) -> Callable[..., Config]:
    """Builds a tiny config on the embedded model with a run directory; sections are updated by keyword."""

    def make(directory: Path, **sections: dict[str, Any]) -> Config:
        values: dict[str, dict[str, Any]] = {
            "run": {"name": "tiny", "directory": str(directory)},
            "model": {"base": "demo", "device": "cpu"},
            "lora": {"rank": 2, "alpha": 2.0, "target_modules": ["3.output.dense"]},
            "data": {"source": str(notes), "partition": "natural"},
            "task": {"name": "classification", "pooling": "mean", "max_length": 24},
            "training": {"local_steps": 2, "batch_size": 4, "learning_rate": 0.01},
            "privacy": {"unit": "none"},
            "federation": {"num_clients": 3, "rounds": 3, "evaluate_every": 1},
            "engine": {"workers": 0},
        }
        for section, changes in sections.items():
            values[section] = {**values.get(section, {}), **changes}
        return configuration.from_mapping(values)

    return make


@pytest.fixture
def make_config(config_in: Callable[..., Config], tmp_path: Path) -> Callable[..., Config]:
    """Builds a tiny config; its run directory is the test's own."""

    def make(**sections: dict[str, Any]) -> Config:
        return config_in(tmp_path / "run", **sections)

    return make


@pytest.fixture(scope="session")
def family_directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Writes a randomly initialised model of an architecture and task, once."""
    made: dict[tuple[str, str], Path] = {}

    def make(family: str, task: str) -> Path:
        if (family, task) not in made:
            made[family, task] = write_base(tmp_path_factory.mktemp(f"{family}-{task}"), family, task)
        return made[family, task]

    return make


@pytest.fixture(scope="session")
def finished_run(
    config_in: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Trains a tiny model of a kind (finished.KINDS), once; tests leave its directory as it is."""
    from support import finished

    source = finished.write_sources(tmp_path_factory.mktemp("sources"))
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            directory = tmp_path_factory.mktemp(f"finished-{kind}")
            made[kind] = finished.train(kind, directory, source, config_in)
        return made[kind]

    return make
