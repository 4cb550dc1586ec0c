"""Nodes' directories as enrolment leaves them, without a server that runs."""

from __future__ import annotations

import ssl
from pathlib import Path

from fedslm.deployment import admission, authority, enrolment

NODE = 'name = "n"\nsource = "notes.jsonl"\n'


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


def certified(directory: Path) -> tuple[str, ssl.SSLContext]:
    """An authority, and a server's side of TLS that it vouches for."""
    directory.mkdir()
    authority.create_authority(directory, "t", 2)
    authority.issue_server(directory, ["127.0.0.1"], 2)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / authority.SERVER, directory / authority.SERVER_KEY)
    return (directory / authority.AUTHORITY).read_text(), context
