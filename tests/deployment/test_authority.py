"""Tests of the certificate authority and the server's certificate."""

from __future__ import annotations

import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedslm.deployment import authority
from fedslm.errors import ConfigError, RunError

NAMES = ["server.example", "127.0.0.1", "::1"]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """With an authority and a server's certificate."""
    authority.create_authority(tmp_path, "test", 30)
    authority.issue_server(tmp_path, NAMES, 10)
    return tmp_path


@pytest.mark.parametrize("name", ["server.example", "127.0.0.1"])
def test_openssl_verifies_the_certificate(directory: Path, name: str) -> None:
    """A second implementation trusts the server for each of its names, and for no other."""
    kind = "-verify_ip" if name[0].isdigit() else "-verify_hostname"
    command = ["openssl", "verify", "-x509_strict", "-CAfile", "authority.crt", "-purpose", "sslserver"]

    def code(asked: str) -> int:
        done = subprocess.run(
            [*command, kind, asked, "server.crt"], cwd=directory, capture_output=True, check=False
        )
        return done.returncode

    assert code(name) == 0
    assert code("10.9.9.9" if kind == "-verify_ip" else "other.example") != 0


def test_keys_are_their_owners_alone(directory: Path) -> None:
    """No private key can be read by others, and no file but the keys holds one."""
    for path in directory.iterdir():
        is_key = b"PRIVATE KEY" in path.read_bytes()
        assert is_key == path.name.endswith(".key")
        assert not (is_key and path.stat().st_mode & 0o077)


def test_another_authority_does_not_vouch(
    directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A certificate of one federation is none in another."""
    other = tmp_path_factory.mktemp("other")
    authority.create_authority(other, "test", 30)
    command = [
        "openssl",
        "verify",
        "-CAfile",
        str(other / "authority.crt"),
        str(directory / "server.crt"),
    ]
    assert subprocess.run(command, capture_output=True, check=False).returncode != 0


def test_a_certificate_ends_when_it_should(directory: Path) -> None:
    """After its days, and never after the authority."""
    soon = datetime.now(UTC) + timedelta(days=10)
    assert abs(authority.expires(directory / authority.SERVER) - soon) < timedelta(minutes=1)
    authority.issue_server(directory, NAMES, 3650)
    whole = authority.expires(directory / authority.AUTHORITY)
    assert authority.expires(directory / authority.SERVER) <= whole


def test_renewal_makes_a_new_key(directory: Path) -> None:
    """The old key is gone with the old certificate."""
    before = (directory / authority.SERVER_KEY).read_bytes()
    authority.issue_server(directory, NAMES, 10)
    assert (directory / authority.SERVER_KEY).read_bytes() != before


def test_what_cannot_be_is_refused(directory: Path) -> None:
    """A second authority, a name that is none, an authority that is not there."""
    with pytest.raises(RunError, match="one authority"):
        authority.create_authority(directory, "test", 30)
    with pytest.raises(ConfigError, match="neither a name nor an address"):
        authority.issue_server(directory, ["zürich.example"], 10)
    (directory / authority.AUTHORITY_KEY).write_bytes(b"nothing")
    with pytest.raises(RunError, match="is not a key"):
        authority.issue_server(directory, NAMES, 10)
