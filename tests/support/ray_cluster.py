"""A real Ray cluster of several nodes on this machine; each node can be killed."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from support.sites import free_port

ROOT = Path(__file__).parents[2]
_START_SECONDS, _END_SECONDS = 300, 60
_STORE_BYTES = 100_000_000
_ENVIRONMENT = {  # with Ray's niceness of 15, other tests on this machine would leave workers no time
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_niceness": "0",
}


class Cluster:
    """Nodes on this machine; the first is the head.

    Args:
        num_nodes: Number of nodes.
        cpus: CPUs of each.
        mount: A shell command that changes what the last node sees, in a mount namespace of its own.

    Attributes:
        address: HOST:PORT of the head.
    """

    def __init__(self, num_nodes: int, *, cpus: int = 1, mount: str = "") -> None:
        self._cpus = cpus
        self.address = f"127.0.0.1:{free_port()}"
        # Ray's sockets lie below it, and their paths must be short.
        self._folders = [Path(tempfile.mkdtemp(prefix="r", dir="/tmp")) for _ in range(num_nodes)]
        try:
            for folder in self._folders[:-1]:
                self._start(folder)
            self._start(self._folders[-1], mount)
        except BaseException:
            self.close()
            raise

    def _start(self, folder: Path, mount: str = "") -> None:
        """Starts one node."""
        is_head = folder == self._folders[0]
        port = self.address.split(":")[1]
        head = ["--head", "--port", port, "--include-dashboard", "false"]
        where = head if is_head else ["--address", self.address]
        options = [
            "--num-cpus",
            str(self._cpus),
            "--object-store-memory",
            str(_STORE_BYTES),
            "--temp-dir",
            str(folder),
        ]
        ray = str(Path(sys.executable).parent / "ray")
        options += ["--disable-usage-stats"]
        inner = ["unshare", "--mount", "sh", "-c", f'{mount} && exec "$@"', "sh"]
        prefix = inner if mount else []
        done = subprocess.run(
            [*prefix, ray, "start", *where, *options],
            env={**os.environ, "PYTHONPATH": str(ROOT), **_ENVIRONMENT},
            cwd="/",
            capture_output=True,
            text=True,
            timeout=_START_SECONDS,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def kill(self, number: int) -> int:
        """Kills every process of a node, as a machine that loses its power; returns how many."""
        pids = self._pids(number)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return len(pids)

    def _pids(self, number: int) -> list[int]:
        """The processes that were started with a node's folder, and theirs."""
        mark, found, parents = str(self._folders[number]).encode(), set(), {}
        for process in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                pid = int(process.name)
                parents[pid] = int((process / "stat").read_text().rsplit(")", 1)[1].split()[1])
                if mark in (process / "cmdline").read_bytes():
                    found.add(pid)
        before = 0
        while before != len(found):
            before = len(found)
            found |= {pid for pid, parent in parents.items() if parent in found}
        return sorted(found - {os.getpid(), 1})

    def close(self) -> None:
        """Ends all nodes."""
        for number in reversed(range(len(self._folders))):
            until = time.monotonic() + _END_SECONDS
            while self.kill(number) and time.monotonic() < until:
                time.sleep(0.1)
            shutil.rmtree(self._folders[number], ignore_errors=True)


def may_mount() -> bool:
    """Whether this process may give another one a mount namespace."""
    if shutil.which("unshare") is None:  # not Linux
        return False
    command = ["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"]
    return subprocess.run(command, check=False, timeout=60, capture_output=True).returncode == 0


@contextlib.contextmanager
def cluster(num_nodes: int, *, cpus: int = 1, mount: str = "") -> Iterator[Cluster]:
    """A cluster that ends with the block."""
    made = Cluster(num_nodes, cpus=cpus, mount=mount)
    try:
        yield made
    finally:
        made.close()
