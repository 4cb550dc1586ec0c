"""One federation on loopback for each file that asks for it: a server, a proxy and three nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.sites import Site, federation

from fedslm import simulation
from fedslm.config import Config

MakeConfig = Callable[..., Config]
ROUNDS = 4
Simulated = tuple[Path, dict[str, Any]]


@pytest.fixture(scope="module")
def simulated(config_in: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Simulated:
    """A simulation without noise of the records that the nodes have: its adapter is what they must reach."""
    directory = tmp_path_factory.mktemp("simulated") / "run"
    report = simulation.simulate(
        config_in(directory, federation={"rounds": ROUNDS}).resolved(),
    )
    return directory, report


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A server and three nodes, up and connected."""
    with federation(tmp_path_factory.mktemp("site")) as made:
        yield made


@pytest.fixture
def make(site: Site, config_in: MakeConfig) -> MakeConfig:
    """A config for the real nodes, with a run directory below the server's."""

    def build(name: str, **sections: dict[str, Any]) -> Config:
        rounds = {"rounds": ROUNDS, **sections.pop("federation", {})}
        return config_in(site.server / "runs" / name, federation=rounds, **sections)

    return build
