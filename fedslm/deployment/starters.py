"""Starter files: a node's settings and policy, the server's settings, and a run on real nodes.

Each has one source: the templates next to this module, and the example policy. The files to copy in
``clients/`` and ``server/`` have the same text.
"""

from __future__ import annotations

import json
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedslm import layout
from fedslm.data.database import holds_password, is_url
from fedslm.deployment.settings import FEDERATION_FILE, NODE_FILE, Profile
from fedslm.errors import ConfigError, Problem, RunError, Unusable
from fedslm.privacy.policy import EXAMPLE

NodeUnit = Literal["record", "patient", "user"]
UNITS: dict[Profile, NodeUnit] = {"hospital": "patient", "phone": "record"}
_TEMPLATES = Path(__file__).parent / "templates"
_EXAMPLES = Path(__file__).parent.parent / "examples"
_COMMAND = "may-train"
_EXECUTABLE = 0o700


@dataclass(frozen=True)
class Start:
    """The initial settings of a node.

    Attributes:
        name: The node's name.
        profile: The kind of machine.
        source: Its records: a file, a directory or a database URL; None: to be filled in.
        unit: The weakest unit that its policy allows; None: the profile's default.
    """

    name: str
    profile: Profile = "hospital"
    source: str | None = None
    unit: NodeUnit | None = None

    @property
    def has_patients(self) -> bool:
        """Whether its records have a column for their owner."""
        return (self.unit or UNITS[self.profile]) != "record"


def node_files(directory: Path, start: Start) -> dict[str, str]:
    """File name to content of the files that a node's operator edits.

    Args:
        directory: The node's own directory, absolute.
        start: The node's initial settings.

    Raises:
        RunError: The source is a URL that contains a password.
    """
    files = {NODE_FILE: _settings(directory, start), layout.POLICY: _policy(start)}
    if start.profile == "phone":
        files[_COMMAND] = _template(_COMMAND)
    return files


def write_node_files(directory: Path, start: Start) -> dict[Path, str]:
    """Writes a node's missing files; overwrites none.

    Returns:
        Each file that was written, with the lines to edit.

    Raises:
        RunError: The source is a URL that contains a password, or a file cannot be written.
    """
    edit = {
        NODE_FILE: "edit columns" if start.source else "edit source, query and columns",
        layout.POLICY: "edit epsilon, delta and base_models; read every line, it binds this node",
        _COMMAND: "edit the checks for charging and unmetered on this device",
    }
    if start.profile == "phone":
        edit[NODE_FILE] = edit[NODE_FILE].replace(", query", "") + "; check [conditions]"
    written = {}
    for name, content in node_files(directory.expanduser().absolute(), start).items():
        if _write_new(directory / name, content):
            written[directory / name] = edit[name]
    if directory / _COMMAND in written:
        (directory / _COMMAND).chmod(_EXECUTABLE)
    return written


def write_federation(path: Path, name: str | None = None, host: str | None = None) -> bool:
    """Writes a ``federation.toml``, unless there is one; True if it was written.

    Args:
        path: The file.
        name: Name of the federation.
        host: Name or address at which nodes reach the server; None: this machine's name.

    Raises:
        ConfigError: The file exists already, and a name or a host was given.
        RunError: It cannot be written.
    """
    if path.exists():
        if name is not None or host is not None:
            problem = f"{path} exists: edit it, or omit --name and --host"
            raise ConfigError([Problem(FEDERATION_FILE, problem)])
        return False
    text = _with_value(_template(FEDERATION_FILE), "name", name or "federation")
    return _write_new(path, _with_value(text, "host", host or socket.gethostname()))


def example_configs() -> dict[str, Path]:
    """Name to file of each config to start from; "deployed" is a run on real nodes.

    The example policy allows "deployed"; the others are the scenarios of ``simulations/``.
    """
    files = [_TEMPLATES / "deployed.toml", *sorted(_EXAMPLES.glob("*.toml"))]
    return {path.stem: path for path in files}


def node_example(profile: Profile, name: str) -> str:
    """One file of a node to start from: its settings, its policy or a phone's check.

    Args:
        profile: The kind of machine.
        name: A name that :func:`node_files` gives.
    """
    start = {"hospital": Start("north"), "phone": Start("phone", "phone")}[profile]
    return node_files(Path("/var/lib/fedslm/north"), start)[name]


def _settings(directory: Path, start: Start) -> str:
    """Content of ``node.toml``."""
    text = _with_value(_template(f"{start.profile}-{NODE_FILE}"), "name", start.name)
    text = text.replace("/var/lib/fedslm/north/", f"{directory}/")
    if not start.has_patients:
        text = text.replace('columns = ["text", "label", "patient"]', 'columns = ["text", "label"]')
    elif start.profile == "phone":
        text = text.replace('columns = ["text", "label"] ', 'columns = ["text", "label", "patient"] ')
    if start.source is None:
        return text
    if not is_url(start.source):
        text = re.sub(r'^query = """.*?^"""$', _commented, text, flags=re.MULTILINE | re.DOTALL)
        return _with_value(text, "source", str(Path(start.source).expanduser().absolute()))
    if holds_password(start.source):
        raise Unusable(
            "--source contains a password: leave it out, and set FEDSLM_DATABASE_USER and "
            "FEDSLM_DATABASE_PASSWORD for the node"
        )
    return _with_value(text, "source", start.source)


def _policy(start: Start) -> str:
    """Content of ``policy.toml``."""
    text = EXAMPLE if start.profile == "hospital" else _template(f"phone-{layout.POLICY}")
    if start.unit in (None, UNITS[start.profile]):
        return text
    text = _with_value(text, "unit", str(start.unit))
    if start.has_patients:
        return re.sub(r"^(unit = .*)$", r'\1\nunit_column = "patient"', text, flags=re.MULTILINE)
    text = re.sub(r"^unit_column = ", "# unit_column = ", text, flags=re.MULTILINE)
    return re.sub(r"^max_records_per_unit = ", "# max_records_per_unit = ", text, flags=re.MULTILINE)


def _template(name: str) -> str:
    """Reads a template file next to this module."""
    return (_TEMPLATES / name).read_text(encoding="utf-8")


def _with_value(text: str, key: str, value: str) -> str:
    """A text with a new value in its only line ``key = "…"``; the line's comment stays."""
    line = f"{key} = {json.dumps(value, ensure_ascii=False)}"
    return re.sub(rf'^{key} = "[^"\n]*"', lambda _: line, text, count=1, flags=re.MULTILINE)


def _commented(found: re.Match[str]) -> str:
    """Turns lines into comments."""
    return "\n".join(f"# {line}" for line in found[0].splitlines())


def _write_new(path: Path, content: str) -> bool:
    """Writes a file unless it exists; True if it was written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(content)
    except FileExistsError:
        return False
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error}") from error
    return True
