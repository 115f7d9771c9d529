"""The two gRPC servers: devices at work (mutual TLS) and devices that join (server TLS only).

grpcio cannot ask for an optional client certificate, hence two ports; both speak health and reflection.
"""

from __future__ import annotations

import asyncio
from typing import Final

import grpc
import grpc.aio
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]  # no py.typed
from grpc_health.v1.health import aio as health_aio  # type: ignore[import-untyped]  # no py.typed
from grpc_reflection.v1alpha import reflection  # type: ignore[import-untyped]  # no py.typed

from glora.v1 import enrolment_pb2, enrolment_pb2_grpc
from glora_server.rpc.binding import check_free, in_use, target
from glora_server.rpc.coordinator_servicer import SERVICE, CoordinatorServicer, register
from glora_server.rpc.edge import Edge
from glora_server.rpc.enrolment_servicer import EnrolmentServicer, RenewalServicer
from glora_server.rpc.polls import Polls
from glora_server.rpc.services import PeerLimit, RpcObserver, RpcSettings, ServerIdentity, UseCases

_ENROLMENT: Final = enrolment_pb2.DESCRIPTOR.services_by_name["EnrolmentService"].full_name
_OPTIONS: Final = (
    # Two servers must not share a port in silence.
    ("grpc.so_reuseport", 0),
    # Window growth by probing doubled the peak memory under parallel uploads.
    ("grpc.http2.bdp_probe", 0),
    # With the defaults, thousands of devices that wake at once see CANCELLED.
    ("grpc.server.max_pending_requests", 20_000),
    ("grpc.server.max_pending_requests_hard_limit", 40_000),
    # Devices sit behind NAT: dead connections are found out, and their own pings are welcome.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    # A device has a poll, a transfer and a report going at a time.
    ("grpc.max_concurrent_streams", 64),
)
_log = structlog.get_logger("glora.rpc")


class GrpcServers:
    """Both servers, from binding to the last call."""

    def __init__(
        self,
        settings: RpcSettings,
        identity: ServerIdentity,
        use_cases: UseCases,
        *,
        limit: PeerLimit,
        observer: RpcObserver,
    ) -> None:
        self._settings = settings
        self._identity = identity
        self._use_cases = use_cases
        self._limit = limit
        self._observer = observer
        self._edge = Edge(identity, use_cases.devices, observer)
        self._polls = Polls()
        self._running: list[tuple[grpc.aio.Server, health_aio.HealthServicer]] = []
        self._servicer: CoordinatorServicer | None = None
        self._ports = (0, 0)
        self._renewed: dict[bool, grpc.ServerCertificateConfiguration] = {}
        """What a port (mutual or not) takes with its next connection."""

    @property
    def port(self) -> int:
        """The coordinator port that was bound; 0 before `start`."""
        return self._ports[0]

    @property
    def enrolment_port(self) -> int:
        """The enrolment port that was bound; 0 before `start`."""
        return self._ports[1]

    async def start(self) -> None:
        """Bind both ports, then serve; raises PORT_IN_USE, SETTINGS_INVALID, and then nothing was started."""
        settings, coordinator, enrolment = self._settings, _server(), _server()
        # Both before either is taken: a server that was bound and never started keeps its port.
        await asyncio.to_thread(check_free, settings.host, settings.port, "grpc")
        await asyncio.to_thread(check_free, settings.enrolment_host, settings.enrolment_port, "enrolment")
        mutual, plain = self._credentials(mutual=True), self._credentials(mutual=False)
        self._ports = (
            _bind(coordinator, settings.host, settings.port, "grpc", mutual),
            _bind(enrolment, settings.enrolment_host, settings.enrolment_port, "enrolment", plain),
        )
        await self._serve(coordinator, self._at_work(coordinator))
        await self._serve(enrolment, self._joining(enrolment))
        _log.info("grpc_started", port=self.port, enrolment_port=self.enrolment_port)

    def _at_work(self, server: grpc.aio.Server) -> tuple[str, ...]:
        """Register what devices with a certificate may call; the names of the services."""
        use_cases = self._use_cases
        self._servicer = CoordinatorServicer(
            use_cases, self._edge, self._polls, settings=self._settings, observer=self._observer
        )
        register(self._servicer, server)
        renewal = RenewalServicer(use_cases.enrolment, self._edge)
        enrolment_pb2_grpc.add_EnrolmentServiceServicer_to_server(renewal, server)
        return SERVICE, _ENROLMENT

    def _joining(self, server: grpc.aio.Server) -> tuple[str, ...]:
        """Register what anyone may call; the names of the services."""
        settings = self._settings
        servicer = EnrolmentServicer(
            self._use_cases.enrolment,
            self._edge,
            self._limit,
            public_host=settings.public_host,
            public_port=settings.public_port or self.port,
        )
        enrolment_pb2_grpc.add_EnrolmentServiceServicer_to_server(servicer, server)
        return (_ENROLMENT,)

    async def stop(self) -> None:
        """End long polls at once, let other calls finish for the grace period, then cut them off."""
        self._polls.stop()
        for _, health in self._running:
            await health.enter_graceful_shutdown()
        await asyncio.gather(*(server.stop(self._settings.grace_seconds) for server, _ in self._running))
        self._running.clear()
        if self._servicer is not None:
            self._servicer.close()

    async def _serve(self, server: grpc.aio.Server, services: tuple[str, ...]) -> None:
        health = health_aio.HealthServicer()
        for service in services:
            await health.set(service, health_pb2.HealthCheckResponse.SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(health, server)
        names = (*services, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        await server.start()
        self._running.append((server, health))

    def renew_certificate(self) -> None:
        """Show the identity's present certificate from the next connection on; open connections stay."""
        self._renewed = {mutual: self._configuration(mutual) for mutual in (True, False)}
        _log.info("grpc_certificate_renewed")

    def _credentials(self, *, mutual: bool) -> grpc.ServerCredentials:
        # Asked before every handshake, in a thread of grpc's; None leaves everything as it is.
        return grpc.dynamic_ssl_server_credentials(
            self._configuration(mutual),
            lambda: self._renewed.pop(mutual, None),  # type: ignore[arg-type]  # the stubs do not know of None
            mutual,
        )

    def _configuration(self, mutual: bool) -> grpc.ServerCertificateConfiguration:
        pairs = [(self._identity.server_key_pem, self._identity.server_chain_pem)]
        roots = self._identity.certificate_pem.encode() if mutual else None
        return grpc.ssl_server_certificate_configuration(pairs, roots)


def _server() -> grpc.aio.Server:
    return grpc.aio.server(options=_OPTIONS)


def _bind(server: grpc.aio.Server, host: str, port: int, section: str, credentials: grpc.ServerCredentials) -> int:
    """The port that was bound; raises PORT_IN_USE when somebody was faster."""
    try:
        return server.add_secure_port(target(host, port), credentials)
    except RuntimeError as error:
        raise in_use(host, port, section) from error
