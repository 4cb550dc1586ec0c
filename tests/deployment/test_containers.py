"""The containers: both images are built, and a server and two nodes in containers finish a private run.

No registry is reached: the base image is made from Debian's packages, and the wheels are mounted. What runs is
`buildah run --isolation chroot`: the images' files, user, environment and working directory, no capabilities, one
bind mount; not the read-only root, the memory limit and the network of the compose files.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from fedslm import layout
from fedslm.privacy.chain import read_chain
from fedslm.privacy.keys import PUBLIC_KEY, read_public_key

pytestmark = [pytest.mark.slow, pytest.mark.federation, pytest.mark.timeout(3600)]
ROOT = Path(__file__).parent.parent.parent
FILES = {"server": ROOT / "server", "node": ROOT / "clients" / "hospital"}
STATE = {"server": "/var/lib/fedslm-server", "node": "/var/lib/fedslm/{name}"}
NODES = ("north", "south")
USER = 10001
BASE, SECONDS, BUILD_SECONDS = "localhost/fedslm-base", 300.0, 1800.0
PACKAGES = "python3,python3-venv,nginx-light,ca-certificates"
RUN = """
[run]
name = "contained"
[model]
base = "demo"
device = "cpu"
[lora]
rank = 2
alpha = 2.0
[data]
source = "/var/lib/fedslm-server/public"
[task]
name = "classification"
pooling = "mean"
max_length = 24
[training]
local_steps = 2
batch_size = 4
[privacy]
unit = "patient"
unit_column = "patient"
max_records_per_unit = 4
epsilon = 0.7
delta = 1e-5
clip_norm = 1.0
sample_rate = 0.05
[federation]
num_clients = 2
rounds = 2
join_deadline_seconds = 240.0
"""


def free_ports() -> tuple[int, int]:
    """Two ports that nobody listens on."""
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1]), int(other.getsockname()[1])


@dataclass(frozen=True)
class Store:
    """Images and containers of their own, below one directory."""

    root: Path

    def command(self, *words: str | Path) -> list[str]:
        """A command of buildah's, on this store."""
        places = ("--root", self.root / "store", "--runroot", self.root / "run")
        return ["buildah", "--storage-driver", "vfs", *map(str, (*places, *words))]

    def __call__(self, *words: str | Path, seconds: float = SECONDS) -> str:
        """Runs buildah; gives what it prints."""
        return finished(self.command(*words), seconds)

    def close(self) -> None:
        """Removes everything."""
        for words in (("rm", "--all"), ("rmi", "--all", "--force")):
            subprocess.run(self.command(*words), capture_output=True, timeout=SECONDS, check=False)
        shutil.rmtree(self.root, ignore_errors=True)


def finished(command: list[str], seconds: float) -> str:
    """Runs a command that ends with 0; gives what it prints."""
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=seconds, check=False, cwd=ROOT
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@dataclass
class Container:
    """One container of an image, with its one bind mount."""

    store: Store
    kind: str
    name: str
    identity: str
    directory: Path

    @property
    def state(self) -> str:
        """Its directory, as it sees it."""
        return STATE[self.kind].format(name=self.name)

    def command(self, *words: str) -> list[str]:
        """A command in the container, without capabilities and with the compose file's environment."""
        (service,) = yaml.safe_load((FILES[self.kind] / "compose.yaml").read_text())[
            "services"
        ].values()
        named = {
            key: value.replace("${FEDSLM_NODE}", self.name)
            for key, value in service["environment"].items()
        }
        own = [each for key, value in named.items() for each in ("--env", f"{key}={value}")]
        mount = ("--volume", f"{self.directory}:{self.state}:rw")
        options = (
            "run",
            "--isolation",
            "chroot",
            "--cap-drop",
            "all",
            *own,
            *mount,
            self.identity,
            "--",
        )
        return self.store.command(*options, *words)

    def __call__(self, *words: str, seconds: float = SECONDS) -> str:
        """Runs a command in it that ends with 0; gives what it prints."""
        return finished(self.command(*words), seconds)


def own(directory: Path) -> None:
    """Gives a directory to the images' user, for nobody else to read."""
    for path in (directory, *directory.rglob("*")):
        os.chown(path, USER, USER)
    directory.chmod(0o700)


def suite() -> str:
    """The host's Debian release, whose python3 is this one's version; skips elsewhere."""
    for tool in ("buildah", "mmdebstrap"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed; on Debian: apt-get install {tool}")
    system = platform.freedesktop_os_release()
    if os.geteuid() != 0 or system["ID"] != "debian":
        pytest.skip("buildah's chroot isolation needs root, and the base image Debian's packages")
    version = finished(["apt-cache", "show", "--no-all-versions", "python3"], SECONDS)
    if not re.search(
        rf"^Version: {sys.version_info.major}\.{sys.version_info.minor}\.", version, re.MULTILINE
    ):
        pytest.skip("Debian's python3 has another version than this Python, so its wheels do not fit")
    return str(system["VERSION_CODENAME"])


def make_wheels(directory: Path) -> None:
    """A directory of wheels from which both images are installed: what pip chooses under constraints.txt."""
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--wheel-dir", str(directory)]
    (torch,) = re.findall(r"^torch==.*$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    finished([*pip, "--no-deps", torch], BUILD_SECONDS)
    constrained = [*pip, "--find-links", str(directory), "-c", "constraints.txt"]
    finished([*constrained, ".[sql]", "setuptools>=77", "wheel"], BUILD_SECONDS)


def make_base(store: Store, release: str) -> None:
    """An image of Debian's packages with `python` and `pip` in PATH, as the official one has."""
    archive = store.root / "base.tar"
    finished(
        ["mmdebstrap", "--variant=minbase", f"--include={PACKAGES}", release, str(archive)],
        BUILD_SECONDS,
    )
    container = store("from", "scratch").strip()
    store("add", container, archive, "/", seconds=BUILD_SECONDS)
    archive.unlink()
    store("run", "--isolation", "chroot", container, "--", "python3", "-m", "venv", "/opt/python")
    store("config", "--env", "PATH=/opt/python/bin:/usr/sbin:/usr/bin:/sbin:/bin", container)
    store("commit", "--rm", container, BASE, seconds=BUILD_SECONDS)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """Both images, built as the first line of each Containerfile says, from the base image and the wheels."""
    release = suite()
    made = Store(tmp_path_factory.mktemp("containers"))
    wheels = made.root / "wheels"
    try:
        make_wheels(wheels)
        make_base(made, release)
        arguments = {"BASE": BASE, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/wheels"}
        given = [each for pair in arguments.items() for each in ("--build-arg", "=".join(pair))]
        for kind, directory in FILES.items():
            file = ("--file", directory / "Containerfile", "--tag", f"localhost/fedslm-{kind}")
            place = ("--isolation", "chroot", "--volume", f"{wheels}:/wheels:ro")
            made("build", *place, *given, *file, ROOT, seconds=BUILD_SECONDS)
        shutil.rmtree(wheels)
        yield made
    finally:
        made.close()


def container(store: Store, kind: str, name: str, directory: Path) -> Container:
    """A container of an image; its directory belongs to the image's user."""
    directory.mkdir()
    own(directory)
    identity = store("from", f"localhost/fedslm-{kind}", seconds=BUILD_SECONDS).strip()
    return Container(store, kind, name, identity, directory)


class Running:
    """A command in a container that goes on until it is stopped; what it says is kept."""

    def __init__(self, made: Container, *words: str) -> None:
        self.said = ""
        self._process = subprocess.Popen(
            made.command(*words),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._process.stdout or []:
            self.said += line

    def wait_for(self, text: str) -> None:
        """Waits until it has said something."""
        deadline = time.monotonic() + SECONDS
        while text not in self.said:
            assert self._process.poll() is None, self.said[-3000:]
            assert time.monotonic() < deadline, self.said[-3000:]
            time.sleep(0.2)

    def stop(self) -> None:
        """Asks it to end, then makes it."""
        for number in (15, 9):
            if self._process.poll() is None:
                os.killpg(self._process.pid, number)
                try:
                    self._process.wait(30)
                except subprocess.TimeoutExpired:
                    continue


def test_server_and_nodes_in_containers_finish_a_private_run(
    store: Store, notes: Path, tmp_path: Path
) -> None:
    """Images as their Containerfiles say: enrolled, admitted, checked, run, charged, and no user but theirs."""
    server = container(store, "server", "server", tmp_path / "server")
    running: list[Running] = []
    try:
        port, inner = free_ports()
        federation = f"{server.state}/federation.toml"
        (server.directory / "federation.toml").write_text(
            f'name = "t"\nhost = "127.0.0.1"\nport = {port}\ninner_port = {inner}\n'
        )
        shutil.copytree(notes, server.directory / "public")
        (server.directory / "run.toml").write_text(RUN)
        own(server.directory)
        assert server("id", "-u").strip() == str(USER)
        server("fedslm", "provision", "init", federation)
        running.append(Running(server, "fedslm", "server", "up", server.state))
        running[0].wait_for("the server is up")
        for name in NODES:
            running.append(start_node(store, server, name, notes, tmp_path))
        ended = server(
            "fedslm", "server", "run", f"{server.state}/run.toml", "--server", server.state, seconds=900
        )
        assert "report.md" in ended
        status = json.loads(server("fedslm", "server", "status", "--server", server.state, "--json"))
    finally:
        for each in reversed(running):
            each.stop()
    assert [(each["name"], each["state"]) for each in status["runs"]] == [("contained", "finished")]
    assert sorted(node["name"] for node in status["nodes"]) == sorted(NODES)
    report = json.loads((server.directory / "runs" / "contained" / "report.json").read_text())
    assert 0 < report["epsilon"] <= 0.7
    for name in NODES:
        node = tmp_path / name
        assert len(read_chain(node / layout.LEDGER, read_public_key(node / PUBLIC_KEY)).charges) == 2
        assert {path.stat().st_uid for path in node.rglob("*")} == {USER}
        assert not any(path.stat().st_mode & 0o077 for path in (node / "data").rglob("*"))


def start_node(store: Store, server: Container, name: str, notes: Path, tmp_path: Path) -> Running:
    """Enrols, admits, checks and starts a node in a container of its own."""
    node = container(store, "node", name, tmp_path / name)
    shutil.copy(notes / "train.jsonl", node.directory / "notes.jsonl")
    own(node.directory)
    words = ("--name", name, "--source", f"{node.state}/notes.jsonl")
    assert "wrote" in node("fedslm", "node", "enroll", node.state, *words)
    policy = node.directory / layout.POLICY
    policy.write_text(policy.read_text().replace("after_seconds = 300.0", "after_seconds = 20.0"))
    shutil.copy(node.directory / f"{name}.request.json", server.directory)
    own(server.directory)
    request = f"{server.state}/{name}.request.json"
    server("fedslm", "provision", "admit", request, "--server", server.state)
    shutil.copy(server.directory / "admissions" / f"{name}.admission.json", node.directory)
    own(node.directory)
    node("fedslm", "node", "accept", node.state, f"{node.state}/{name}.admission.json")
    (service,) = yaml.safe_load((FILES["node"] / "compose.yaml").read_text())["services"].values()
    command = [word.replace("$$", "$") for word in service["command"]]
    started = Running(node, *command)
    started.wait_for("checking self-test ... ok: passed")
    started.wait_for("as node")
    return started
