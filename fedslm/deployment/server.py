"""The server's processes: Flower's SuperLink and launcher on loopback, a reverse proxy in front.

Nodes reach the Fleet API through the proxy and nothing else. The Control API, which has no
authentication of its own, and the Runtime API stay on loopback: whoever has an account on the server's
machine can reach them, so give none away.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from fedslm.deployment.authority import AUTHORITY, SERVER, SERVER_KEY, expires, write_private
from fedslm.deployment.journal import keep_small
from fedslm.deployment.metrics import served, server_figures
from fedslm.deployment.settings import FederationFile, read_federation
from fedslm.errors import RunError
from fedslm.storage import write_text

logger = logging.getLogger(__name__)
_SECRET, _STATE, LOGS = "launcher.secret", "state", "logs"
_START_SECONDS, _STOP_SECONDS, _WATCH_SECONDS = 60.0, 10.0, 0.5
_ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
_PROXY = """# Made by `fedslm server up`. Nodes reach /v1/fleet/ and nothing else.
daemon off;
pid {state}/proxy.pid;
error_log {logs}/proxy-errors.log warn;
worker_processes 1;
events {{ worker_connections 1024; }}
http {{
  map $status $unusual {{ ~^2 0; default 1; }}  # nodes ask every second: what went well is no news
  access_log {logs}/proxy.log combined if=$unusual;
  client_body_temp_path {state}/proxy-body;
  proxy_temp_path {state}/proxy-temp;
  fastcgi_temp_path {state}/proxy-fastcgi;
  uwsgi_temp_path {state}/proxy-uwsgi;
  scgi_temp_path {state}/proxy-scgi;
  server_tokens off;
  upstream superlink {{
    server 127.0.0.1:{inner_port};
    keepalive 64;
  }}
  server {{
    listen {port} ssl;
    ssl_certificate {directory}/{certificate};
    ssl_certificate_key {directory}/{key};
    ssl_protocols TLSv1.2 TLSv1.3;
    client_max_body_size 64m;
    location /v1/fleet/ {{
      proxy_pass https://superlink;
      proxy_set_header Connection "";
      proxy_set_header X-Forwarded-For $remote_addr;
      proxy_set_header X-Forwarded-Proto https;
      proxy_ssl_trusted_certificate {directory}/{authority};
      proxy_ssl_verify on;
      proxy_ssl_name localhost;
      proxy_http_version 1.1;
      proxy_request_buffering off;
      proxy_buffering off;
      proxy_read_timeout 120s;
    }}
    location / {{ return 403; }}
  }}
}}
"""


@dataclass(frozen=True)
class Child:
    """A process to keep running.

    Attributes:
        name: For logs.
        command: What runs.
    """

    name: str
    command: tuple[str, ...]


def children(directory: Path) -> list[Child]:
    """The server's processes, in the order in which they start; writes what they read.

    Raises:
        ConfigError: ``federation.toml`` is wrong.
        RunError: nginx is not installed, or the server's certificate is missing or has expired.
    """
    directory = directory.expanduser().absolute()
    federation = read_federation(directory)
    _check_certificate(directory)
    state = directory / _STATE
    state.mkdir(parents=True, exist_ok=True)
    state.chmod(0o711)  # a proxy that root starts works as somebody else, below it
    (directory / LOGS).mkdir(exist_ok=True)
    if not (directory / _SECRET).exists():
        write_private(directory / _SECRET, secrets.token_hex(32).encode())
    proxy = _proxy(directory, federation)
    return [
        Child("superlink", _superlink(directory, federation)),
        Child("launcher", _launcher(directory, federation)),
        Child("proxy", (proxy, "-c", str(state / "proxy.conf"), "-p", str(state))),
    ]


def serve(directory: Path, stop: threading.Event) -> None:
    """Runs the server's processes until it is told to stop; one that dies is started again.

    Raises:
        ConfigError: As :func:`children`.
        RunError: As :func:`children`, or a process does not come up.
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
    """The server's processes, up; they are stopped at the end.

    Args:
        directory: With ``federation.toml``.
        stop: Set to give up while they come up.

    Yields:
        What starts dead ones again and keeps logs small: to be called often.

    Raises:
        ConfigError: As :func:`children`.
        RunError: As :func:`children`, or a process does not come up.
    """
    directory = directory.expanduser().absolute()
    federation = read_federation(directory)
    listening = {"superlink": federation.inner_port, "proxy": federation.port}
    with ExitStack() as stack:
        processes = []
        for child in children(directory):
            processes.append(stack.enter_context(_Running(directory, child).kept()))
            if child.name in listening:
                _wait_until_listening(processes[-1], listening[child.name], stop)
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
        }  # the launcher looks for Flower's
        self._environment = {**os.environ, **_ENVIRONMENT, **own}
        self._started = 0.0
        self.process = self._start()

    @contextmanager
    def kept(self) -> Iterator[_Running]:
        """Stops the process at the end."""
        try:
            yield self
        finally:
            self.stop()

    def restart_if_dead(self) -> None:
        """Starts it again, at most once in five seconds."""
        if self.process.poll() is not None and time.monotonic() - self._started > 5:
            code = self.process.returncode
            logger.error("%s ended with %s; it is started again", self._child.name, code)
            self.process = self._start()

    def stop(self) -> None:
        """Asks it to stop, then makes it."""
        if self.process.poll() is not None:
            return
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(_STOP_SECONDS)

    def _start(self) -> subprocess.Popen[bytes]:
        """Starts it, in a directory in which nothing can be imported by accident."""
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
    """Flower's SuperLink: on loopback, with TLS, node keys and a database on disk."""
    return (
        _flower("flower-superlink"),
        *("--host", "127.0.0.1", "--port", str(federation.inner_port)),
        *("--ssl-ca-certfile", str(directory / AUTHORITY)),
        *("--ssl-certfile", str(directory / SERVER)),
        *("--ssl-keyfile", str(directory / SERVER_KEY)),
        "--enable-supernode-auth",
        *("--database", str(directory / _STATE / "superlink.db")),
        *("--isolation", "process"),
        *("--superexec-auth-secret-file", str(directory / _SECRET)),
        "--disable-runtime-dependency-installation",
    )


def _launcher(directory: Path, federation: FederationFile) -> tuple[str, ...]:
    """Flower's launcher of the server's side of a run, as a process of its own."""
    return (
        _flower("flower-superexec"),
        *("--runtime-api-address", f"127.0.0.1:{federation.inner_port}"),
        *("--root-certificates", str(directory / AUTHORITY)),
        *("--superexec-auth-secret-file", str(directory / _SECRET)),
    )


def _proxy(directory: Path, federation: FederationFile) -> str:
    """Writes the proxy's configuration; gives its program."""
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if program is None:
        raise RunError("nginx is not installed; on Debian: apt-get install nginx-light")
    values: Mapping[str, object] = {
        "state": directory / _STATE,
        "logs": directory / LOGS,
        "directory": directory,
        "certificate": SERVER,
        "key": SERVER_KEY,
        "authority": AUTHORITY,
        "port": federation.port,
        "inner_port": federation.inner_port,
    }
    write_text(directory / _STATE / "proxy.conf", _PROXY.format(**values))
    return program


def _check_certificate(directory: Path) -> None:
    """Refuses a certificate that nodes would refuse."""
    end = expires(directory / SERVER)
    if end <= datetime.now(UTC):
        raise RunError(
            f"the server's certificate expired on {end:%Y-%m-%d}; run `fedslm provision renew`"
        )


def _wait_until_listening(running: _Running, port: int, stop: threading.Event) -> None:
    """Waits until a port is open."""
    deadline = time.monotonic() + _START_SECONDS
    while not stop.is_set():
        with socket.socket() as probe:
            probe.settimeout(1.0)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        if running.process.poll() is not None or time.monotonic() > deadline:
            raise RunError(f"{running.process.args!r} does not listen on port {port}; see its log")
        stop.wait(0.2)


def _flower(name: str) -> str:
    """One of Flower's programs, of this environment."""
    return str(Path(sys.executable).parent / name)
