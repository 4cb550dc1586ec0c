"""``fedslm doctor``: what an installation and a machine can do, and what to do if it is not enough."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from support.commands import run

from fedslm import doctor
from fedslm.attestations import cache_problem
from fedslm.doctor import Finding
from fedslm.engines import placement


def test_this_machine_can_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every area is there, the tests' own packages are in their ranges, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDSLM_CACHE", str(tmp_path / "cache"))
    result = run("doctor", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["usable"] is True
    areas = [each["area"] for each in found["findings"]]
    assert set(areas) == set(doctor.Area.__args__)  # type: ignore[attr-defined]
    lines = {(each["area"], each["name"]): each for each in found["findings"]}
    for name in ("torch", "flwr", "peft", "transformers", "opacus", "cryptography"):
        assert lines["versions", name]["text"].startswith(version(name))
        assert "tested: " in lines["versions", name]["text"]
    assert lines["permissions", "cache"]["text"] == str(tmp_path / "cache")
    assert lines["network", "fedslm"]["remedy"] == ""
    assert not list(tmp_path.iterdir())


def test_people_read_it_too() -> None:
    """Without --json the areas are headings, and the last line says whether fedslm can be used."""
    result = run("doctor")
    assert result.exit_code == 0, result.output
    for word in ("versions", "devices", "engines", "permissions", "machine", "network", "torch"):
        assert word in result.stdout
    assert result.stdout.splitlines()[-1] == "fedslm can be used here."


def one(requirement: str, *extras: str) -> Finding:
    """What is said of one requirement."""
    return doctor._version(Requirement(requirement), extras)


def test_versions_are_held_against_their_ranges() -> None:
    """Another version and a missing package cannot be used and say what to install; an extra's may be missing."""
    wrong = one("numpy<1")
    assert (wrong.is_usable, wrong.remedy) == (False, 'pip install "numpy<1"')
    assert f"{version('numpy')}, not tested (tested: <1)" in wrong.text
    missing = one("no-such-package>=3")
    assert (missing.is_usable, missing.remedy) == (False, 'pip install "no-such-package>=3"')
    extra = one("no-such-package>=3", "sql")
    assert (extra.is_usable, extra.text) == (True, "not installed (for fedslm[sql])")
    assert one("numpy>=2").is_usable
    assert one("numpy").text == version("numpy")


def test_extras_are_followed() -> None:
    """A requirement's own extras count: flwr[simulation] lacks nothing where Ray is installed."""
    assert list(doctor._lacking(Requirement("no-such-package"))) == ["no-such-package"]
    assert list(doctor._lacking(Requirement("numpy"))) == []
    of = doctor._extras_of(Requirement('a; extra == "sql"'), ["sql", "simulation"])
    assert of == ("sql",)
    assert doctor._extras_of(Requirement("a; python_version > '3'"), ["sql"]) == ()


def test_a_failure_names_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With too little memory the command ends with 1 and says what to do."""
    (tmp_path / "meminfo").write_text("MemAvailable: 1000 kB\n")
    monkeypatch.setattr(placement, "_MEMINFO", tmp_path / "meminfo")
    result = run("doctor")
    assert result.exit_code == 1
    assert "memory: 0.0 GB free; one worker takes 0.6 GB" in result.stderr
    assert "can be used" not in result.stdout


@pytest.mark.parametrize("value", ["0", "1"])
def test_the_network_follows_the_environment(value: str) -> None:
    """Flower's telemetry, Ray's statistics and the hub are reported as the environment sets them."""
    names = ("FLWR_TELEMETRY_ENABLED", "RAY_USAGE_STATS_ENABLED", "HF_HUB_OFFLINE")
    found = {each.name: each.text for each in doctor._network(dict.fromkeys(names, value))}
    assert ("send telemetry" in found["flower"]) == (value == "1")
    assert ("sends usage" in found["ray"]) == (value == "1")
    assert ("off: " in found["hub"]) == (value == "1")


def test_the_cache_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A place that others can write, or that is a file, is a problem; one that can be made is none."""
    monkeypatch.setenv("FEDSLM_CACHE", str(tmp_path / "cache"))
    assert cache_problem() == ""
    assert not list(tmp_path.iterdir())
    place = tmp_path / "cache" / "attestations"
    place.mkdir(parents=True)
    assert cache_problem() == ""
    place.chmod(0o777)
    assert "can be written by others" in cache_problem()
    place.rmdir()
    place.write_text("")
    assert "not a directory" in cache_problem()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDSLM_CACHE", str(tmp_path / "file"))
    assert "cannot be written" in cache_problem()
