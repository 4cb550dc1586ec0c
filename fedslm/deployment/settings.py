"""Settings files of a server's operator and of a node's operator: federation.toml and node.toml."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from fedslm.config import read_file

FEDERATION_FILE, NODE_FILE = "federation.toml", "node.toml"
Profile = Literal["hospital", "phone"]
_DEFAULTS: dict[object, dict[str, object]] = {
    "phone": {"poll_seconds": 15.0, "memory_mb": 1024, "message_mb": 256}
}
_CLOCK = r"([01]\d|2[0-3]):[0-5]\d"


class _File(BaseModel):
    """A frozen file without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class FederationFile(_File):
    """The server operator's settings."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9._-]+$")
    """Name of the federation."""
    host: str = Field(min_length=1)
    """Name or address at which nodes reach the server."""
    port: int = Field(8443, ge=1, le=65535)
    """Port that nodes connect to: open only this one in the firewall."""
    inner_port: int = Field(9443, ge=1, le=65535)
    """Loopback port of the SuperLink behind the proxy: keep it closed to the network."""
    metrics_port: int | None = Field(None, ge=1, le=65535)
    """Loopback port for Prometheus (/metrics); absent: none."""
    message_mb: int = Field(1024, ge=1)
    """Largest reply that is accepted from a node."""
    also_known_as: list[str] = []
    """Additional names and addresses in the server's certificate."""
    certificate_days: int = Field(365, ge=1, le=3650)
    """How long the server's certificate is valid."""
    authority_days: int = Field(3650, ge=1, le=36500)
    """How long the certificate authority is valid."""

    @model_validator(mode="after")
    def _has_a_port_for_each(self) -> FederationFile:
        """Refuses the same port for two uses: the second to start would find it taken."""
        ports = [each for each in (self.port, self.inner_port, self.metrics_port) if each is not None]
        if len(set(ports)) < len(ports):
            raise ValueError("port, inner_port and metrics_port must differ; change one of them")
        return self


class Conditions(_File):
    """Conditions for a node to take part; all conditions that are given must hold."""

    hours: str = Field("", pattern=rf"^({_CLOCK}-{_CLOCK})?$")
    """Local time, such as "22:00-06:00" (may pass midnight); empty is the whole day."""
    command: list[str] = []
    """A program with its arguments that ends with 0 while the node may take part (charging, idle, not
    metered, say); run without a shell, in the node's directory, for 30 seconds at most."""
    check_seconds: float = Field(60.0, gt=0, le=3600)
    """How often the conditions are checked."""

    @field_validator("hours")
    @classmethod
    def _are_some(cls, hours: str) -> str:
        """Refuses hours whose start and end are equal: they could mean never or always."""
        if hours and hours[:5] == hours[6:]:
            raise ValueError(f"{hours!r} begins when it ends; leave hours out for the whole day")
        return hours


class NodeFile(_File):
    """The node operator's settings; the server can set none of them."""

    name: str = Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._-]+$")
    """Name of the node."""
    source: str = Field(min_length=1)
    """The node's records: a file or directory, or a database URL (with `query`)."""
    query: str = ""
    """SQL that gives the records, if `source` is a database URL."""
    columns: list[str] = []
    """Columns that the records must have, checked at every start; a run that needs another is refused
    before anything is charged."""
    split: str = "train"
    """Split (or file stem) of `source`."""
    profile: Profile = "hospital"
    """Kind of machine. It sets the defaults of other settings. A phone asks the server every 15 s,
    computes in 1024 MB, and must have conditions."""
    threads: int = Field(1, ge=1, le=256)
    """Threads to compute with."""
    warm: bool = True
    """Whether the worker keeps running between messages, with imports and base model loaded. If false,
    it ends after each message and frees its memory; every message then waits for both to load."""
    poll_seconds: float = Field(1.0, gt=0, le=3600)
    """How often the server is asked for work; soon after a message it is asked more often."""
    metrics_port: int | None = Field(None, ge=1, le=65535)
    """Loopback port for Prometheus (/metrics), for this node's operator; absent: none."""
    memory_mb: int | None = Field(None, ge=256)
    """Most memory that the training process may allocate; beyond it a message is answered "failed"."""
    message_mb: int = Field(1024, ge=1)
    """Largest message that is accepted from the server."""
    conditions: Conditions | None = Field(None, validate_default=True)
    """When the node takes part; absent: always."""
    approved_bundles: list[str] = []
    """Hashes of application bundles whose messages this node also answers, besides this version's own.
    No code of a bundle runs here."""

    @model_validator(mode="before")
    @classmethod
    def _by_profile(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Applies a profile's defaults for settings that are not given."""
        return {**_DEFAULTS.get(str(values.get("profile")), {}), **values}

    @field_validator("conditions")
    @classmethod
    def _are_there(cls, conditions: Conditions | None, info: ValidationInfo) -> Conditions | None:
        """Refuses a phone without conditions: training at all times is a mistake there."""
        says = conditions is not None and (conditions.hours or conditions.command)
        if info.data.get("profile") == "phone" and not says:
            raise ValueError('profile = "phone" needs [conditions] with hours or a command')
        return conditions


def read_federation(directory: Path) -> FederationFile:
    """Reads a server directory's ``federation.toml``.

    Raises:
        ConfigError: It is missing or invalid; lists every problem.
    """
    return read_file(directory / FEDERATION_FILE, FederationFile)


def read_node(directory: Path, profile: str | None = None) -> NodeFile:
    """Reads a node directory's ``node.toml``.

    Args:
        directory: The node's own directory.
        profile: Replaces the file's profile, unless it is None.

    Raises:
        ConfigError: It is missing or invalid; lists every problem.
    """
    instead = {} if profile is None else {"profile": profile}
    return read_file(directory / NODE_FILE, NodeFile, instead)
