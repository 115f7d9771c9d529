"""Health, reflection, starting and stopping of the two servers."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import grpc
import grpc.aio
import pytest
from glora_processes import free_port
from grpc_health.v1 import health_pb2  # type: ignore[import-untyped]  # no py.typed
from grpc_reflection.v1alpha import reflection_pb2  # type: ignore[import-untyped]  # no py.typed
from rpc_world import SETTINGS, World, new_key_and_request, running_world

from glora.v1 import enrolment_pb2, enrolment_pb2_grpc
from glora_server.rpc.server import GrpcServers
from glora_server.rpc.services import RpcSettings, UseCases
from glora_server.security.authority import FileAuthority
from glora_server.security.rate import RateLimiter
from glora_wire.errors import GloraError, Reason


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with running_world(tmp_path / "authority") as running:
        yield running


async def test_health_on_both_ports(world: World) -> None:
    names = ["", "glora.v1.EnrolmentService"]
    for channel, services in (
        (world.anonymous(enrolment=True), names),
        (world.channel(), [*names, "glora.v1.CoordinatorService"]),
    ):
        async with channel:
            check = channel.unary_unary(
                "/grpc.health.v1.Health/Check",
                request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
                response_deserializer=health_pb2.HealthCheckResponse.FromString,
            )
            for service in services:
                answer = await check(health_pb2.HealthCheckRequest(service=service), timeout=60)
                assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_reflection_lists_the_services_of_each_port(world: World) -> None:
    async def services(channel: grpc.aio.Channel) -> set[str]:
        async with channel:
            reflect = channel.stream_stream(
                "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
                request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
                response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
            )
            questions = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
            [answer] = [answer async for answer in reflect(questions, timeout=60)]
            return {service.name for service in answer.list_services_response.service}

    common = {"glora.v1.EnrolmentService", "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
    assert await services(world.anonymous(enrolment=True)) == common
    assert await services(world.channel()) == common | {"glora.v1.CoordinatorService"}


def other_servers(world: World, folder: Path, settings: RpcSettings) -> GrpcServers:
    use_cases = UseCases(devices=world.devices, uploads=world.uploads, enrolment=world.enrolment)
    authority = FileAuthority.open(folder)
    return GrpcServers(settings, authority, use_cases, limit=RateLimiter(), observer=world.observer)


async def test_port_in_use_is_a_sentence_that_names_port_and_setting(world: World, tmp_path: Path) -> None:
    taken = replace(SETTINGS, port=world.servers.port)
    with pytest.raises(GloraError, match=r"GLORA__GRPC__PORT") as caught:
        await other_servers(world, tmp_path, taken).start()
    assert caught.value.reason is Reason.PORT_IN_USE
    assert caught.value.details == {"port": str(world.servers.port), "setting": "grpc.port"}
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        taken = replace(SETTINGS, enrolment_host="127.0.0.1", enrolment_port=port)
        servers = other_servers(world, tmp_path, taken)
        with pytest.raises(GloraError, match=f"Port {port} .*enrolment.port") as caught:
            await servers.start()
        assert caught.value.reason is Reason.PORT_IN_USE


async def test_failed_start_gives_back_the_port_that_it_had(world: World, tmp_path: Path) -> None:
    free = free_port()
    half = replace(SETTINGS, port=free, enrolment_port=world.servers.enrolment_port)
    servers = other_servers(world, tmp_path, half)
    with pytest.raises(GloraError):
        await servers.start()
    again = other_servers(world, tmp_path, replace(SETTINGS, port=free))
    await again.start()
    assert again.port == free
    await again.stop()


@pytest.mark.parametrize("host", ["203.0.113.1", "no such host", "x" * 300])
async def test_host_that_is_not_ours_is_a_sentence(world: World, tmp_path: Path, host: str) -> None:
    with pytest.raises(GloraError, match=r"grpc\.host") as caught:
        await other_servers(world, tmp_path, replace(SETTINGS, host=host)).start()
    assert caught.value.reason is Reason.SETTINGS_INVALID


async def test_ports_are_free_again_after_stop(tmp_path: Path) -> None:
    async with running_world(tmp_path) as world:
        ports = (world.servers.port, world.servers.enrolment_port)
    again = replace(SETTINGS, port=ports[0], enrolment_port=ports[1])
    async with running_world(tmp_path, again) as world:
        assert (world.servers.port, world.servers.enrolment_port) == ports


async def test_devices_are_sent_to_the_public_address(tmp_path: Path) -> None:

    settings = replace(SETTINGS, public_host="glora.example", public_port=443)
    async with running_world(tmp_path, settings) as world, world.anonymous(enrolment=True) as channel:
        _, request = new_key_and_request()
        answer = await enrolment_pb2_grpc.EnrolmentServiceStub(channel).Enrol(
            enrolment_pb2.EnrolRequest(token_secret="good", certificate_request_pem=request), timeout=60
        )
    assert (answer.coordinator_host, answer.coordinator_port) == ("glora.example", 443)
