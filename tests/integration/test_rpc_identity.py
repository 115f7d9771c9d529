"""Who gets in: DESIGN section 4, "Identity", over real sockets and real TLS."""

import asyncio
import hashlib
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from OpenSSL import SSL
from rpc_fakes import device
from rpc_world import (
    SETTINGS,
    Identity,
    World,
    ended_authority,
    eventually,
    identity_from,
    new_key_and_request,
    push_parts,
    refused,
    running_world,
)

from glora.v1 import coordinator_pb2, coordinator_pb2_grpc, enrolment_pb2, enrolment_pb2_grpc
from glora_server import main
from glora_server.coordinator.model import DeviceState
from glora_server.security.authority import FileAuthority
from glora_server.security.rate import RateLimiter
from glora_wire.errors import Reason

ACCEPTED = coordinator_pb2.ReportProgressRequest(assignment="assignments/a1", accepted=coordinator_pb2.Accepted())


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with running_world(tmp_path / "authority") as running:
        yield running


async def report(channel: grpc.aio.Channel) -> coordinator_pb2.ReportProgressResponse:
    async with channel:
        return await coordinator_pb2_grpc.CoordinatorServiceStub(channel).ReportProgress(ACCEPTED, timeout=60)


async def shown(world: World) -> list[str]:
    """The server's certificate on both ports."""
    ports = (world.servers.port, world.servers.enrolment_port)
    return [await asyncio.to_thread(ssl.get_server_certificate, ("localhost", port)) for port in ports]


async def test_enrolled_device_is_the_one_of_its_certificate(world: World) -> None:
    answer = await report(world.channel())
    assert not answer.cancelled
    assert answer.deadline.ToNanoseconds() == 1_000_500_000_000
    assert answer.sent_at.seconds > 1_600_000_000
    assert world.devices.called("accepted") == [("accepted", "d1", "a1")]
    assert world.observer.finished == [("ReportProgress", "OK")]


async def test_a_renewed_certificate_is_shown_to_new_connections_and_open_ones_stay(world: World) -> None:
    first = await shown(world)
    async with world.channel() as channel:
        stub = coordinator_pb2_grpc.CoordinatorServiceStub(channel)
        await stub.ReportProgress(ACCEPTED, timeout=60)
        world.authority.server_file.unlink()
        assert world.authority.renew_server()
        assert await shown(world) == first, "nobody said so yet"
        world.servers.renew_certificate()
        second = await shown(world)
        assert not set(second) & set(first)
        assert await shown(world) == second
        await stub.ReportProgress(ACCEPTED, timeout=60)
    assert not (await report(world.channel())).cancelled
    with refused(Reason.SERVER_UNREACHABLE, grpc.StatusCode.UNAVAILABLE):
        await report(world.anonymous())


async def test_a_server_looks_after_its_certificate_also_after_trouble(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(main, "_LOOK_AT_CERTIFICATE_SECONDS", 0.01)
    first, chain = await shown(world), world.authority.server_chain_pem
    world.authority.server_file.chmod(0o644)
    task = asyncio.create_task(main._renew_certificate(world.authority, world.servers))
    await asyncio.sleep(0.2)
    assert world.authority.server_chain_pem == chain, "a key that others may read is not used"
    world.authority.server_file.unlink()
    await eventually(lambda: len(world.servers._renewed) == 2)
    assert not set(await shown(world)) & set(first)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_without_certificate_nothing_is_served(world: World) -> None:
    with refused(Reason.SERVER_UNREACHABLE, grpc.StatusCode.UNAVAILABLE) as errors:
        await report(world.anonymous())
    assert "certificate" in errors[0].message
    assert not world.devices.calls


async def test_certificate_of_another_authority_is_refused(world: World, tmp_path: Path) -> None:
    stranger = identity_from(FileAuthority.open(tmp_path / "other"))
    world.devices.members["x"] = device("d1", "x")
    with refused(Reason.SERVER_UNREACHABLE, grpc.StatusCode.UNAVAILABLE):
        await report(world.channel(stranger))
    assert not world.devices.calls


async def test_ended_certificate_is_refused(world: World) -> None:
    old = identity_from(ended_authority(world.folder))
    key = world.authority.key_of_certificate(old.certificate)
    world.devices.members[key] = device("d2", key)
    with refused(Reason.SERVER_UNREACHABLE, grpc.StatusCode.UNAVAILABLE):
        await report(world.channel(old))
    assert not world.devices.calls


async def test_server_certificate_is_no_device(world: World) -> None:
    leaf = world.authority.server_chain_pem
    with refused(Reason.SERVER_UNREACHABLE, grpc.StatusCode.UNAVAILABLE):
        await report(world.channel(Identity(world.authority.server_key_pem, leaf)))


async def test_unknown_key_must_join_again(world: World) -> None:
    with refused(Reason.CERTIFICATE_UNKNOWN, grpc.StatusCode.UNAUTHENTICATED):
        await report(world.channel(identity_from(world.authority)))


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (DeviceState.REVOKED, Reason.DEVICE_REVOKED),
        (DeviceState.SUSPENDED, Reason.DEVICE_SUSPENDED),
        (DeviceState.PENDING, Reason.DEVICE_PENDING),
    ],
)
async def test_state_of_a_device_counts_on_an_open_connection(world: World, state: DeviceState, reason: Reason) -> None:
    async with world.channel() as channel:
        stub = coordinator_pb2_grpc.CoordinatorServiceStub(channel)
        await stub.ReportProgress(ACCEPTED, timeout=60)
        world.devices.set_state("d1", state)
        with refused(reason, grpc.StatusCode.PERMISSION_DENIED) as errors:
            await stub.ReportProgress(ACCEPTED, timeout=60)
        assert errors[0].details["device"] == "name-d1"
        assert (errors[0].retry_after is None) == (state is DeviceState.REVOKED)


async def test_revocation_ends_a_running_upload(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glora_server.rpc.transfers._CHECK_SECONDS", 0.0)
    parts = list(push_parts(bytes(3 * 1024 * 1024)))
    async with world.channel() as channel:
        call = coordinator_pb2_grpc.CoordinatorServiceStub(channel).PushUpdate(timeout=60)
        for part in parts[:2]:
            await call.write(part)
        await eventually(lambda: world.uploads.partial)
        world.devices.set_state("d1", DeviceState.REVOKED)
        with refused(Reason.DEVICE_REVOKED):
            await call.write(parts[2])
            await call
    assert len(world.uploads.partial) == 1024 * 1024
    assert world.uploads.streams[0].closed == 1


async def test_chain_of_the_enrolment_port_ends_with_the_pinned_authority(world: World) -> None:
    """What a joining device does: fetch the chain without trusting anything, compare its last certificate."""

    def fetch() -> list[bytes]:
        context = SSL.Context(SSL.TLS_CLIENT_METHOD)
        context.set_alpn_protos([b"h2"])
        with socket.create_connection(("localhost", world.servers.enrolment_port), timeout=60) as plain:
            plain.settimeout(None)
            connection = SSL.Connection(context, plain)
            connection.set_connect_state()
            connection.set_tlsext_host_name(b"localhost")
            connection.do_handshake()
            chain = connection.get_peer_cert_chain() or []
            return [certificate.to_cryptography().public_bytes(Encoding.DER) for certificate in chain]

    chain = await asyncio.to_thread(fetch)
    assert len(chain) == 2
    assert hashlib.sha256(chain[-1]).hexdigest() == world.authority.pin


async def test_joining_needs_no_certificate_and_the_new_one_works(world: World) -> None:
    key, request = new_key_and_request()
    async with world.anonymous(enrolment=True) as channel:
        answer = await enrolment_pb2_grpc.EnrolmentServiceStub(channel).Enrol(
            enrolment_pb2.EnrolRequest(
                token_id="t",
                token_secret="good",
                certificate_request_pem=request,
                device_name="pi",
                max_rank=4,
            ),
            timeout=60,
        )
    assert answer.device == "devices/new"
    assert answer.granted_rank == 8
    assert answer.coordinator_port == world.servers.port
    assert answer.coordinator_host == ""
    assert answer.authority_pem == world.authority.certificate_pem
    record, peer = world.enrolment.requests[0]
    assert (record.name, record.max_rank, record.token_id) == ("pi", 4, "t")
    assert "good" not in repr(record)
    assert peer.startswith("ipv")
    await report(world.channel(Identity(key, answer.certificate_pem.encode())))
    assert world.devices.called("accepted") == [("accepted", "new", "a1")]


async def test_refused_token_tells_its_reason(world: World) -> None:
    async with world.anonymous(enrolment=True) as channel:
        stub = enrolment_pb2_grpc.EnrolmentServiceStub(channel)
        with refused(Reason.TOKEN_UNKNOWN, grpc.StatusCode.UNAUTHENTICATED) as errors:
            await stub.Enrol(enrolment_pb2.EnrolRequest(token_id="t77", token_secret="bad"), timeout=60)
    assert errors[0].details == {"token": "t77"}


async def test_renewal_on_the_coordinator_port_only(world: World) -> None:
    _, request = new_key_and_request()
    message = enrolment_pb2.RenewCertificateRequest(certificate_request_pem=request)
    async with world.channel() as channel:
        answer = await enrolment_pb2_grpc.EnrolmentServiceStub(channel).RenewCertificate(message, timeout=60)
    key = world.authority.key_of(request)
    assert world.authority.key_of_certificate(answer.certificate_pem.encode()) == key
    async with world.anonymous(enrolment=True) as channel:
        with refused(Reason.REQUEST_INVALID, grpc.StatusCode.UNIMPLEMENTED) as errors:
            await enrolment_pb2_grpc.EnrolmentServiceStub(channel).RenewCertificate(message, timeout=60)
    assert str(world.servers.port) in errors[0].message


async def test_joining_on_the_coordinator_port_says_where(world: World) -> None:
    async with world.channel() as channel:
        with refused(Reason.REQUEST_INVALID, grpc.StatusCode.UNIMPLEMENTED) as errors:
            await enrolment_pb2_grpc.EnrolmentServiceStub(channel).Enrol(enrolment_pb2.EnrolRequest(), timeout=60)
    assert "enrolment port" in errors[0].message


async def test_rounds_are_not_served_on_the_enrolment_port(world: World) -> None:
    async with world.anonymous(enrolment=True) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await coordinator_pb2_grpc.CoordinatorServiceStub(channel).ReportProgress(ACCEPTED, timeout=60)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_one_address_cannot_try_tokens_without_end(tmp_path: Path) -> None:
    limit = RateLimiter(per_second=0.001, burst=2)
    async with running_world(tmp_path, SETTINGS, limit) as world, world.anonymous(enrolment=True) as channel:
        stub = enrolment_pb2_grpc.EnrolmentServiceStub(channel)
        for _ in range(2):
            with refused(Reason.TOKEN_UNKNOWN):
                await stub.Enrol(enrolment_pb2.EnrolRequest(), timeout=60)
        with refused(Reason.TOO_MANY_REQUESTS, grpc.StatusCode.RESOURCE_EXHAUSTED) as errors:
            await stub.Enrol(enrolment_pb2.EnrolRequest(), timeout=60)
        assert errors[0].retry_after == 5.0
        assert len(world.enrolment.requests) == 2
