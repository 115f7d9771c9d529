"""A gRPC edge on loopback with real mutual TLS, in front of fake use cases."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import grpc
import grpc.aio
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from rpc_fakes import FakeDevices, FakeEnrolment, FakeObserver, FakeUploads, device

from glora.v1 import coordinator_pb2, coordinator_pb2_grpc
from glora_server.rounds.ids import DeviceId
from glora_server.rpc.server import GrpcServers
from glora_server.rpc.services import PeerLimit, RpcSettings, UseCases
from glora_server.security.authority import FileAuthority
from glora_server.security.rate import RateLimiter
from glora_wire import digests
from glora_wire.digests import digest_bytes
from glora_wire.errors import GloraError, Reason
from glora_wire.rpc_errors import error_from_rpc

SETTINGS = RpcSettings(
    host="localhost",
    port=0,
    enrolment_host="localhost",
    enrolment_port=0,
    poll_min_seconds=20.0,
    poll_max_seconds=30.0,
    grace_seconds=0.5,
)


@dataclass(frozen=True, slots=True)
class Identity:
    """A private key and a certificate for it, PEM."""

    key: bytes
    certificate: bytes


def new_key_and_request() -> tuple[bytes, str]:
    key = ec.generate_private_key(ec.SECP256R1())
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return pem, request.public_bytes(Encoding.PEM).decode()


def identity_from(authority: FileAuthority, device_id: str = "d1") -> Identity:
    key, request = new_key_and_request()
    return Identity(key, authority.issue(request, DeviceId(device_id), "pi").pem.encode())


def ended_authority(folder: Path) -> FileAuthority:
    """The authority of the folder as it was two days ago, when it gave certificates for an hour."""
    return FileAuthority.open(
        folder, device_lifetime=timedelta(hours=1), now=lambda: time.time() - timedelta(days=2).total_seconds()
    )


@dataclass(slots=True)
class World:
    """Everything together; `channel()` dials as the enrolled device d1."""

    folder: Path
    authority: FileAuthority
    me: Identity
    devices: FakeDevices
    uploads: FakeUploads
    enrolment: FakeEnrolment
    observer: FakeObserver
    servers: GrpcServers

    def channel(self, identity: Identity | None = None, *, enrolment: bool = False) -> grpc.aio.Channel:
        who = identity or self.me
        return self._dial(enrolment, who.key, who.certificate)

    async def push(self, parts: Iterable[coordinator_pb2.PushUpdateRequest]) -> coordinator_pb2.PushUpdateResponse:
        """Push with the blocking client: grpc.aio's loses the status when the server answers before the last part."""

        def blocking() -> coordinator_pb2.PushUpdateResponse:
            credentials = grpc.ssl_channel_credentials(
                self.authority.certificate_pem.encode(), self.me.key, self.me.certificate
            )
            with grpc.secure_channel(f"localhost:{self.servers.port}", credentials) as channel:
                return coordinator_pb2_grpc.CoordinatorServiceStub(channel).PushUpdate(iter(parts), timeout=60)

        return await asyncio.to_thread(blocking)

    def anonymous(self, *, enrolment: bool = False) -> grpc.aio.Channel:
        return self._dial(enrolment, None, None)

    def _dial(self, enrolment: bool, key: bytes | None, certificate: bytes | None) -> grpc.aio.Channel:
        port = self.servers.enrolment_port if enrolment else self.servers.port
        roots = self.authority.certificate_pem.encode()
        credentials = grpc.ssl_channel_credentials(roots, key, certificate)
        # A private pool of connections: else grpc shares one between channels that look alike.
        options = (("grpc.use_local_subchannel_pool", 1),)
        return grpc.aio.secure_channel(f"localhost:{port}", credentials, options=options)


@asynccontextmanager
async def running_world(
    folder: Path, settings: RpcSettings = SETTINGS, limit: PeerLimit | None = None
) -> AsyncIterator[World]:
    authority = FileAuthority.open(folder)
    me = identity_from(authority)
    mine = device("d1", authority.key_of_certificate(me.certificate))
    devices = FakeDevices(members={mine.key_sha256: mine})
    uploads, enrolment, observer = FakeUploads(), FakeEnrolment(authority, devices), FakeObserver()
    servers = GrpcServers(
        settings,
        authority,
        UseCases(devices=devices, uploads=uploads, enrolment=enrolment),
        limit=limit or RateLimiter(),
        observer=observer,
    )
    await servers.start()
    try:
        yield World(folder, authority, me, devices, uploads, enrolment, observer, servers)
    finally:
        await servers.stop()


def code_of(error: grpc.RpcError) -> grpc.StatusCode | None:
    """The status code, which the type of RpcError does not promise."""
    assert isinstance(error, grpc.Call | grpc.aio.AioRpcError)
    return error.code()


@contextmanager
def refused(reason: Reason, code: grpc.StatusCode | None = None) -> Iterator[list[GloraError]]:
    """The body must end with an RpcError of the reason (and code); the error is put into the list."""
    found: list[GloraError] = []
    with pytest.raises(grpc.RpcError) as caught:
        yield found
    error = error_from_rpc(caught.value)
    assert error.reason is reason, (error.reason, error.message)
    assert code is None or code_of(caught.value) is code
    assert error.message
    found.append(error)


async def eventually(true: Callable[[], object], what: str = "it did not become true") -> None:
    """Wait until the callable answers with something true; at most a minute."""
    for _ in range(6000):
        if true():
            return
        await asyncio.sleep(0.01)
    raise AssertionError(what)


def push_parts(
    payload: bytes, *, offset: int = 0, chunk: int = 1024 * 1024, assignment: str = "assignments/a1"
) -> Iterator[coordinator_pb2.PushUpdateRequest]:
    digest = digests.to_proto(digest_bytes(payload))
    header = coordinator_pb2.PushHeader(
        assignment=assignment, digest=digest, offset=offset, adapter_config_json="{}", training_rows=10
    )
    yield coordinator_pb2.PushUpdateRequest(header=header)
    for start in range(offset, len(payload), chunk):
        part = coordinator_pb2.Chunk(offset=start, data=payload[start : start + chunk])
        yield coordinator_pb2.PushUpdateRequest(chunk=part)
    yield coordinator_pb2.PushUpdateRequest(trailer=coordinator_pb2.Trailer(digest=digest))
