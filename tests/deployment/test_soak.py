"""A long run with random kills: it ends, and nothing grows."""

from __future__ import annotations

import os
import random
import signal
import statistics
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
from support.sites import Site, eventually, federation, ledger_of, rounds_of
from support.tiny import PRIVATE

from fedslm.config import Config
from fedslm.deployment import control

pytestmark = [pytest.mark.federation, pytest.mark.slow]
ROUNDS, WARM = 30, 8
NODES = ("north", "south", "west", "east")
MORTAL = ("north", "south")


@pytest.mark.timeout(1800)
def test_thirty_rounds_with_random_kills(
    config_in: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """30 rounds, 4 nodes, kills (-9) of nodes and workers: all rounds, all charges, flat memory and disk."""
    data = {"partition": "iid"}
    root, chance = tmp_path / "site", random.Random(6)
    root.mkdir()
    with federation(root, NODES) as site:
        rounds = {"rounds": ROUNDS, "num_clients": 4, "round_deadline_seconds": 120.0, "min_clients": 2}
        config = config_in(
            site.server / "runs" / "soak",
            data=data,
            privacy=PRIVATE,
            training={"local_steps": 20},
            federation={**rounds, "max_failed_rounds": 5},
        )
        kills, seen, sizes = [], 0, defaultdict(list)
        with site.running(config) as (directory, ended):
            while not ended():
                wait_for_more(directory, seen, ended)
                seen = len(rounds_of(directory))
                for name, size in measure(site, directory).items():
                    sizes[name].append(size)
                if seen < ROUNDS - 3 and chance.random() < 0.4:
                    kills.append(kill_somebody(site, chance))
        assert ended() == control.COMPLETED
        lines = rounds_of(directory)
        for name in NODES:
            lost = sum(any(why.startswith(f"{name}: ") for why in line["reasons"]) for line in lines)
            charged = {charge.round for charge in ledger_of(site.root / name).charges}
            assert len(charged) >= ROUNDS - lost
    growth = {name: grown(values) for name, values in sizes.items()}
    with capsys.disabled():
        print(f"\n{len(kills)} kills ({', '.join(kills)}); completed {[x['completed'] for x in lines]}")
        for name, (early, late) in growth.items():
            print(f"  {name}: {early / 1e6:.1f} MB then {late / 1e6:.1f} MB")
    assert len(kills) >= 5
    assert [line["round"] for line in lines] == list(range(1, ROUNDS + 1))
    assert sum(line["completed"] for line in lines) >= 0.75 * 4 * ROUNDS
    for name, (early, late) in growth.items():
        assert late <= 1.15 * early + 4e6, f"{name} grew from {early / 1e6:.1f} to {late / 1e6:.1f} MB"


def wait_for_more(directory: Path, seen: int, ended: Callable[[], str]) -> None:
    """Waits for one more round, or the end."""
    eventually(lambda: len(rounds_of(directory)) > seen or bool(ended()), "a round", 240)


def kill_somebody(site: Site, chance: random.Random) -> str:
    """Kills a mortal node, which then comes back, or only its worker."""
    name = chance.choice(MORTAL)
    worker = site.worker_of(name)
    if chance.random() < 0.5 and worker is not None:
        os.kill(worker, signal.SIGKILL)
        return f"{name}'s worker"
    site.stop(name, signal.SIGKILL)
    site.start(name, "node", "up", site.root / name)
    return name


def measure(site: Site, directory: Path) -> dict[str, int]:
    """Bytes of memory of what is never killed, and bytes on disk."""
    found = {"superlink": resident(site.pid_of_superlink())}
    for name in set(NODES) - set(MORTAL):
        found[f"node {name}"] = resident(site.processes[name].pid)
        if (worker := site.worker_of(name)) is not None:
            found[f"worker {name}"] = resident(worker)
    places = {"server's state": site.server / "state", "server's logs": site.server / "logs"}
    places["checkpoint"] = directory / "checkpoint"
    for name, place in places.items():
        found[name] = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    return found


def resident(process: int) -> int:
    """Resident memory in bytes; 0 if it is gone."""
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def grown(values: list[int]) -> tuple[float, float]:
    """Medians after warm-up: of the first and of the last third."""
    warm = values[WARM:]
    third = max(1, len(warm) // 3)
    return statistics.median(warm[:third]), statistics.median(warm[-third:])
