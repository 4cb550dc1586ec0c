"""Early warnings of expiring certificates, and hints on TLS errors caused by a wrong clock."""

from __future__ import annotations

import socket
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509

from fedslm.deployment.authority import AUTHORITY, SERVER, expires
from fedslm.errors import FederationError, RunError, plural

WARNING_DAYS = 30
_REACH_SECONDS = 10.0
_BY_THE_CLOCK = ("certificate is not yet valid", "certificate has expired")


def ending(what: str, end: datetime, remedy: str) -> str:
    """A warning for a certificate that expires within 30 days, or has expired; otherwise empty.

    Args:
        what: Whose certificate it is, such as "the server's certificate".
        end: When it expires.
        remedy: What to do, and who must do it.
    """
    left = end - datetime.now(UTC)
    if left >= timedelta(days=WARNING_DAYS):
        return ""
    when = f"ends in {plural(left.days, 'day')}" if left > timedelta(0) else "has ended"
    return f"{what} {when}, on {end:%Y-%m-%d}: {remedy}"


def server_warnings(server: Path) -> list[str]:
    """Warnings for the certificates in a server's directory; an unreadable file gives none here.

    The code that uses such a file reports what is wrong with it.
    """
    remedies = {
        SERVER: ("the server's certificate", "run `fedslm provision renew`, then restart the server"),
        AUTHORITY: (
            "the authority's certificate",
            "make a new federation directory in time; every node must accept the new authority",
        ),
    }
    found = []
    for name, (what, remedy) in remedies.items():
        try:
            found.append(ending(what, expires(server / name), remedy))
        except RunError:
            continue
    return [warning for warning in found if warning]


def node_warnings(address: str, authority: str) -> list[str]:
    """Warnings for the server's certificate, as presented by the server, and for the authority's.

    Args:
        address: Host and port of the server.
        authority: Certificate of the server's authority, PEM.

    Raises:
        FederationError: The server cannot be reached, or its certificate is not from the authority.
    """
    operator = "the server's operator"
    found = (
        ending(
            "the server's certificate",
            end_at_server(address, authority),
            f"{operator} must run `fedslm provision renew` and restart the server",
        ),
        ending(
            "the authority's certificate",
            x509.load_pem_x509_certificate(authority.encode()).not_valid_after_utc,
            f"ask {operator} for a new admission",
        ),
    )
    return [warning for warning in found if warning]


def end_at_server(address: str, authority: str) -> datetime:
    """Expiry time of a server's certificate, which the authority must have signed.

    Raises:
        FederationError: The server cannot be reached, or its certificate is not from the authority.
    """
    try:
        shown = certificate_at(address, authority)
    except OSError as error:
        raise FederationError(f"{address} cannot be reached: {with_clock(error)}") from error
    return x509.load_der_x509_certificate(shown).not_valid_after_utc


def certificate_at(address: str, authority: str) -> bytes:
    """The certificate (DER) that a server presents, which the authority must have signed.

    Args:
        address: Host and port.
        authority: Certificate of the server's authority, PEM.

    Raises:
        ssl.SSLCertVerificationError: The server's certificate is not from the authority.
        OSError: It cannot be reached.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    context = ssl.create_default_context(cadata=authority)
    with (
        socket.create_connection((host, int(port)), _REACH_SECONDS) as plain,
        context.wrap_socket(plain, server_hostname=host) as connection,
    ):
        return connection.getpeercert(binary_form=True) or b""


def with_clock(error: Exception) -> str:
    """An error's text; if a certificate is not yet valid or expired, with this machine's time.

    >>> with_clock(OSError("no route"))
    'no route'
    """
    text = str(error)
    if not any(each in text for each in _BY_THE_CLOCK):
        return text
    now = datetime.now(UTC)
    return f"{text}; this machine's clock may be wrong: it says {now:%Y-%m-%d %H:%M} UTC"
