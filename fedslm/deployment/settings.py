"""What a server's operator and a node's operator write down: federation.toml and node.toml."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedslm.errors import ConfigError, Problem

FEDERATION_FILE, NODE_FILE = "federation.toml", "node.toml"


class _File(BaseModel):
    """A frozen file without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class FederationFile(_File):
    """The server operator's settings."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9._-]+$")
    """Name of the federation."""
    host: str = Field(min_length=1)
    """Name or address under which nodes reach the server."""
    port: int = Field(8443, ge=1, le=65535)
    """Port that nodes reach: open it in the firewall, and no other."""
    inner_port: int = Field(9443, ge=1, le=65535)
    """Loopback port of the SuperLink behind the proxy: keep it closed to the world."""
    also_known_as: list[str] = []
    """Further names and addresses that the server's certificate is for."""
    certificate_days: int = Field(365, ge=1, le=3650)
    """How long the server's certificate is valid."""
    authority_days: int = Field(3650, ge=1, le=36500)
    """How long the certificate authority is valid."""


class NodeFile(_File):
    """The node operator's settings; the server can set none of them."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9._-]+$")
    """Name of the node."""
    source: str = Field(min_length=1)
    """The node's records: a file or directory, or a database URL (with `query`)."""
    query: str = ""
    """SQL that gives the records, if `source` is a database URL."""
    split: str = "train"
    """Split (or file stem) of `source`."""
    profile: Literal["hospital", "phone"] = "hospital"
    """What kind of machine this is."""
    threads: int = Field(1, ge=1, le=256)
    """Threads to compute with."""
    poll_seconds: float = Field(1.0, gt=0, le=3600)
    """How often the server is asked for work."""
    approved_bundles: list[str] = []
    """Hashes of application bundles that may run here besides this version's own."""


_Any = TypeVar("_Any", bound=_File)


def read_federation(directory: Path) -> FederationFile:
    """Reads a server directory's ``federation.toml``.

    Raises:
        ConfigError: It is missing or wrong; every problem at once.
    """
    return _read(directory / FEDERATION_FILE, FederationFile)


def read_node(directory: Path) -> NodeFile:
    """Reads a node directory's ``node.toml``.

    Raises:
        ConfigError: It is missing or wrong; every problem at once.
    """
    return _read(directory / NODE_FILE, NodeFile)


def _read(path: Path, model: type[_Any]) -> _Any:
    """Reads and checks a file."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError([Problem(path.name, f"cannot be read: {error}")]) from error
    try:
        return model(**values)
    except ValidationError as error:
        raise ConfigError(
            [
                Problem(f"{path.name}: {'.'.join(map(str, each['loc']))}", each["msg"])
                for each in error.errors()
            ]
        ) from error
