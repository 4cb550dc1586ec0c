"""The SuperLink's Control API, on the server's loopback: nodes and runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization

from fedslm.deployment.authority import AUTHORITY
from fedslm.deployment.bundle import bundle, sha256_of
from fedslm.deployment.certificates import with_clock
from fedslm.deployment.settings import read_federation
from fedslm.errors import FederationError

COMPLETED, STOPPED = "finished:completed", "finished:stopped"
FINISHED = "finished"
_POLL_SECONDS, _LATEST_RUNS = 0.5, 20


@dataclass(frozen=True)
class SeenNode:
    """The SuperLink's record of a node.

    Attributes:
        node_id: Its number at the SuperLink.
        status: online, offline, registered or unregistered.
        last_seen: When it last connected or disconnected, from the SuperLink; empty if it never did.
    """

    node_id: int
    status: str
    last_seen: str


@dataclass(frozen=True)
class Control:
    """A connection to the Control API.

    Attributes:
        client: Flower's HTTP client.
    """

    client: Any

    def register(self, node_key: str, name: str) -> int:
        """Registers a node by its public key (SSH text); returns its number.

        Raises:
            FederationError: The SuperLink refuses, or is not reachable.
        """
        from flwr.proto.control_pb2 import RegisterNodeRequest

        key = serialization.load_ssh_public_key(node_key.encode()).public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        request = RegisterNodeRequest(public_key=key, name=name)
        with _explained("register the node"):
            return int(self.client.RegisterNode(request).node_id)

    def unregister(self, node_id: int) -> None:
        """Unregisters a node.

        Raises:
            FederationError: The SuperLink refuses, or is not reachable.
        """
        from flwr.proto.control_pb2 import UnregisterNodeRequest

        with _explained("unregister the node"):
            self.client.UnregisterNode(UnregisterNodeRequest(node_id=node_id))

    def wait(self, seconds: float, on_wait: Callable[[], None] = lambda: None) -> None:
        """Waits for a SuperLink that is still starting.

        Args:
            seconds: Longest time to wait.
            on_wait: Called once, if it is not reachable yet.

        Raises:
            FederationError: It is not reachable by then.
        """
        deadline = time.monotonic() + seconds
        while True:
            try:
                self.nodes()
                return
            except FederationError:
                if time.monotonic() > deadline:
                    raise
                on_wait()
                on_wait = _nothing
                time.sleep(_POLL_SECONDS)

    def nodes(self) -> list[SeenNode]:
        """All nodes that the SuperLink knows.

        Raises:
            FederationError: It is not reachable.
        """
        from flwr.proto.control_pb2 import ListNodesRequest

        with _explained("list the nodes"):
            found = self.client.ListNodes(ListNodesRequest()).nodes_info
        return [
            SeenNode(
                int(node.node_id),
                str(node.status),
                max(str(node.last_activated_at), str(node.last_deactivated_at)),
            )
            for node in found
        ]

    def start(self, overrides: Mapping[str, str | int | float | bool]) -> int:
        """Starts a run of this version's bundle; returns its number.

        Args:
            overrides: The flat run config.

        Raises:
            FederationError: The SuperLink refuses, or is not reachable.
        """
        from flwr.common.serde import fab_to_proto, user_config_to_proto
        from flwr.proto.control_pb2 import StartRunRequest
        from flwr.supercore.fab import Fab

        content = bundle()
        request = StartRunRequest(
            fab=fab_to_proto(Fab(sha256_of(content), content, {})),
            override_config=user_config_to_proto(dict(overrides)),
        )
        with _explained("start the run"):
            answer = self.client.StartRun(request)
        if not answer.HasField("run_id"):
            raise FederationError("the SuperLink did not start the run")
        return int(answer.run_id)

    def stop(self, run_id: int) -> None:
        """Stops a run.

        Raises:
            FederationError: The SuperLink refuses, or is not reachable.
        """
        from flwr.proto.control_pb2 import StopRunRequest

        with _explained("stop the run"):
            self.client.StopRun(StopRunRequest(run_id=run_id))

    def status(self, run_id: int) -> str:
        """Status of a run, such as running, finished:completed or finished:failed.

        Raises:
            FederationError: There is no such run, or the SuperLink is not reachable.
        """
        from flwr.proto.control_pb2 import ListRunsRequest

        with _explained("ask for the run"):
            runs = self.client.ListRuns(ListRunsRequest(run_id=run_id)).run_dict
        if run_id not in runs:
            raise FederationError(f"the SuperLink knows no run {run_id}")
        return _status_of(runs[run_id])

    def living(self, directory: Path) -> dict[int, str]:
        """Number to status of the latest runs recorded in a directory that have not ended.

        Raises:
            FederationError: The SuperLink is not reachable.
        """
        from flwr.common.serde import user_config_from_proto
        from flwr.proto.control_pb2 import ListRunsRequest

        with _explained("list the runs"):
            runs = self.client.ListRuns(ListRunsRequest(limit=_LATEST_RUNS)).run_dict
        return {
            int(number): _status_of(run)
            for number, run in sorted(runs.items())
            if user_config_from_proto(run.override_config).get("run.directory") == str(directory)
            and not _status_of(run).startswith(FINISHED)
        }


def _status_of(run: Any) -> str:
    """Status of a run, with its sub-status if there is one."""
    status = run.status
    return f"{status.status}:{status.sub_status}" if status.sub_status else str(status.status)


def _nothing() -> None:
    """Does nothing: the wait was already reported."""


@contextmanager
def connected(directory: Path) -> Iterator[Control]:
    """Opens a connection to the SuperLink of a server directory, over TLS.

    Raises:
        FederationError: Its certificate cannot be read.
    """
    from flwr.supercore.control import ControlHttpClient
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

    port = read_federation(directory).inner_port
    try:
        authority = (directory / AUTHORITY).read_bytes()
    except OSError as error:
        raise FederationError(f"{directory / AUTHORITY} cannot be read: {error}") from error
    client = ControlHttpClient.from_server_address(
        f"127.0.0.1:{port}",
        insecure=False,
        root_certificates=authority,
        interceptors=[RuntimeVersionHttpInterceptor(component_name="fedslm")],
    )
    try:
        yield Control(client)
    finally:
        client.close()


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turns HTTP errors into FederationError."""
    import httpx

    try:
        yield
    except httpx.HTTPStatusError as error:
        text = error.response.text[:300]
        raise FederationError(f"the SuperLink would not {what}: {text}") from error
    except httpx.HTTPError as error:
        raise FederationError(
            f"the SuperLink does not answer, to {what}: {with_clock(error)}; "
            f"is `fedslm server up` running?"
        ) from error
