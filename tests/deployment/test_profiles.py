"""Tests of what an engineer copies: service units, container files and the hospital's settings."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import fedslm
from fedslm.data.database import holds_password, is_url
from fedslm.deployment.settings import read_federation, read_node
from fedslm.privacy.policy import read_policy

ROOT = Path(__file__).parent.parent.parent
HOSPITAL, SERVER = ROOT / "clients" / "hospital", ROOT / "server"
NODE_UNIT, SERVER_UNIT = HOSPITAL / "fedslm-node@.service", SERVER / "fedslm-server.service"
UNITS = pytest.mark.parametrize("unit", [NODE_UNIT, SERVER_UNIT], ids=lambda path: path.name)
COMPOSES = pytest.mark.parametrize("directory", [HOSPITAL, SERVER], ids=lambda path: path.name)
PROGRAM, INSTALLED = str(Path(sys.executable).parent / "fedslm"), "/opt/fedslm/bin/fedslm"
CODE = Path(fedslm.__file__).parent.parent
EXPOSED_AT_MOST = 15  # tenths; systemd calls a unit without settings 9.6
SECONDS = 600.0  # whatever succeeds ends the wait
systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed"
)

# What ProtectSystem=strict, ProtectHome, PrivateTmp and User= leave: one writable directory, a /tmp of its own, no
# rights. Python and this code are put back where they were, should that be in a home or in /tmp.
SANDBOX = """set -e
mount -t tmpfs tmpfs /srv
mkdir /srv/state
mount --rbind "$STATE" /srv/state
number=0
for place in $KEPT; do
  number=$((number + 1)); mkdir /srv/$number; mount --rbind "$place" /srv/$number
done
mount -t tmpfs -o mode=755 tmpfs /root
mount -t tmpfs -o mode=755 tmpfs /home
mount -t tmpfs -o mode=1777 tmpfs /tmp
number=0
for place in $KEPT; do
  number=$((number + 1)); mkdir -p "$place"; mount --rbind /srv/$number "$place"
done
awk '{print $5}' /proc/self/mountinfo | grep -vE '^/(proc|sys|dev|srv/state)(/|$)|^/tmp$' | sort -u |
while read -r place; do mount -o remount,bind,ro "$place"; done
cd /srv/state
umask 077
exec setpriv --reuid=65534 --regid=65534 --clear-groups --no-new-privs --inh-caps=-all --bounding-set=-all "$@"
"""


def setting(unit: Path, name: str) -> str:
    """What a unit sets, with the state directory's and the program's places in a test."""
    (value,) = re.findall(rf"^{name}=(.+)$", unit.read_text(), re.MULTILINE)
    return re.sub(r"%S/fedslm(-server|/%i)", "/srv/state", value).replace(INSTALLED, PROGRAM)


def compose(directory: Path) -> dict[str, Any]:
    """The one service of a compose file."""
    (service,) = yaml.safe_load((directory / "compose.yaml").read_text())["services"].values()
    return dict(service)


@systemd
@UNITS
def test_systemd_accepts_a_unit(unit: Path, tmp_path: Path) -> None:
    """Every key is one that systemd knows, and every value one that it takes: it says nothing at all."""
    copy = tmp_path / unit.name
    copy.write_text(unit.read_text().replace(INSTALLED, shutil.which("true") or ""))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", copy], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@systemd
@UNITS
def test_a_unit_is_hardened(unit: Path) -> None:
    """The review of systemd itself: exposed to 1.5 of 10 at most."""

    def passes(path: Path) -> bool:
        command = ["systemd-analyze", "security", "--offline=true", "--no-pager"]
        done = subprocess.run(
            [*command, f"--threshold={EXPOSED_AT_MOST}", path], capture_output=True, check=False
        )
        return done.returncode == 0

    assert passes(unit)


@systemd
def test_the_review_would_notice(tmp_path: Path) -> None:
    """One protection fewer, and the review fails."""
    weaker = tmp_path / SERVER_UNIT.name
    weaker.write_text(SERVER_UNIT.read_text().replace("ProtectSystem=strict\n", ""))
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager"]
    done = subprocess.run(
        [*command, f"--threshold={EXPOSED_AT_MOST}", weaker], capture_output=True, check=False
    )
    assert done.returncode != 0


def test_our_readers_accept_the_settings() -> None:
    """The hospital's and the server's files are what our readers read; patients are protected, URLs hold no password."""
    node, policy = read_node(HOSPITAL), read_policy(HOSPITAL / "policy.toml")
    assert is_url(node.source)
    assert not holds_password(node.source)
    assert node.query.strip().startswith("SELECT")
    assert node.profile == "hospital"
    assert policy.unit == "user"
    assert f"AS {policy.unit_column}" in node.query
    assert policy.weakest_passes == "fixed"
    assert read_federation(SERVER).port == 8443


@COMPOSES
def test_a_container_can_do_little(directory: Path) -> None:
    """No root, no rights, a read-only system, and one mount: its own directory."""
    service = compose(directory)
    assert service["user"] == "10001"
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert [mount.split(":")[0] for mount in service["tmpfs"]] == ["/tmp"]  # noqa: S108
    (mount,) = service["volumes"]
    assert mount["target"] == service["environment"]["HOME"]
    assert not {"privileged", "cap_add", "network_mode", "pid", "ipc", "devices"} & set(service)
    assert "USER 10001" in (directory / "Containerfile").read_text().splitlines()


def test_the_proxys_port_alone_is_published() -> None:
    """The server publishes what nodes reach, a node nothing."""
    port = read_federation(SERVER).port
    assert compose(SERVER)["ports"] == [f"{port}:{port}"]
    assert "ports" not in compose(HOSPITAL)
    assert f":{port:04X} 01" in compose(HOSPITAL)["healthcheck"]["test"][3]


@COMPOSES
def test_docker_accepts_a_compose_file(directory: Path, tmp_path: Path) -> None:
    """Docker's own client reads it."""
    if subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode:
        pytest.skip("docker compose is not installed")
    shutil.copy(directory / "compose.yaml", tmp_path)
    (tmp_path / "north.env").write_text("FEDSLM_DATABASE_USER=reader\n")
    done = subprocess.run(
        ["docker", "compose", "config", "--quiet"],
        cwd=tmp_path,
        env={**os.environ, "FEDSLM_NODE": "north"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def free_ports() -> tuple[int, int]:
    """Two ports that nobody listens on."""
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1]), int(other.getsockname()[1])


def outside(*words: str | Path) -> str:
    """Runs fedslm as the operator does; gives what it prints."""
    done = subprocess.run([PROGRAM, *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def inside(unit: Path, state: Path, *command: str) -> subprocess.Popen[str]:
    """Starts a command as a unit would: in its sandbox and its environment, as a user without rights."""
    for path in (state, *state.rglob("*")):
        os.chown(path, 65534, 65534)
    state.chmod(0o700)
    own = dict(each.split("=", 1) for each in setting(unit, "Environment").split())
    return subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", SANDBOX, "sh", *command],
        env={
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "KEPT": f"{CODE} {sys.prefix} {sys.base_prefix}",
            "STATE": str(state),
            "PYTHONPATH": str(CODE),
            "OMP_NUM_THREADS": "1",
            **own,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(process: subprocess.Popen[str], text: str) -> None:
    """Reads what a process says until it has said this."""
    said, deadline = "", time.monotonic() + SECONDS
    for line in process.stdout or []:
        said += line
        if text in line:
            return
        assert time.monotonic() < deadline, said
    raise AssertionError(f"it ended without {text!r}: {said}")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Path]:
    """The server's directory, and the server's unit at work in it."""
    if os.geteuid() != 0 or shutil.which("unshare") is None or shutil.which("setpriv") is None:
        pytest.skip("mount namespaces need root, unshare and setpriv")
    if shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin") is None:
        pytest.skip("nginx is not installed; on Debian: apt-get install nginx-light")
    directory = tmp_path / "server"
    directory.mkdir()
    port, inner = free_ports()
    text = (SERVER / "federation.toml").read_text().replace("federation.example.org", "127.0.0.1")
    (directory / "federation.toml").write_text(
        text.replace("8443", str(port)).replace("9443", str(inner))
    )
    outside("provision", "init", directory / "federation.toml")
    process = inside(SERVER_UNIT, directory, *setting(SERVER_UNIT, "ExecStart").split())
    try:
        wait_for(process, "the server is up")
        yield directory
        assert process.poll() is None
    finally:
        process.terminate()
        said = process.communicate(timeout=SECONDS)[0]
    assert "restarting it" not in said


def test_a_sandbox_holds(tmp_path: Path) -> None:
    """What the sandboxed tests rest on: in it, nothing outside the state directory and /tmp can be written."""
    if os.geteuid() != 0 or shutil.which("unshare") is None or shutil.which("setpriv") is None:
        pytest.skip("mount namespaces need root, unshare and setpriv")
    state = tmp_path / "state"
    state.mkdir()
    tries = f"touch /srv/state/a /tmp/b && ! touch /var/tmp/c && ! touch {CODE}/d && test ! -e $STATE"
    process = inside(NODE_UNIT, state, "sh", "-c", f"{tries} && id -u")
    assert process.communicate(timeout=SECONDS)[0].splitlines()[-1] == "65534"
    assert process.returncode == 0
    assert [path.name for path in state.iterdir()] == ["a"]


@pytest.mark.slow
@pytest.mark.federation
def test_the_units_commands_work_in_their_sandboxes(server: Path, notes: Path, tmp_path: Path) -> None:
    """Server and node come up, find each other and are healthy with one writable directory and no rights."""
    node = tmp_path / "north"
    node.mkdir()
    shutil.copy(notes / "train.jsonl", node / "notes.jsonl")
    (node / "node.toml").write_text('name = "north"\nsource = "/srv/state/notes.jsonl"\n')
    shutil.copy(HOSPITAL / "policy.toml", node)
    outside("node", "enroll", node, "--name", "north")
    outside("provision", "admit", node / "north.request.json", "--server", server)
    outside("node", "accept", node, server / "admissions" / "north.admission.json")

    check = inside(NODE_UNIT, node, *setting(NODE_UNIT, "ExecStartPre").split())
    said = check.communicate(timeout=SECONDS)[0]
    assert check.returncode == 0, said
    assert "checking self-test ... ok: passed" in said
    assert len(re.findall(r"^checking .* \.\.\. ok: ", said, re.MULTILINE)) == 12

    assert not is_connected(server)
    process = inside(NODE_UNIT, node, *setting(NODE_UNIT, "ExecStart").split())
    try:
        wait_for(process, "as node")
        (row,) = json.loads(outside("server", "status", "--server", server, "--json"))["nodes"]
        assert row["status"] == "online"
        assert is_connected(server)
    finally:
        process.terminate()
        process.communicate(timeout=SECONDS)
    assert not is_connected(server)
    assert process.returncode == 0


@pytest.mark.slow
@pytest.mark.federation
def test_a_servers_health_is_its_superlinks(server: Path) -> None:
    """The container's health check passes while nodes could work, and fails when the SuperLink hangs."""
    federation = tomllib.loads((server / "federation.toml").read_text())
    *_, code = compose(SERVER)["healthcheck"]["test"]
    code = code.replace("/var/lib/fedslm-server", str(server)).replace("8443", str(federation["port"]))

    def healthy() -> bool:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
        return done.returncode == 0

    assert healthy()
    pattern = f"flower-superlink.*--port {federation['inner_port']}"
    found = subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True, check=True)
    for process in found.stdout.split():
        os.kill(int(process), 19)
    try:
        assert not healthy()
    finally:
        for process in found.stdout.split():
            os.kill(int(process), 18)


def is_connected(server: Path) -> bool:
    """The node's health check, on the server's port."""
    port = tomllib.loads((server / "federation.toml").read_text())["port"]
    _, *command = compose(HOSPITAL)["healthcheck"]["test"]
    command = [word.replace("20FB", f"{port:04X}") for word in command]
    return subprocess.run(command, check=False).returncode == 0
