"""The server's processes: a guarded SuperLink and its launcher on loopback, behind a reverse proxy.

Nodes can reach only the Fleet API, through the proxy and the guard. The Control API, which has no
authentication of its own, and the Runtime API stay on loopback: anyone with an account on the server's
machine can reach them, so give nobody else an account.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from fedslm.deployment import proxy
from fedslm.deployment.authority import AUTHORITY, SERVER, SERVER_KEY, expires, write_private
from fedslm.deployment.database import tidy
from fedslm.deployment.journal import keep_small, last_lines
from fedslm.deployment.metrics import LOOPBACK, served, server_figures
from fedslm.deployment.settings import FederationFile, read_federation
from fedslm.errors import RunError
from fedslm.storage import locked

logger = logging.getLogger(__name__)
_SECRET, _STATE, LOGS, _DATABASE = "launcher.secret", "state", "logs", "superlink.db"
_START_SECONDS, _STOP_SECONDS, _WATCH_SECONDS = 60.0, 10.0, 0.5
_RESTART_SECONDS, _SHORT_SECONDS, _MOST_SHORT_LIVES = 5.0, 60.0, 5
_LISTENING = "0A"  # the state of a listening socket in /proc/PID/net/tcp
_ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "PYTHONIOENCODING": "utf-8",  # Flower prints characters that other encodings lack
}


@dataclass(frozen=True)
class Child:
    """A process to keep running.

    Attributes:
        name: Name for logs.
        command: The command line.
    """

    name: str
    command: tuple[str, ...]


def children(directory: Path) -> list[Child]:
    """The server's processes in their start order; writes the files that they read.

    Raises:
        ConfigError: ``federation.toml`` is invalid.
        RunError: nginx is not installed, or the server's certificate is missing or has expired.
    """
    directory = directory.expanduser().absolute()
    federation = read_federation(directory)
    _check_certificate(directory)
    state = directory / _STATE
    state.mkdir(parents=True, exist_ok=True)
    state.chmod(0o711)  # a proxy started by root runs as another user in here
    (directory / LOGS).mkdir(exist_ok=True)
    if not (directory / _SECRET).exists():
        write_private(directory / _SECRET, secrets.token_hex(32).encode())
    return [
        Child("superlink", _superlink(directory, federation)),
        Child("launcher", _launcher(directory, federation)),
        Child("proxy", proxy.prepare(directory, state, directory / LOGS, federation)),
    ]


def serve(directory: Path, stop: threading.Event) -> None:
    """Runs the server's processes until it is stopped; one that dies is restarted.

    Raises:
        ConfigError: As for :func:`children`.
        RunError: As for :func:`children`, the server is already running, a port is taken, or a process
            does not start or does not keep running.
    """
    port = read_federation(directory).metrics_port
    with (
        running(directory, stop) as mend,
        served(port, lambda: server_figures(directory)),
    ):
        while not stop.wait(_WATCH_SECONDS):
            mend()


@contextmanager
def running(directory: Path, stop: threading.Event) -> Iterator[Callable[[], None]]:
    """Starts the server's processes, and stops them at the end.

    Args:
        directory: The directory with ``federation.toml``.
        stop: Set to give up while they start.

    Yields:
        A function that restarts dead processes and keeps logs small: call it often. It raises RunError
        if a process ends repeatedly.

    Raises:
        ConfigError: As for :func:`children`.
        RunError: As for :func:`serve`.
    """
    directory = directory.expanduser().absolute()
    federation = read_federation(directory)
    listening = {"superlink": federation.inner_port, "proxy": federation.port}
    with ExitStack() as stack:
        processes = []
        stack.enter_context(_alone(directory))
        made = children(directory)
        _check_ports(federation)
        tidy(directory / _STATE / _DATABASE)
        for child in made:
            processes.append(stack.enter_context(_Running(directory, child).kept()))
            if child.name in listening:
                _wait_until_listening(processes[-1], listening[child.name], stop)
        if not stop.is_set():
            logger.info("the server is up: nodes reach %s:%d", federation.host, federation.port)

        def mend() -> None:
            for process in processes:
                process.restart_if_dead()
            for log in (directory / LOGS).glob("*.log"):
                keep_small(log)

        yield mend


class _Running:
    """A process that is started, watched and stopped."""

    def __init__(self, directory: Path, child: Child) -> None:
        self._log, self._child = directory / LOGS / f"{child.name}.log", child
        programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        own = {
            "FLWR_HOME": str(directory / _STATE),
            "PATH": programs,
        }  # the launcher searches for Flower's programs
        self._environment = {**os.environ, **_ENVIRONMENT, **own}
        self._started, self._short_lives = 0.0, 0
        self.process = self._start()

    @contextmanager
    def kept(self) -> Iterator[_Running]:
        """Stops the process at the end."""
        try:
            yield self
        finally:
            self.stop()

    def restart_if_dead(self) -> None:
        """Restarts it if it died, at most once in five seconds.

        Raises:
            RunError: It ran for less than a minute, five times in a row.
        """
        age = time.monotonic() - self._started
        if self.process.poll() is None or age <= _RESTART_SECONDS:
            return
        code, name = self.process.returncode, self._child.name
        self._short_lives = self._short_lives + 1 if age < _SHORT_SECONDS else 1
        if self._short_lives >= _MOST_SHORT_LIVES:
            raise RunError(f"{name} ended {self._short_lives} times in a row: {self.last_words()}")
        logger.error("%s ended with %s; restarting it", name, code)
        self.process = self._start()

    def last_words(self) -> str:
        """The end of its log, in one line."""
        with suppress(OSError):
            lines = [line.strip() for line in last_lines(self._log, 3)]
            return f"{' / '.join(filter(None, lines))} (in {self._log})"
        return f"see {self._log}"

    def stop(self) -> None:
        """Asks the process to stop, then kills it."""
        if self.process.poll() is not None:
            return
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(_STOP_SECONDS)

    def _start(self) -> subprocess.Popen[bytes]:
        """Starts it in a directory from which nothing can be imported by accident."""
        self._started = time.monotonic()
        with self._log.open("ab") as log:
            try:
                return subprocess.Popen(  # noqa: S603  (our own programs)
                    self._child.command,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=self._environment,
                    cwd="/",
                )
            except OSError as error:
                remedy = "this user must be able to run it, and the Python of its first line"
                raise RunError(
                    f"{self._child.command[0]} cannot be started: {error}; {remedy}"
                ) from error


def _superlink(directory: Path, federation: FederationFile) -> tuple[str, ...]:
    """Command of Flower's SuperLink with the guard: loopback, TLS, node keys, a database on disk."""
    return (
        *(sys.executable, "-P", "-m", "fedslm.deployment.guard", str(federation.message_mb)),
        "flower-superlink",
        *("--host", "127.0.0.1", "--port", str(federation.inner_port)),
        *("--ssl-ca-certfile", str(directory / AUTHORITY)),
        *("--ssl-certfile", str(directory / SERVER)),
        *("--ssl-keyfile", str(directory / SERVER_KEY)),
        "--enable-supernode-auth",
        *("--database", str(directory / _STATE / _DATABASE)),
        *("--isolation", "process"),
        *("--superexec-auth-secret-file", str(directory / _SECRET)),
        "--disable-runtime-dependency-installation",
    )


def _launcher(directory: Path, federation: FederationFile) -> tuple[str, ...]:
    """Command of Flower's launcher of the server's side of a run, as a separate process."""
    return (
        _flower("flower-superexec"),
        *("--runtime-api-address", f"127.0.0.1:{federation.inner_port}"),
        *("--root-certificates", str(directory / AUTHORITY)),
        *("--superexec-auth-secret-file", str(directory / _SECRET)),
    )


def _check_certificate(directory: Path) -> None:
    """Refuses a certificate that nodes would refuse."""
    end = expires(directory / SERVER)
    if end <= datetime.now(UTC):
        raise RunError(
            f"the server's certificate expired on {end:%Y-%m-%d}; run `fedslm provision renew`"
        )


def _alone(directory: Path) -> AbstractContextManager[None]:
    """Makes sure that only one process runs a directory's server."""
    problem = f"the server in {directory} cannot be started: another process runs it"
    return locked(directory / "server.lock", 0.0, problem)


def _check_ports(federation: FederationFile) -> None:
    """Refuses ports that another program uses."""
    ports = {"port": ("", federation.port), "inner_port": (LOOPBACK, federation.inner_port)}
    if federation.metrics_port is not None:
        ports["metrics_port"] = (LOOPBACK, federation.metrics_port)
    for key, address in ports.items():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(address)
                probe.listen(1)
            except OSError as error:
                raise RunError(
                    f"{key}={address[1]} is not available: {error.strerror}; stop the program "
                    f"that uses it, or set another {key} in federation.toml"
                ) from error


def _wait_until_listening(running: _Running, port: int, stop: threading.Event) -> None:
    """Waits until one of our processes listens on a port; other programs on it do not count."""
    deadline = time.monotonic() + _START_SECONDS
    while not stop.is_set():
        if running.process.poll() is not None or time.monotonic() > deadline:
            raise RunError(f"no process of this server listens on port {port}: {running.last_words()}")
        if _listens(running.process.pid, port):
            return
        stop.wait(0.2)


def _listens(process: int, port: int) -> bool:
    """Whether a process listens on a port, by the system's own tables if available."""
    if not Path("/proc/self/net/tcp").exists():
        with socket.socket() as probe:
            return probe.connect_ex((LOOPBACK, port)) == 0
    own = set()
    try:
        for descriptor in Path(f"/proc/{process}/fd").iterdir():
            with suppress(OSError):
                own.add(str(descriptor.readlink()))
        lines = [
            line.split()
            for table in ("tcp", "tcp6")
            for line in Path(f"/proc/{process}/net/{table}").read_text().splitlines()[1:]
        ]
    except OSError:
        return False
    return any(
        state == _LISTENING and int(local.rpartition(":")[2], 16) == port and f"socket:[{inode}]" in own
        for _, local, _, state, *_, inode in (line[:10] for line in lines)
    )


def _flower(name: str) -> str:
    """Path of one of Flower's programs in this environment."""
    return str(Path(sys.executable).parent / name)
