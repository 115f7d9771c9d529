"""Joining and renewing. cryptography and pyOpenSSL are imported where they are used: a running agent needs neither."""

from __future__ import annotations

import hashlib
import socket
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import grpc

from glora.v1 import enrolment_pb2, enrolment_pb2_grpc, types_pb2
from glora_client.channel import SHORT_SECONDS, Stop, enrolment_channel
from glora_client.state import Identity, StateFolder
from glora_wire.errors import GloraError, Reason
from glora_wire.join_token import JoinToken

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

DEFAULT_ENROLMENT_PORT: Final = 7444
RENEW_AFTER: Final = 2 / 3
"""Share of a certificate's life after which a new one is asked for."""
_DIAL_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True)
class Joined:
    """What joining gave: the identity, and whether an operator must still approve the device."""

    identity: Identity
    approval_pending: bool


def parse_server(text: str) -> tuple[str, int]:
    """Host and enrolment port in HOST, HOST:PORT or [IPv6]:PORT; raises GloraError SERVER_UNREACHABLE."""
    host, port = text.strip(), str(DEFAULT_ENROLMENT_PORT)
    if host.startswith("["):
        host, _, rest = host[1:].partition("]")
        port = rest.removeprefix(":") or port
    elif host.count(":") == 1:
        host, _, port = host.partition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise GloraError(
            Reason.SERVER_UNREACHABLE,
            f"{text!r} is not a server; give its name or address, with a port only when enrolment is not on 7444.",
        )
    return host, int(port)


def join(
    state: StateFolder, *, server: str, token: str, name: str, rank: int, profile: types_pb2.CapabilityProfile
) -> Joined:
    """Turn a join token into a device identity in the state folder.

    The key is written before the server is asked, so that a repeat after a lost answer is the same device. Raises
    GloraError: TOKEN_MALFORMED, CA_PIN_MISMATCH, SERVER_UNREACHABLE and what `EnrolmentService.Enrol` says.
    """
    parsed = JoinToken.parse(token)
    host, port = parse_server(server)
    authority_pem = fetch_authority(host, port, parsed.ca_sha256)
    key = _key(state)
    request = enrolment_pb2.EnrolRequest(
        token_id=parsed.token_id,
        token_secret=parsed.secret.hex(),
        certificate_request_pem=_certificate_request(key, name),
        device_name=name,
        max_rank=rank,
        profile=profile,
    )
    with enrolment_channel(host, port, authority_pem) as channel:
        call = enrolment_pb2_grpc.EnrolmentServiceStub(channel).Enrol.future(
            request, timeout=SHORT_SECONDS, wait_for_ready=True
        )
        with Stop().ending(call):
            answer = call.result()
    identity = Identity(
        device=answer.device,
        name=name,
        rank=answer.granted_rank,
        host=answer.coordinator_host or host,
        port=answer.coordinator_port,
        enrolment_port=port,
        issued_at=_issued_at(answer.certificate_pem),
        expires_at=answer.expires_at.ToNanoseconds() / 1e9,
    )
    state.save_identity(identity, certificate_pem=answer.certificate_pem, authority_pem=answer.authority_pem)
    return Joined(identity=identity, approval_pending=answer.approval_pending)


def renew(state: StateFolder, identity: Identity, channel: grpc.Channel, stop: Stop) -> Identity:
    """The identity with a new certificate, saved; `channel` is the working one. Raises GloraError, Stopped."""
    request = enrolment_pb2.RenewCertificateRequest(
        certificate_request_pem=_certificate_request(_key(state), identity.name)
    )
    call = enrolment_pb2_grpc.EnrolmentServiceStub(channel).RenewCertificate.future(request, timeout=SHORT_SECONDS)
    with stop.ending(call):
        answer = call.result()
    renewed = replace(
        identity,
        issued_at=_issued_at(answer.certificate_pem),
        expires_at=answer.expires_at.ToNanoseconds() / 1e9,
    )
    state.save_identity(renewed, certificate_pem=answer.certificate_pem, authority_pem=answer.authority_pem)
    return renewed


def needs_renewal(identity: Identity, now: float) -> bool:
    """Whether two thirds of the certificate's life are over at `now` (Unix seconds)."""
    return now >= identity.issued_at + RENEW_AFTER * (identity.expires_at - identity.issued_at)


def fetch_authority(host: str, port: int, pin: str) -> bytes:
    """The CA certificate (PEM) that the server presents and whose SHA-256 is `pin`.

    Nothing is sent but a TLS greeting: the server is not trusted before the pin and the signature on its own
    certificate were checked. Raises GloraError CA_PIN_MISMATCH, SERVER_UNREACHABLE.
    """
    from cryptography.exceptions import InvalidSignature  # noqa: PLC0415
    from cryptography.hazmat.primitives.serialization import Encoding  # noqa: PLC0415

    chain = _presented_chain(host, port)
    for certificate in chain:
        if hashlib.sha256(certificate.public_bytes(Encoding.DER)).hexdigest() != pin:
            continue
        try:
            chain[0].verify_directly_issued_by(certificate)
        except (ValueError, TypeError, InvalidSignature):
            break
        return certificate.public_bytes(Encoding.PEM)
    raise GloraError(
        Reason.CA_PIN_MISMATCH,
        f"The server at {host}:{port} is not the one that made this join token (its certificate authority is another); "
        "nothing was sent to it. Check the address, or ask the operator for a new token.",
        host=host,
        port=port,
    )


def _presented_chain(host: str, port: int) -> list[x509.Certificate]:
    from OpenSSL import SSL  # noqa: PLC0415

    context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    context.set_alpn_protos([b"h2"])
    # The pin, not a chain of trust, decides; see fetch_authority.
    context.set_verify(SSL.VERIFY_NONE)
    try:
        with socket.create_connection((host, port), timeout=_DIAL_SECONDS) as raw:
            raw.setblocking(True)
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(_DIAL_SECONDS))
            connection = SSL.Connection(context, raw)
            connection.set_connect_state()
            connection.set_tlsext_host_name(host.encode("idna"))
            connection.do_handshake()
            chain = connection.get_peer_cert_chain() or []
            connection.shutdown()
    except (OSError, SSL.Error, UnicodeError) as error:
        raise GloraError(
            Reason.SERVER_UNREACHABLE,
            f"No TLS server answers at {host}:{port} ({error or type(error).__name__}). Check the address, that the "
            "server runs, and that its enrolment port (7444 unless configured) can be reached.",
            host=host,
            port=port,
        ) from error
    return [certificate.to_cryptography() for certificate in chain]


def _timeval(seconds: float) -> bytes:
    return int(seconds).to_bytes(8, "little") + (0).to_bytes(8, "little")


def _key(state: StateFolder) -> ec.EllipticCurvePrivateKey:
    """The device's private key, made and written the first time."""
    from cryptography.hazmat.primitives import serialization  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric import ec  # noqa: PLC0415

    text = state.read("key.pem")
    if text is not None:
        key = serialization.load_pem_private_key(text.encode(), password=None)
        if isinstance(key, ec.EllipticCurvePrivateKey):
            return key
    key = ec.generate_private_key(ec.SECP256R1())
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    state.write("key.pem", pem.decode())
    return key


def _certificate_request(key: ec.EllipticCurvePrivateKey, name: str) -> str:
    from cryptography import x509  # noqa: PLC0415
    from cryptography.hazmat.primitives import hashes, serialization  # noqa: PLC0415
    from cryptography.x509.oid import NameOID  # noqa: PLC0415

    try:
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    except ValueError as error:
        raise GloraError(Reason.NAME_INVALID, f"{name!r} cannot be a device's name ({error}).") from error
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM).decode()


def _issued_at(certificate_pem: str) -> float:
    from cryptography import x509  # noqa: PLC0415

    return x509.load_pem_x509_certificate(certificate_pem.encode()).not_valid_before_utc.timestamp()
