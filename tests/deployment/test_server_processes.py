"""Tests of how the server keeps its processes."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
from support.commands import run
from support.sites import fedslm, free_port

from fedslm.deployment import authority, server
from fedslm.deployment.server import Child, _alone, _listens, _Running, _wait_until_listening
from fedslm.deployment.settings import read_federation
from fedslm.errors import ConfigError, RunError


@pytest.mark.parametrize("mode", [0o644, 0o755], ids=["not executable", "no interpreter"])
def test_a_program_that_cannot_be_started_is_an_error(tmp_path: Path, mode: int) -> None:
    """Ours, with the program and the remedy; such as Flower's, if its Python lies in a home that is hidden."""
    (tmp_path / "logs").mkdir()
    program = tmp_path / "flower-superlink"
    program.write_text("#!/home/hidden/bin/python\n")
    program.chmod(mode)
    with pytest.raises(RunError, match=r"flower-superlink cannot be started: .*must be able to run it"):
        _Running(tmp_path, Child("superlink", (str(program),)))


def test_a_status_without_a_server_is_said_soon(tmp_path: Path) -> None:
    """Where no server runs, `server status` ends with an error and the remedy within 15 s; it says that it waits."""
    path = tmp_path / "federation.toml"
    path.write_text('name = "t"\nhost = "127.0.0.1"\ninner_port = 1\n')
    assert run("provision", "init", str(path)).exit_code == 0
    began = time.monotonic()
    done = run("server", "status", "--server", str(tmp_path))
    assert time.monotonic() - began < 15
    assert done.exit_code == 1
    assert done.stderr.count("waiting up to 6 s for the server in") == 1
    assert "is `fedslm server up` running?" in " ".join(done.stderr.split())


def server_directory(root: Path, **ports: int) -> Path:
    """A server's directory with its certificates."""
    lines = "".join(f"{key} = {port}\n" for key, port in ports.items())
    (root / "federation.toml").write_text(f'name = "t"\nhost = "127.0.0.1"\n{lines}')
    authority.certify(root)
    return root


@pytest.mark.parametrize("taken", ["port", "inner_port", "metrics_port"])
def test_a_taken_port_is_an_error_at_once(tmp_path: Path, taken: str) -> None:
    """Another program answers on a port: `server up` says which and how to go on, and starts nothing."""
    ports = {"port": free_port(), "inner_port": free_port(), "metrics_port": free_port()}
    directory = server_directory(tmp_path, **ports)
    with socket.create_server(("127.0.0.1", ports[taken])):
        said = fedslm("server", "up", directory, code=1)
    assert f"{taken}={ports[taken]} is not available: Address already in use" in said
    assert f"set another {taken} in federation.toml" in said
    assert "the server is up" not in said
    assert not (directory / "logs" / "superlink.log").exists()


@pytest.mark.parametrize(("first", "second"), [("port", "inner_port"), ("inner_port", "metrics_port")])
def test_one_port_for_two_is_refused(tmp_path: Path, first: str, second: str) -> None:
    """The server's ports differ: one that is written twice is an error of federation.toml."""
    lines = f"{first} = 9\n{second} = 9\n"
    (tmp_path / "federation.toml").write_text(f'name = "t"\nhost = "127.0.0.1"\n{lines}')
    with pytest.raises(ConfigError, match="port, inner_port and metrics_port must differ"):
        read_federation(tmp_path)


def test_a_directory_has_one_server(tmp_path: Path) -> None:
    """While somebody runs a directory's server, a second start is refused, before it looks at the ports."""
    directory = server_directory(tmp_path, port=free_port(), inner_port=free_port())
    with _alone(directory):
        said = fedslm("server", "up", directory, code=1)
    assert "another process runs it" in said
    with _alone(directory):
        pass


def test_an_answer_of_another_program_does_not_count(tmp_path: Path) -> None:
    """A stranger takes the port while our process lives on: the server is not up."""
    (tmp_path / "logs").mkdir()
    child = Child(
        "proxy", (sys.executable, "-c", "import time; print('no port', flush=True); time.sleep(2)")
    )
    with (
        socket.create_server(("127.0.0.1", 0)) as stranger,
        _Running(tmp_path, child).kept() as running,
    ):
        port = stranger.getsockname()[1]
        assert _listens(os.getpid(), port)
        assert not _listens(running.process.pid, port)
        with pytest.raises(
            RunError, match=f"no process of this server listens on port {port}: no port"
        ):
            _wait_until_listening(running, port, threading.Event())


def test_a_process_that_ends_again_and_again_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After five short lives the server ends, with the last lines of that process's log."""
    monkeypatch.setattr(server, "_RESTART_SECONDS", 0.0)
    (tmp_path / "logs").mkdir()
    child = Child("proxy", (sys.executable, "-c", "raise SystemExit('bind() failed')"))
    with _Running(tmp_path, child).kept() as running:
        for _ in range(4):
            running.process.wait(30)
            running.restart_if_dead()
        running.process.wait(30)
        with pytest.raises(RunError, match=r"proxy ended 5 times in a row: .*bind\(\) failed"):
            running.restart_if_dead()


def test_a_process_that_lived_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends that lie far apart are no reason to give up."""
    monkeypatch.setattr(server, "_RESTART_SECONDS", 0.0)
    monkeypatch.setattr(server, "_SHORT_SECONDS", 0.0)
    (tmp_path / "logs").mkdir()
    with _Running(tmp_path, Child("proxy", (sys.executable, "-c", ""))).kept() as running:
        for _ in range(8):
            before = running.process.pid
            running.process.wait(30)
            running.restart_if_dead()
            assert running.process.pid != before
