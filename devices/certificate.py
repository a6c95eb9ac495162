"""A certificate made on the spot: browsers give threads, WebGPU and the camera to secure pages only, a LAN's too."""

from __future__ import annotations

import hashlib
import ipaddress
import os
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from ..runtime.errors import EdgecapError

DAYS = 90  # that it is good for; iOS takes none of more than 825
NAME = "edgecap bench"


@dataclass(frozen=True)
class Certificate:
    """A self-signed certificate and its private key."""

    certificate: Path  # PEM
    key: Path  # PEM, readable by its owner alone
    spki: str  # base64 of the SHA-256 of its public key, as Chromium's --ignore-certificate-errors-spki-list takes it


def certificate(folder: Path, addresses: Sequence[str]) -> Certificate:
    """The certificate kept in `folder`, made (anew) where it is missing, runs out within a week or lacks an address.

    One that stays the same need be accepted only once in a browser. addresses: IPv4 or IPv6 addresses and host names.
    Raises ImportError without the package `cryptography`, EdgecapError where the folder cannot be written.
    """
    from cryptography import x509

    public, private = folder / "certificate.pem", folder / "key.pem"
    try:
        found = x509.load_pem_x509_certificate(public.read_bytes())
        if _good(found, addresses) and private.is_file():
            return Certificate(public, private, _spki(found))
    except (OSError, ValueError):
        pass
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return Certificate(public, private, _spki(_make(public, private, addresses)))
    except OSError as error:
        why = error.strerror or error
        raise EdgecapError(f"no certificate can be kept in {folder} ({why}): set EDGECAP_CACHE, or --http") from None


def _names(addresses: Sequence[str]) -> list[Any]:
    from cryptography import x509

    names: list[Any] = []
    for address in dict.fromkeys(addresses):
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(address)))
        except ValueError:
            names.append(x509.DNSName(address))
    return names


def _good(found: Any, addresses: Sequence[str]) -> bool:
    from cryptography import x509

    try:
        names = list(found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except x509.ExtensionNotFound:
        return False
    lasts = found.not_valid_after_utc > datetime.now(UTC) + timedelta(days=7)
    return lasts and all(name in names for name in _names(addresses))


def _make(public: Path, private: Path, addresses: Sequence[str]) -> Any:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, NAME)])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))  # a phone's clock may be behind
        .not_valid_after(now + timedelta(days=DAYS))
        .add_extension(x509.SubjectAlternativeName(_names(addresses)), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(key, hashes.SHA256())
    )
    private.unlink(missing_ok=True)  # an old one may have other rights
    plain = serialization.NoEncryption()
    secret = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    with os.fdopen(os.open(private, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(secret)
    public.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    return made


def _spki(found: Any) -> str:
    from cryptography.hazmat.primitives import serialization

    form = serialization.PublicFormat.SubjectPublicKeyInfo
    key = found.public_key().public_bytes(serialization.Encoding.DER, form)
    return b64encode(hashlib.sha256(key).digest()).decode()
