"""The certificate authority."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from glora_server.rounds.ids import DeviceId


@dataclass(frozen=True, slots=True, kw_only=True)
class IssuedCertificate:
    """A certificate for a device, PEM."""

    pem: str
    serial: str
    expires_at: float


class Authority(Protocol):
    """The server's certificate authority."""

    @property
    def certificate_pem(self) -> str:
        """The CA certificate."""
        ...

    @property
    def pin(self) -> str:
        """Hex SHA-256 of the CA certificate (DER), for join tokens."""
        ...

    def key_of(self, certificate_request_pem: str) -> str:
        """Hex SHA-256 of the public key (DER) in the request; raises CSR_INVALID."""
        ...

    def issue(self, certificate_request_pem: str, device_id: DeviceId, name: str) -> IssuedCertificate:
        """A client certificate for the key in the request and nothing else of it; raises CSR_INVALID."""
        ...
