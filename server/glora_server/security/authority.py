"""The server's certificate authority, kept in a folder of its own.

    authority/ca.pem       key and certificate of the authority; made on the first start, never changed
    authority/server.pem   key and certificate of the server; made anew when they near their end (also while the
                           server runs) or the names change

A key and its certificate share a file, so that a crash cannot part them. Who loses ca.pem must enrol every device
again.
"""

from __future__ import annotations

import hashlib
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final, Self

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from glora_server.coordinator.ports import IssuedCertificate
from glora_server.rounds.ids import DeviceId
from glora_server.security.certificates import (
    Issuer,
    authority_certificate,
    device_certificate,
    general_names,
    server_certificate,
    utc,
)
from glora_server.security.keys import certificate_key_sha256, key_sha256, requested_key
from glora_server.security.private_files import create_private, private_folder, read_private, replace_private
from glora_wire.errors import GloraError, Reason

LOCAL_NAMES: Final = ("localhost", "127.0.0.1", "::1")
_RENEW_SERVER_BEFORE: Final = timedelta(days=180)
DEVICE_LIFETIME: Final = timedelta(days=90)


@dataclass(frozen=True, slots=True)
class _Pair:
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    def pem(self) -> bytes:
        key = self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return key + self.certificate.public_bytes(Encoding.PEM)


class FileAuthority:
    """Signs certificates for this server and its devices; see `coordinator.ports.Authority`."""

    def __init__(
        self,
        authority: Issuer,
        server_file: Path,
        names: tuple[x509.GeneralName, ...],
        *,
        device_lifetime: timedelta,
        now: Callable[[], float],
    ) -> None:
        self._authority = authority
        self.server_file = server_file
        """Key and certificate of the server, PEM."""
        self._names = names
        self._server = _server_pair(server_file, authority, names, utc(now()))
        self._device_lifetime = device_lifetime
        self._now = now

    @classmethod
    def open(
        cls,
        folder: Path,
        names: Sequence[str] = (),
        *,
        device_lifetime: timedelta = DEVICE_LIFETIME,
        now: Callable[[], float] = time.time,
    ) -> Self:
        """The authority in the folder, made where there is none; `names` are further names of this server.

        Raises DATA_DIR_UNUSABLE when the files cannot be used, SETTINGS_INVALID for an impossible name.
        """
        wanted = general_names([*LOCAL_NAMES, *_host_name(), *names])
        private_folder(folder)
        pair = _authority_pair(folder / "ca.pem", utc(now()))
        authority = Issuer(pair.key, pair.certificate)
        return cls(authority, folder / "server.pem", wanted, device_lifetime=device_lifetime, now=now)

    def renew_server(self) -> bool:
        """Make the server's certificate anew when it nears its end; whether it did; raises DATA_DIR_UNUSABLE."""
        before = self._server
        self._server = _server_pair(self.server_file, self._authority, self._names, utc(self._now()))
        return self._server.certificate != before.certificate

    @property
    def certificate_pem(self) -> str:
        """The authority's certificate."""
        return self._authority.certificate.public_bytes(Encoding.PEM).decode()

    @property
    def pin(self) -> str:
        """Hex SHA-256 of the authority's certificate (DER), for join tokens."""
        return hashlib.sha256(self._authority.certificate.public_bytes(Encoding.DER)).hexdigest()

    @property
    def expires_at(self) -> float:
        """End of the authority's certificate, Unix seconds."""
        return self._authority.certificate.not_valid_after_utc.timestamp()

    @property
    def renewal_overdue_seconds(self) -> float:
        """A device with less left should have renewed its certificate, which it does when a third is left."""
        return self._device_lifetime.total_seconds() / 6

    @property
    def server_key_pem(self) -> bytes:
        """The private key of the server, PKCS#8."""
        return self._server.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    @property
    def server_chain_pem(self) -> bytes:
        """The server's certificate and then the authority's.

        A TLS server may leave its root out; this one must not: devices that join take the authority's certificate
        from the handshake and compare it with the pin in their token.
        """
        return self._server.certificate.public_bytes(Encoding.PEM) + self.certificate_pem.encode()

    @property
    def server_expires_at(self) -> float:
        """End of the server's certificate, Unix seconds."""
        return self._server.certificate.not_valid_after_utc.timestamp()

    def key_of(self, certificate_request_pem: str) -> str:
        """Hex SHA-256 of the public key (DER) in the request; raises CSR_INVALID."""
        return key_sha256(requested_key(certificate_request_pem))

    def key_of_certificate(self, certificate_pem: bytes) -> str:
        """Hex SHA-256 of the public key (DER) in a certificate of a peer; raises CERTIFICATE_UNKNOWN."""
        return certificate_key_sha256(certificate_pem)

    def issue(self, certificate_request_pem: str, device_id: DeviceId, name: str) -> IssuedCertificate:
        """A client certificate for the key in the request and nothing else of it; raises CSR_INVALID."""
        key = requested_key(certificate_request_pem)
        certificate = device_certificate(
            self._authority, key, device_id=device_id, name=name, now=utc(self._now()), lifetime=self._device_lifetime
        )
        return IssuedCertificate(
            pem=certificate.public_bytes(Encoding.PEM).decode(),
            serial=f"{certificate.serial_number:x}",
            expires_at=certificate.not_valid_after_utc.timestamp(),
        )


def _host_name() -> tuple[str, ...]:
    """The machine's own name where it can stand in a certificate; asks no name server."""
    try:
        name = socket.gethostname()
        general_names([name])
    except (OSError, GloraError):
        return ()
    return (name,)


def _authority_pair(path: Path, moment: datetime) -> _Pair:
    stored = read_private(path)
    if stored is None:
        key = ec.generate_private_key(ec.SECP256R1())
        create_private(path, _Pair(key, authority_certificate(key, moment)).pem())
        # Read back: where two servers start at once in one folder, the first file counts for both.
        stored = read_private(path)
    pair = _parse(path, stored or b"", "restore it from a backup (without it every device must join again)")
    if pair.certificate.not_valid_after_utc <= moment:
        raise GloraError(
            Reason.DATA_DIR_UNUSABLE,
            f"The certificate authority in {path} ended on {pair.certificate.not_valid_after_utc:%Y-%m-%d}. Move it "
            "away, start the server, which makes a new one, and let every device join again; or set the clock.",
            path=path,
        )
    return pair


def _server_pair(path: Path, authority: Issuer, names: tuple[x509.GeneralName, ...], moment: datetime) -> _Pair:
    stored = read_private(path)
    if stored is not None:
        pair = _parse(path, stored, "delete it and start the server again, which makes a new one")
        if _still_good(pair.certificate, authority, names, moment):
            return pair
    key = ec.generate_private_key(ec.SECP256R1())
    pair = _Pair(key, server_certificate(authority, key.public_key(), names, moment))
    replace_private(path, pair.pem())
    return pair


def _still_good(
    certificate: x509.Certificate, authority: Issuer, names: tuple[x509.GeneralName, ...], moment: datetime
) -> bool:
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        certificate.verify_directly_issued_by(authority.certificate)
    except (x509.ExtensionNotFound, InvalidSignature, ValueError, TypeError):
        return False
    return (
        set(found) == set(names)
        and certificate.not_valid_before_utc <= moment
        and moment + _RENEW_SERVER_BEFORE < certificate.not_valid_after_utc
    )


def _parse(path: Path, content: bytes, remedy: str) -> _Pair:
    """Key and certificate of a file; raises DATA_DIR_UNUSABLE when they are broken or do not belong together."""
    try:
        key = load_pem_private_key(content, password=None)
        certificate = x509.load_pem_x509_certificate(content)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ValueError("the key is not an EC key")
        if key.public_key() != certificate.public_key():
            raise ValueError("the key and the certificate do not belong together")
    except (ValueError, TypeError) as error:
        raise GloraError(Reason.DATA_DIR_UNUSABLE, f"{path} is damaged ({error}); {remedy}.", path=path) from error
    return _Pair(key, certificate)
