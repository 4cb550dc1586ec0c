"""Files to start from: what ``config example``, ``node example`` and ``policy example`` print."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from support.commands import ROOT, assert_clear, run

from fedslm.deployment.settings import read_node
from fedslm.deployment.starters import example_configs
from fedslm.privacy.policy import read_policy

PACKAGE = ROOT / "fedslm"
EXAMPLES = sorted((PACKAGE / "examples").iterdir())


def test_every_file_of_the_package_is_in_the_wheel() -> None:
    """A file that is not Python is matched by a pattern of package-data."""
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    shipped = {
        path
        for package, patterns in tool["package-data"].items()
        for pattern in patterns
        for path in ROOT.joinpath(*package.split(".")).glob(pattern)
    }
    there = {path for path in PACKAGE.rglob("*") if path.is_file()}
    data = {path for path in there if path.suffix != ".py" and "__pycache__" not in path.parts}
    assert EXAMPLES
    assert sorted(data - shipped) == []


def test_a_scenario_has_one_file() -> None:
    """simulations/NAME.toml is the file that the package ships, and needs none of the assets."""
    for path in EXAMPLES:
        assert (ROOT / "simulations" / path.name).samefile(path)
        assert "$" not in path.read_text()


def test_examples_are_listed() -> None:
    """Without a name every example is listed with what it needs and what it is."""
    result = run("config", "example")
    assert result.exit_code == 0, result.stderr
    for name, path in example_configs().items():
        (row,) = (line for line in result.stdout.splitlines() if f"│ {name} " in line)
        assert path.read_text()[2:40] in row
        needs = "real nodes" if name == "deployed" else "nothing" if "demo" in name else "the hub"
        assert name == "attacked" or needs in row


@pytest.mark.parametrize("name", example_configs())
def test_an_example_is_printed_as_it_is(name: str) -> None:
    """Not one byte differs from the file."""
    result = run("config", "example", name)
    assert (result.exit_code, result.stdout) == (0, example_configs()[name].read_text())


def test_an_example_works_in_an_empty_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is printed is a config that `config check` accepts, and its name is enough to find it."""
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text(run("config", "example", "demo_patients").stdout)
    assert run("config", "check", "mine.toml").exit_code == 0
    assert_clear(run("config", "example", "dmo"), "Unusable", "NAME='dmo'", "did you mean 'demo'?")
    assert_clear(run("config", "example", "?"), "Unusable", "known: deployed, attacked, banking77")
    assert_clear(run("config", "check", "no.toml"), "ConfigError", "`fedslm config example` lists")


@pytest.mark.parametrize("profile", ["hospital", "phone"])
def test_files_of_a_node(profile: str, tmp_path: Path) -> None:
    """The printed settings and policy can be read, and are those of the profile."""
    for command, file in (("node", "node.toml"), ("policy", "policy.toml")):
        result = run(command, "example", profile)
        assert result.exit_code == 0
        (tmp_path / file).write_text(result.stdout)
        assert result.stdout == (ROOT / "clients" / profile / file).read_text()
        assert (profile == "hospital") == (run(command, "example").stdout == result.stdout)
    assert read_node(tmp_path).profile == profile
    assert read_policy(tmp_path / "policy.toml").tasks
