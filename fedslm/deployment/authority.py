"""An offline certificate authority, and the server's certificate.

The authority's key never leaves the directory in which it was created; it is needed only for a new
server certificate, and may be kept offline otherwise. Nodes have keys but no certificates: the server
knows their public keys. The operator's key signs every request to a node, so it stays on the server.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedslm import layout
from fedslm.deployment.settings import read_federation
from fedslm.errors import ConfigError, LedgerError, Problem, RunError, Unusable
from fedslm.privacy import keys

AUTHORITY_KEY, AUTHORITY = "authority.key", "authority.crt"
SERVER_KEY, SERVER = "server.key", "server.crt"
_CLOCK_SKEW = timedelta(minutes=5)


def certify(server: Path) -> None:
    """Creates the authority, the operator's key and the server's certificate.

    Raises:
        ConfigError: ``federation.toml`` is invalid.
        RunError: There is already an authority.
    """
    federation = read_federation(server)
    create_authority(server, federation.name, federation.authority_days)
    rekey(server)
    renew(server)


def rekey(server: Path) -> None:
    """Creates the operator's key, which signs requests (Ed25519, mode 0600); replaces an old one.

    Raises:
        RunError: It cannot be written.
    """
    write_private(server / layout.OPERATOR_KEY, keys.new_private_key())


def operator_public(server: Path) -> str:
    """The public half (hexadecimal) of the operator's key.

    Raises:
        RunError: The key cannot be read.
    """
    try:
        return keys.public_hex(keys.private_key(server / layout.OPERATOR_KEY).public_key())
    except LedgerError as error:
        raise RunError(f"{error}; `fedslm provision rekey` makes a new one") from error


def renew(server: Path) -> None:
    """Creates a server certificate for all of the server's names, and for loopback.

    Raises:
        ConfigError: ``federation.toml`` is invalid.
        RunError: The authority cannot be read, or has expired.
    """
    federation = read_federation(server)
    names = [federation.host, *federation.also_known_as, "localhost", "127.0.0.1", "::1"]
    issue_server(server, list(dict.fromkeys(names)), federation.certificate_days)


def create_authority(directory: Path, name: str, days: int) -> None:
    """Creates the authority: a P-384 key (mode 0600) and a self-signed certificate.

    Raises:
        RunError: There is already one, or it cannot be written.
    """
    if (directory / AUTHORITY).exists():
        raise Unusable(f"{directory / AUTHORITY} exists: a federation has one authority")
    key = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{name} authority")])
    certificate = (
        _builder(subject, subject, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA384())
    )
    write_private(directory / AUTHORITY_KEY, _pem_of_key(key))
    _write_public(directory / AUTHORITY, certificate.public_bytes(serialization.Encoding.PEM))


def issue_server(directory: Path, names: Sequence[str], days: int) -> None:
    """Creates a new key and certificate for the server, signed by the authority; replaces old ones.

    Args:
        directory: Directory of the authority.
        names: Names and addresses that the certificate is for.
        days: How long it is valid; never longer than the authority.

    Raises:
        ConfigError: A name is not valid.
        RunError: The authority cannot be read, or has expired.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    signer, authority = authority_of(directory)
    left = authority.not_valid_after_utc - datetime.now(UTC)
    if left <= timedelta(0):
        raise RunError(f"{directory / AUTHORITY} expired on {authority.not_valid_after_utc:%Y-%m-%d}")
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0][:64])])
    certificate = (
        _builder(subject, authority.subject, key.public_key(), min(days, left.days))
        .add_extension(x509.SubjectAlternativeName([_general_name(each) for each in names]), False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
        )
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(signer, hashes.SHA384())
    )
    write_private(directory / SERVER_KEY, _pem_of_key(key))
    _write_public(directory / SERVER, certificate.public_bytes(serialization.Encoding.PEM))


def expires(path: Path) -> datetime:
    """Expiry time of a certificate.

    Raises:
        RunError: It cannot be read.
    """
    return read_certificate(path).not_valid_after_utc


def read_certificate(path: Path) -> x509.Certificate:
    """Reads a certificate.

    Raises:
        RunError: It cannot be read.
    """
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise Unusable(f"{path} is not a certificate: {error}") from error


def write_private(path: Path, content: bytes) -> None:
    """Writes a secret that only its owner can read; an old one is replaced.

    Raises:
        RunError: It cannot be written.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error}") from error


def public_key_of(certificate: bytes) -> ec.EllipticCurvePublicKey:
    """The public key in an authority's certificate (PEM).

    Raises:
        ValueError: It is not a certificate of an elliptic-curve key.
    """
    key = x509.load_pem_x509_certificate(certificate).public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ValueError("its key is not an elliptic-curve key")
    return key


def authority_of(directory: Path) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    """The authority's key and certificate.

    Raises:
        RunError: One of them cannot be read.
    """
    try:
        content = (directory / AUTHORITY_KEY).read_bytes()
        key = serialization.load_pem_private_key(content, password=None)
    except (OSError, ValueError, TypeError) as error:
        raise Unusable(f"{directory / AUTHORITY_KEY} is not a key: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise Unusable(f"{directory / AUTHORITY_KEY} is not an elliptic-curve key")
    return key, read_certificate(directory / AUTHORITY)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    """The fields that all certificates have in common."""
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    """Key usage of an authority or of a server."""
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(name: str) -> x509.GeneralName:
    """Parses a DNS name or an address."""
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    try:
        return x509.DNSName(name)
    except ValueError as error:
        problem = f"value {name!r} is neither a name nor an address: {error}"
        raise ConfigError([Problem("host", problem)]) from error


def _pem_of_key(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A private key as PEM."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _write_public(path: Path, content: bytes) -> None:
    """Writes a file that everybody may read."""
    try:
        path.write_bytes(content)
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error}") from error
