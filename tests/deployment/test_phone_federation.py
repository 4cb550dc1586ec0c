"""A phone in a real federation: it is there within its conditions alone, and a broken download goes on."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from support.sites import (
    Cable,
    Site,
    change_admission,
    eventually,
    federation,
    ledger_of,
    moving,
    rounds_of,
)
from support.tiny import PRIVATE, write_base

from fedslm.config import Config
from fedslm.deployment import control
from fedslm.storage import load_adapter

pytestmark = [pytest.mark.federation, pytest.mark.slow]
MakeConfig = Callable[..., Config]
PHONE = 'profile = "phone"\n[conditions]\ncommand = ["test", "-e", "../plugged"]\ncheck_seconds = 0.3\n'
ALONE = {"num_clients": 1, "rounds": 1}
MIB = 1 << 20


class Flaky(Cable):
    """A cable that counts what comes down, and breaks every connection once it has carried so many bytes.

    The next four connections break within TLS's handshake.
    """

    def __init__(self, port: int, breaks_at: list[int]) -> None:
        self.down, self.breaks, self._breaks_at = 0, 0, breaks_at
        self._hang_ups = 0
        self._counting = threading.Lock()
        super().__init__(port)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                if self._hang_ups:
                    self._hang_ups -= 1
                    near.recv(1 << 16)
                    near.close()
                    continue
                far = socket.create_connection(("127.0.0.1", self._target))
                self._pairs.append((near, far))
                for source, sink in ((near, far), (far, near)):
                    pump = threading.Thread(target=self._pump, args=(source, sink, near), daemon=True)
                    pump.start()

    def _pump(self, source: socket.socket, sink: socket.socket, near: socket.socket) -> None:
        """Carries bytes one way, counting those to the node."""
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if sink is near and self._has_broken(len(data)):
                    self._hang_ups = 4
                    self.cut()
                    return
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _has_broken(self, size: int) -> bool:
        """Counts, and says whether this is where it breaks."""
        with self._counting:
            self.down += size
            if not self._breaks_at or self.down < self._breaks_at[0]:
                return False
            self._breaks_at.pop(0)
            self.breaks += 1
            return True


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A server and one phone, which is plugged in."""
    root = tmp_path_factory.mktemp("site")
    (root / "plugged").touch()
    with federation(root, ("north",), more=PHONE) as made:
        yield made


def test_a_phone_is_there_within_its_conditions_alone(site: Site, config_in: MakeConfig) -> None:
    """Unplugged in mid-round, it finishes the round and goes: offline, no worker; plugged in, it is back."""
    plugged, long = site.root / "plugged", {"local_steps": 100}
    config = config_in(site.server / "runs" / "phone", privacy=PRIVATE, training=long, federation=ALONE)
    with site.running(config) as (directory, ended):
        eventually(lambda: len(ledger_of(site.root / "north").charges) == 1, "the round is charged")
        plugged.unlink()
        eventually(lambda: bool(ended()), "the run's end")
    assert ended() == control.COMPLETED
    assert [line["completed"] for line in rounds_of(directory)] == [1], rounds_of(directory)[0][
        "reasons"
    ]
    eventually(lambda: not site.online("north"), "offline")
    assert "does not take part" in site.log("north")
    before = len(site.cables["north"]._pairs)
    eventually(lambda: site.worker_of("north") is None, "no worker")
    assert len(site.cables["north"]._pairs) == before  # not one new connection
    plugged.touch()
    eventually(lambda: site.online("north"), "online again")
    again = config_in(site.server / "runs" / "again", privacy=PRIVATE, federation=ALONE)
    assert site.run(again)[0] == control.COMPLETED


def test_a_broken_download_goes_on_from_what_is_there(
    site: Site, config_in: MakeConfig, tmp_path: Path
) -> None:
    """The connection breaks twice within a message of 38 MB: the round completes, and little came twice."""
    site.stop("north")
    flaky = Flaky(int(site.settings["port"]), [6 * MIB, 14 * MIB])
    change_admission(site.root / "north", address=f"127.0.0.1:{flaky.port}")
    site.start_node("north")
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4}
    base = write_base(tmp_path, "bert", "classification", **sizes)
    config = config_in(
        site.server / "runs" / "wide",
        model={"base": str(base)},
        lora={"rank": 256, "target_modules": ["all-linear"]},
        training={"local_steps": 1},
        compression={"upload": "int8"},
        federation=ALONE,
    )
    status, directory = site.run(config)
    site.stop("north")
    flaky.close()
    assert status == control.COMPLETED, site.log("north")
    assert [line["completed"] for line in rounds_of(directory)] == [1]
    size = load_adapter(moving(directory)).num_bytes
    print(f"message {size / MIB:.1f} MiB, down {flaky.down / MIB:.1f} MiB, {flaky.breaks} breaks")
    assert flaky.breaks == 2
    assert 30 * MIB < size <= flaky.down < size + 8 * MIB
