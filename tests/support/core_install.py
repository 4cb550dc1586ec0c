"""Commands in a process that finds only what an installation without extras has.

python core_install.py COMMANDS reads a JSON list of argument lists and prints a JSON list of [exit code,
standard output, standard error]. A package that is not among the core's dependencies is not found, as if
it were not installed.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]


def in_core(commands: list[list[str]]) -> list[tuple[int, str, str]]:
    """Exit code, standard output and standard error of each command in a core installation."""
    done = subprocess.run(
        [sys.executable, __file__, json.dumps(commands)], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    return [(code, out, err) for code, out, err in json.loads(done.stdout.splitlines()[-1])]


def canonical(name: str) -> str:
    """A distribution's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed_with(requirements: list[str]) -> set[str]:
    """Names of all distributions that an installation of these would bring."""
    found: set[str] = set()
    waiting = [Requirement(each) for each in requirements]
    while waiting:
        one = waiting.pop()
        name = canonical(one.name)
        if name in found or (one.marker is not None and not one.marker.evaluate({"extra": ""})):
            continue
        found.add(name)
        with suppress(PackageNotFoundError):
            waiting += [Requirement(each) for each in requires(name) or ()]
    return found


def hidden() -> set[str]:
    """Top-level packages that are installed here and would not be in a core installation."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    kept = installed_with(project["dependencies"]) | {
        "fedslm",
        "pip",
        "setuptools",
        "pytest",
        "iniconfig",
    }
    return {
        package
        for package, owners in packages_distributions().items()
        if not kept & {canonical(owner) for owner in owners}
    }


class Without:
    """A finder that does not find some packages."""

    def __init__(self, finder: Any, packages: set[str]) -> None:
        self.finder, self.packages = finder, packages

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Finds all others."""
        if name.split(".")[0] in self.packages:
            return None
        return self.finder.find_spec(name, path, target)

    def invalidate_caches(self) -> None:
        """Called before a search."""


def results(commands: list[list[str]]) -> Iterator[tuple[int, str, str]]:
    """Runs each command."""
    from typer.testing import CliRunner

    from fedslm.cli import app

    for command in commands:
        done = CliRunner().invoke(app, command, env={"COLUMNS": "300", "TERM": "dumb"})
        error = done.exception
        if error is not None and not isinstance(error, SystemExit):
            raise error
        yield done.exit_code, done.stdout, done.stderr


def main() -> None:
    """Hides, runs, and says whether anything hidden was imported."""
    away = hidden()
    for name in {"torch", "flwr", "opacus"} - away:
        raise SystemExit(f"{name} is not hidden")
    for name in [name for name in sys.modules if name.split(".")[0] in away]:
        del sys.modules[name]
    sys.meta_path[:] = [Without(finder, away) for finder in sys.meta_path]
    print(json.dumps(list(results(json.loads(sys.argv[1])))))


if __name__ == "__main__":
    main()
