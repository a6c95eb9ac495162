"""A certificate made on the spot: browsers give threads, WebGPU and the camera to secure pages only, a LAN's too."""

from __future__ import annotations

import hashlib
import ipaddress
import os
import time
from base64 import b64encode
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from ..runtime.errors import EdgecapError

DAYS = 90  # that it is good for; iOS takes none of more than 825
NAME = "edgecap bench"
MOST = 24  # addresses of one


@dataclass(frozen=True)
class Certificate:
    """A self-signed certificate."""

    file: Path  # PEM, with its private key, readable by its owner alone
    spki: str  # base64 of the SHA-256 of its public key, as Chromium's --ignore-certificate-errors-spki-list takes it


def certificate(folder: Path, addresses: Sequence[str]) -> Certificate:
    """The newest certificate kept in `folder` that is for these addresses and good for a week more; else a new one, for
    the addresses of the newest one, too: a machine that comes back into an earlier network keeps its certificate.

    One that stays the same need be accepted only once in a browser. A file is never written anew, so that processes
    do not get in each other's way. addresses: IPv4 or IPv6 addresses and host names. Raises ImportError without the
    package `cryptography`, EdgecapError where the folder cannot be written.
    """
    wanted = _names(addresses)
    kept = list(_kept(folder))
    for file, found, names in kept:
        if all(name in names for name in wanted):
            return Certificate(file, _spki(found))
    names = kept[0][2] if kept else []
    wanted += [name for name in names if name not in wanted]
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return _make(folder, wanted[:MOST])
    except OSError as error:
        why = error.strerror or error
        raise EdgecapError(f"no certificate can be kept in {folder} ({why}): set EDGECAP_CACHE, or --http") from None


def _kept(folder: Path) -> Iterator[tuple[Path, Any, list[Any]]]:
    """(file, certificate, names) of those that are good for a week more, the newest first; others are removed,
    and those of earlier versions."""
    from cryptography import x509

    found = []
    for earlier in ("certificate.pem", "key.pem"):  # one for all, written anew for each network
        with suppress(OSError):
            (folder / earlier).unlink(missing_ok=True)
    for file in folder.glob("certificate-*.pem"):
        try:
            one = x509.load_pem_x509_certificate(file.read_bytes())
            names = list(one.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
            if one.not_valid_after_utc > datetime.now(UTC) + timedelta(days=7):
                found.append((one.not_valid_after_utc, file, one, names))
                continue
            file.unlink(missing_ok=True)
        except (OSError, ValueError, x509.ExtensionNotFound):
            continue
    yield from (each[1:] for each in sorted(found, key=lambda each: (each[0], each[1].name), reverse=True))


def _names(addresses: Sequence[str]) -> list[Any]:
    from cryptography import x509

    names: list[Any] = []
    for address in dict.fromkeys(addresses):
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(address)))
        except ValueError:
            names.append(x509.DNSName(address))
    return names


def _make(folder: Path, names: Sequence[Any]) -> Certificate:
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
        .add_extension(x509.SubjectAlternativeName(list(names)), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(key, hashes.SHA256())
    )
    form, plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    both = key.private_bytes(serialization.Encoding.PEM, form, plain)
    both += made.public_bytes(serialization.Encoding.PEM)
    file = folder / f"certificate-{time.time_ns()}-{made.serial_number:x}.pem"  # X.509's own times are whole seconds
    partial = file.with_suffix(".partial")
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
        stream.write(both)
    partial.replace(file)
    return Certificate(file, _spki(made))


def _spki(found: Any) -> str:
    from cryptography.hazmat.primitives import serialization

    form = serialization.PublicFormat.SubjectPublicKeyInfo
    key = found.public_key().public_bytes(serialization.Encoding.DER, form)
    return b64encode(hashlib.sha256(key).digest()).decode()
