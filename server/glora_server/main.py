"""Reads settings, wires the parts, serves until told to stop: the one place that sees every part."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Final

import structlog

from glora_dashboard.api import create_app
from glora_dashboard.gate import GateRules
from glora_dashboard.ports import HealthCheck
from glora_server.config import Settings, prepare_data_dir
from glora_server.coordinator.access import Access, SessionTimes
from glora_server.coordinator.access_users import FIRST_ADMIN
from glora_server.coordinator.answers import AnswerBook
from glora_server.coordinator.catalogue import Catalogue
from glora_server.coordinator.commands import Commands
from glora_server.coordinator.device_service import DeviceService
from glora_server.coordinator.engine import Engine
from glora_server.coordinator.enrolment import EnrolmentService
from glora_server.coordinator.exports import Exporter
from glora_server.coordinator.folding import Folder
from glora_server.coordinator.hub import Hub
from glora_server.coordinator.judging import Judge
from glora_server.coordinator.opening import Opener
from glora_server.coordinator.ports import UnitOfWork
from glora_server.coordinator.queries import Queries
from glora_server.coordinator.readouts import Readouts
from glora_server.coordinator.starting import RunStarter
from glora_server.coordinator.sweeping import sweep
from glora_server.coordinator.upload_session import Places
from glora_server.coordinator.uploads import UploadService
from glora_server.coordinator.views import SystemView
from glora_server.coordinator.views_history import DeviceCounts
from glora_server.coordinator.workspace import Workspace
from glora_server.engines.local import LocalEngine
from glora_server.http_server import TlsFiles, address, first_password, listen, serving
from glora_server.rounds.run import RunPhase
from glora_server.rpc.server import GrpcServers
from glora_server.rpc.services import RpcSettings, UseCases
from glora_server.security.admin_token import AdminToken
from glora_server.security.authority import FileAuthority
from glora_server.security.passwords import Argon2Passwords
from glora_server.security.rate import RateLimiter
from glora_server.storage import migrate
from glora_server.storage.blobs import FsspecBlobs
from glora_server.storage.store import SqlStore
from glora_server.telemetry.logging import configure_logging
from glora_server.telemetry.metrics import Metrics
from glora_wire.buffers import keep_buffers
from glora_wire.errors import GloraError

log = structlog.get_logger(__name__)

_LOOK_AT_CERTIFICATE_SECONDS: Final = 86400.0
_ARENAS: Final = 2
"""Heaps that all threads share; with one for each, eight devices that send 67 MB raised the peak by another 70 MB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """Everything between the edges and the database."""

    store: SqlStore
    blobs: FsspecBlobs
    workspace: Workspace
    numerics: LocalEngine
    authority: FileAuthority
    hub: Hub
    places: Places
    data_dir: Path
    engine: Engine
    opener: Opener
    devices: DeviceService
    uploads: UploadService
    enrolment: EnrolmentService
    commands: Commands
    queries: Queries
    access: Access
    answers: AnswerBook
    passwords: Argon2Passwords


class Server:
    """A whole server in this process; `async with` starts and stops it."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._started_at = time.time()
        self._stack = contextlib.AsyncExitStack()
        self.metrics = Metrics()
        self.services: Services
        self.grpc: GrpcServers
        self.http_port = 0
        self.first_admin_password: str | None = None
        """Set at the first start, when it was made up; to be shown once."""

    @property
    def http_url(self) -> str:
        """Where people on this machine open the server."""
        http = self._settings.http
        return address(http.host, self.http_port, encrypted=http.tls != "off")

    async def __aenter__(self) -> Server:
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def _start(self) -> None:
        settings = self._settings
        http_socket = listen(settings.http.host, settings.http.port)
        self._stack.callback(http_socket.close)
        self.http_port = http_socket.getsockname()[1]
        services = self.services = self._wire()
        self._stack.push_async_callback(services.store.close)
        self._stack.push_async_callback(services.numerics.close)
        self._stack.callback(services.passwords.close)
        self.first_admin_password = await services.access.ensure_admin(first_password(settings.http))
        await sweep(services.store, services.blobs, services.workspace)
        await services.engine.start()
        self._stack.push_async_callback(services.engine.close)
        await services.opener.start()
        self._stack.push_async_callback(services.opener.close)
        self.grpc = self._grpc(services)
        await self.grpc.start()
        self._stack.push_async_callback(self.grpc.stop)
        await self._stack.enter_async_context(self._http(services, http_socket))
        await self._stack.enter_async_context(_background(self._warm_up(services)))
        await self._stack.enter_async_context(_background(self.metrics.watch(services)))
        await self._stack.enter_async_context(_background(_renew_certificate(services.authority, self.grpc)))

    def _wire(self) -> Services:
        """The parts, each with what it needs."""
        settings = self._settings
        data = settings.data_dir
        workspace = Workspace(data)
        workspace.prepare()
        authority = FileAuthority.open(
            data / "authority",
            (*settings.grpc.public_names, *settings.http.public_names),
            device_lifetime=timedelta(days=settings.security.certificate_days),
        )
        store = SqlStore.open(settings.database_url, observer=self.metrics)
        blobs = FsspecBlobs(settings.blobs.url or data / "blobs", cache=data / "cache")
        worker = settings.worker
        numerics = LocalEngine(device=worker.device, threads=worker.threads)
        hub = Hub()
        self.metrics.hub = hub
        places = Places(settings.grpc.max_concurrent_uploads)
        engine = Engine(store=store, hub=hub, observer=self.metrics)
        opener = Opener(store=store, hub=hub, engine=engine)
        catalogue = Catalogue(numerics)
        readouts = Readouts(store=store, blobs=blobs, numerics=numerics, workspace=workspace)
        Judge(
            store=store,
            blobs=blobs,
            numerics=numerics,
            readouts=readouts,
            catalogue=catalogue,
            engine=engine,
            observer=self.metrics,
        )
        Folder(
            store=store,
            blobs=blobs,
            numerics=numerics,
            readouts=readouts,
            catalogue=catalogue,
            engine=engine,
            hub=hub,
            observer=self.metrics,
        )
        passwords = Argon2Passwords()
        return Services(
            store=store,
            blobs=blobs,
            workspace=workspace,
            numerics=numerics,
            authority=authority,
            hub=hub,
            places=places,
            data_dir=data,
            engine=engine,
            opener=opener,
            devices=DeviceService(
                store=store, engine=engine, opener=opener, hub=hub, readouts=readouts, catalogue=catalogue
            ),
            uploads=UploadService(
                store=store,
                blobs=blobs,
                engine=engine,
                hub=hub,
                catalogue=catalogue,
                workspace=workspace,
                places=places,
            ),
            enrolment=EnrolmentService(store=store, authority=authority, hub=hub, clock=engine.clock),
            commands=Commands(
                store=store,
                engine=engine,
                opener=opener,
                hub=hub,
                authority=authority,
                starter=RunStarter(store=store, numerics=numerics, clock=engine.clock),
                exporter=Exporter(store=store, readouts=readouts),
                clock=engine.clock,
            ),
            answers=AnswerBook(store=store, clock=engine.clock),
            access=Access(
                observer=self.metrics,
                store=store,
                passwords=passwords,
                clock=engine.clock,
                admin_token=AdminToken.open(data).matches,
                times=SessionTimes(
                    absolute=settings.http.session_hours * 3600, idle=settings.http.session_idle_hours * 3600
                ),
            ),
            passwords=passwords,
            queries=Queries(
                store=store, hub=hub, clock=engine.clock, catalogue=catalogue, system_view=self._system_view
            ),
        )

    def _grpc(self, services: Services) -> GrpcServers:
        settings = self._settings
        return GrpcServers(
            RpcSettings(
                host=settings.grpc.host,
                port=settings.grpc.port,
                enrolment_host=settings.enrolment.host,
                enrolment_port=settings.enrolment.port,
                public_host=settings.grpc.public_host,
                poll_min_seconds=settings.grpc.wait_seconds_min,
                poll_max_seconds=settings.grpc.wait_seconds_max,
            ),
            services.authority,
            UseCases(devices=services.devices, uploads=services.uploads, enrolment=services.enrolment),
            limit=RateLimiter(),
            observer=self.metrics,
        )

    @contextlib.asynccontextmanager
    async def _http(self, services: Services, listener: socket.socket) -> AsyncIterator[None]:
        settings = self._settings
        app = create_app(
            services.commands,
            services.queries,
            access=services.access,
            rules=GateRules.of(
                (*settings.http.public_names, *settings.grpc.public_names, socket.gethostname()),
                metrics_open=settings.http.metrics_for_all,
            ),
            health=_Health(services, self.grpc),
            answers=services.answers,
            metrics_text=self.metrics.text,
            work_dir=settings.data_dir / "scratch",
            with_pages=True,
        )
        files = TlsFiles.of(settings.http, settings.data_dir, services.authority)
        async with serving(self.metrics.web(app), listener, files, proxies=settings.http.proxies):
            yield

    async def _warm_up(self, services: Services) -> None:
        """Start the worker, so that the first round does not wait for it."""
        try:
            await services.numerics.start()
        except GloraError as error:
            log.error("worker_cannot_start", reason=str(error.reason), message=error.message)
        else:
            log.info("worker_started", device=services.numerics.device)

    def _system_view(self, uow: UnitOfWork, devices: DeviceCounts) -> SystemView:
        settings, services, now = self._settings, self.services, time.time()
        disk = shutil.disk_usage(settings.data_dir)
        return SystemView(
            version=installed_version("glora"),
            started_at=self._started_at,
            now=now,
            grpc_port=self.grpc.port,
            enrolment_port=self.grpc.enrolment_port,
            http_port=self.http_port,
            database=settings.database_url.partition(":")[0].partition("+")[0],
            database_revision=migrate.head(),
            worker_device=services.numerics.device,
            authority_pin=services.authority.pin,
            authority_expires_at=services.authority.expires_at,
            renewal_overdue_seconds=services.authority.renewal_overdue_seconds,
            devices=devices.total,
            online_devices=devices.online,
            active_runs=sum(run.phase is RunPhase.ACTIVE for run in uow.runs.active()),
            free_disk_bytes=disk.free,
            disk_bytes=disk.total,
            worker_restarts=services.numerics.stats().restarts,
        )


@dataclass(frozen=True, slots=True)
class _Health:
    """What /readyz asks."""

    services: Services
    grpc: GrpcServers

    async def check(self) -> tuple[HealthCheck, ...]:
        try:
            await asyncio.wait_for(self.services.store.check(), 1.0)
            database = HealthCheck(name="database", ok=True)
        except (GloraError, TimeoutError) as error:
            database = HealthCheck(name="database", ok=False, message=str(error) or "it does not answer")
        device = self.services.numerics.device
        worker = HealthCheck(name="worker", ok=bool(device), message=device or "the numerics worker is not running")
        ports = HealthCheck(name="ports", ok=self.grpc.port > 0, message=f"gRPC {self.grpc.port}")
        return database, worker, ports


async def _renew_certificate(authority: FileAuthority, grpc: GrpcServers) -> None:
    """Put another certificate in use long before the server's ends, until cancelled; HTTP watches the file itself."""
    while True:
        await asyncio.sleep(_LOOK_AT_CERTIFICATE_SECONDS)
        try:
            if await asyncio.to_thread(authority.renew_server):
                grpc.renew_certificate()
        except GloraError as error:
            log.error("certificate_not_renewed", error=error.message)


@contextlib.asynccontextmanager
async def _background(work: Coroutine[object, object, None]) -> AsyncIterator[None]:
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _serve(settings: Settings) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    async with Server(settings) as server:
        log.info(
            "server_ready",
            grpc_port=server.grpc.port,
            enrolment_port=server.grpc.enrolment_port,
            http=server.http_url,
            data_dir=str(settings.data_dir),
        )
        # What is there now stays: the collector need not walk through it again in every round.
        gc.collect()
        gc.freeze()
        if server.first_admin_password is not None:
            _show_first_password(server.http_url, server.first_admin_password)
        await stop.wait()
        log.info("server_stops")


def _show_first_password(url: str, password: str) -> None:
    """Tell who started the server how to sign in; never again, and past the log, which masks passwords."""
    sys.stderr.write(
        f"\n    Sign in at {url}\n"
        f"        user name  {FIRST_ADMIN}\n"
        f"        password   {password}\n"
        f"    This is shown once. Lost? On this machine: glora user set-password {FIRST_ADMIN}\n\n"
    )
    sys.stderr.flush()


def serve(settings: Settings) -> None:
    """Serve until SIGINT or SIGTERM; raises GloraError when the server cannot start."""
    configure_logging(settings.log.format, settings.log.level)
    keep_buffers(arenas=_ARENAS)
    prepare_data_dir(settings.data_dir)
    _load_pages(settings.data_dir)
    asyncio.run(_serve(settings))


def _load_pages(data_dir: Path) -> None:
    """Import what the pages need: NiceGUI wants to be there before an event loop, and reads where it may write."""
    os.environ.setdefault("NICEGUI_STORAGE_PATH", str(data_dir / "scratch" / "nicegui"))
    importlib.import_module("glora_dashboard.pages.mounting")
