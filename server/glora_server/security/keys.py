"""Public keys: which ones are accepted, and the hash that names a device."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from glora_wire.errors import GloraError, Reason

DeviceKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey

_MAX_REQUEST: Final = 16 * 1024
_RSA_BITS: Final = range(2048, 8192 + 1)
_CURVES: Final = (ec.SECP256R1, ec.SECP384R1)


def key_sha256(key: DeviceKey) -> str:
    """Hex SHA-256 of the key's SubjectPublicKeyInfo in DER."""
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


@lru_cache(maxsize=8192)
def certificate_key_sha256(certificate_pem: bytes) -> str:
    """Hex SHA-256 of the public key in a certificate (PEM); cached, because every rpc asks.

    Raises CERTIFICATE_UNKNOWN for something that is no certificate with a key of ours.
    """
    try:
        return key_sha256(_accepted(x509.load_pem_x509_certificate(certificate_pem).public_key()))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise GloraError(
            Reason.CERTIFICATE_UNKNOWN, f"The client certificate is not one that this server issued: {error}."
        ) from error


def requested_key(certificate_request_pem: str) -> DeviceKey:
    """The public key in a PKCS#10 request whose signature proves that the sender holds the private key.

    Nothing else of the request is used. Raises CSR_INVALID.
    """
    try:
        if len(certificate_request_pem) > _MAX_REQUEST:
            raise ValueError(f"it is longer than {_MAX_REQUEST} characters")
        request = x509.load_pem_x509_csr(certificate_request_pem.encode())
        key = _accepted(request.public_key())
        if not request.is_signature_valid:
            raise ValueError("its signature does not fit its key")
    except (ValueError, UnsupportedAlgorithm) as error:
        raise GloraError(
            Reason.CSR_INVALID,
            f"The certificate request cannot be used: {error}. Send a PKCS#10 request in PEM, signed with an EC key "
            "(P-256 or P-384) or an RSA key of 2048 to 8192 bits.",
        ) from error
    return key


def _accepted(key: object) -> DeviceKey:
    """The key; raises ValueError when its kind or size is not accepted."""
    match key:
        case ec.EllipticCurvePublicKey() if isinstance(key.curve, _CURVES):
            return key
        case rsa.RSAPublicKey() if key.key_size in _RSA_BITS:
            return key
        case ec.EllipticCurvePublicKey():
            raise ValueError(f"its key is on the curve {key.curve.name}")
        case ed25519.Ed25519PublicKey():
            # It would get a certificate and then fail every handshake: NO_COMMON_SIGNATURE_ALGORITHMS.
            raise ValueError("its key is an Ed25519 key, which gRPC's TLS does not speak")
        case rsa.RSAPublicKey():
            raise ValueError(f"its RSA key has {key.key_size} bits")
        case _:
            raise ValueError("its key is of a kind that is not accepted")
