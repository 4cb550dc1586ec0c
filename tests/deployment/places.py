"""Nodes' directories as enrolment leaves them, without a server that runs."""

from __future__ import annotations

from pathlib import Path

from fedslm.deployment import admission, authority, enrolment


def admitted_node(root: Path, node_toml: str, port: int = 8443) -> Path:
    """A directory of a node that was admitted to a server of its own on a loopback port."""
    server, directory = root / "server", root / "node"
    server.mkdir(parents=True)
    directory.mkdir()
    (server / "federation.toml").write_text(f'name = "t"\nhost = "127.0.0.1"\nport = {port}\n')
    authority.create_authority(server, "t", 2)
    authority.rekey(server)
    _, told = admission.admit(server, enrolment.enroll(directory, "n"), lambda *_: 5)
    admission.accept(directory, told)
    (directory / "node.toml").write_text(node_toml, encoding="utf-8")
    return directory
