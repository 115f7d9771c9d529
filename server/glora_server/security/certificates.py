"""The three certificates of a glora server, as X.509: its authority's, its own, and a device's."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from glora_server.security.keys import DeviceKey
from glora_wire.errors import GloraError, Reason

AUTHORITY_LIFETIME: Final = timedelta(days=20 * 365)
SERVER_LIFETIME: Final = timedelta(days=2 * 365)
_BACKDATE: Final = timedelta(days=1)
"""Devices whose clock is a little behind must be able to join."""
_MAX_NAME: Final = 64
"""Longest attribute of an X.509 name."""


@dataclass(frozen=True, slots=True)
class Issuer:
    """The authority: its certificate and the key that signs."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate


def authority_certificate(key: ec.EllipticCurvePrivateKey, now: datetime) -> x509.Certificate:
    """A self-signed authority that may sign devices and servers and no further authority."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "glora certificate authority")])
    builder = (
        _builder(key.public_key(), name, now, now + AUTHORITY_LIFETIME)
        .issuer_name(name)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
    )
    return builder.sign(key, hashes.SHA256())


def server_certificate(
    issuer: Issuer, key: ec.EllipticCurvePublicKey, names: Sequence[x509.GeneralName], now: datetime
) -> x509.Certificate:
    """A certificate for a server that is reached under `names`."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "glora server")])
    builder = _leaf(issuer, key, subject, ExtendedKeyUsageOID.SERVER_AUTH, now=now, lifetime=SERVER_LIFETIME)
    return builder.add_extension(x509.SubjectAlternativeName(names), critical=False).sign(issuer.key, hashes.SHA256())


def device_certificate(
    issuer: Issuer, key: DeviceKey, *, device_id: str, name: str, now: datetime, lifetime: timedelta
) -> x509.Certificate:
    """A certificate for a device: CN is its id, OU its name for people, the URI its id again."""
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, device_id),
            *([x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, name[:_MAX_NAME])] if name else []),
        ]
    )
    uri = x509.UniformResourceIdentifier(f"glora://device/{device_id}")
    builder = _leaf(issuer, key, subject, ExtendedKeyUsageOID.CLIENT_AUTH, now=now, lifetime=lifetime)
    return builder.add_extension(x509.SubjectAlternativeName([uri]), critical=False).sign(issuer.key, hashes.SHA256())


def general_names(names: Sequence[str]) -> tuple[x509.GeneralName, ...]:
    """The names as IP addresses and DNS names, each once, in order; raises SETTINGS_INVALID."""
    found: dict[x509.GeneralName, None] = {}
    for name in names:
        found[_general_name(name)] = None
    return tuple(found)


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    labels = name.removeprefix("*.").removesuffix(".").split(".")
    if not name.isascii() or not all(label.replace("-", "").replace("_", "").isalnum() for label in labels):
        raise GloraError(
            Reason.SETTINGS_INVALID,
            f"grpc.public_names or http.public_names: {name!r} is neither an IP address nor a host name (without a "
            "port; names with other letters in their xn-- form).",
            name=name,
        )
    return x509.DNSName(name.lower())


def _leaf(
    issuer: Issuer,
    key: DeviceKey,
    subject: x509.Name,
    purpose: x509.ObjectIdentifier,
    *,
    now: datetime,
    lifetime: timedelta,
) -> x509.CertificateBuilder:
    end = min(now + lifetime, issuer.certificate.not_valid_after_utc)
    return (
        _builder(key, subject, now, end)
        .issuer_name(issuer.certificate.subject)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=True)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.key.public_key()),
            critical=False,
        )
    )


def _builder(key: DeviceKey, subject: x509.Name, now: datetime, end: datetime) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now, end) - _BACKDATE)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def utc(seconds: float) -> datetime:
    """The moment as certificates write it."""
    return datetime.fromtimestamp(seconds, UTC)
