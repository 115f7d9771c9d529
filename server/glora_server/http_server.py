"""The HTTP port: its socket, its certificate, and uvicorn behind it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog
import uvicorn
from starlette.types import ASGIApp

from glora_server.security.authority import FileAuthority
from glora_server.settings_sections import HttpSettings
from glora_wire.errors import GloraError, Reason

log = structlog.get_logger(__name__)

CA_FILE: Final = "ca.crt"
"""In the data folder: the authority's certificate without its key, for those who are to trust this server."""
_LOOK_SECONDS: Final = 60.0


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Where certificate and key lie; both may be in one file."""

    certificate: Path
    key: Path

    @classmethod
    def of(cls, settings: HttpSettings, data_dir: Path, authority: FileAuthority) -> TlsFiles | None:
        """The files that the settings ask for; None without encryption. Writes the authority's certificate."""
        if settings.tls == "own":
            (data_dir / CA_FILE).write_text(authority.certificate_pem, encoding="ascii")
            return cls(authority.server_file, authority.server_file)
        if settings.tls == "files":
            return cls(Path(settings.certificate).expanduser(), Path(settings.key).expanduser())
        return None

    def context(self) -> ssl.SSLContext:
        """What TLS needs; raises SETTINGS_INVALID when the files cannot be used."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        try:
            self.load(context)
        except (OSError, ssl.SSLError) as error:
            raise GloraError(
                Reason.SETTINGS_INVALID,
                f"http.certificate {self.certificate} and http.key {self.key} cannot be used: {error}. They must be "
                "PEM files that belong together and that this user can read, the key without a password.",
            ) from error
        return context

    def load(self, context: ssl.SSLContext) -> None:
        """Use the files as they are now, from the next connection on; raises OSError, ssl.SSLError."""
        # With a password to ask for, OpenSSL would wait at the terminal.
        context.load_cert_chain(self.certificate, self.key, password=lambda: "")

    def stamp(self) -> tuple[int, ...]:
        """Changes when one of the files does; raises OSError."""
        return tuple(path.stat().st_mtime_ns for path in (self.certificate, self.key))


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; raises PORT_IN_USE."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise GloraError(
            Reason.PORT_IN_USE,
            f"HTTP cannot listen on {host}:{port}: {error.strerror}. Stop what uses the port, or set http.port.",
            port=port,
        ) from error
    listener.setblocking(False)
    return listener


@contextlib.asynccontextmanager
async def serving(
    app: ASGIApp, listener: socket.socket, files: TlsFiles | None, *, proxies: tuple[str, ...]
) -> AsyncIterator[None]:
    """Serve the application while the context is open; certificates that are renewed are read again."""
    context = None if files is None else files.context()
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="on",
        timeout_graceful_shutdown=3,
        server_header=False,
        # Nobody's word on addresses counts but that of proxies that the settings name.
        proxy_headers=bool(proxies),
        forwarded_allow_ips=list(proxies),
        ssl_context_factory=None if context is None else lambda _config, _default: context,
    )
    server = _QuietServer(config)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    task.add_done_callback(lambda _: server.tried.set())
    await server.tried.wait()
    if not server.started:
        await task
        raise GloraError(Reason.INTERNAL, "The HTTP port could not begin to serve; the log says why just before this.")
    renewing = None if context is None or files is None else asyncio.create_task(_renew(files, context))
    try:
        yield
    finally:
        if renewing is not None:
            renewing.cancel()
            await asyncio.gather(renewing, return_exceptions=True)
        server.should_exit = True
        await task


async def _renew(files: TlsFiles, context: ssl.SSLContext) -> None:
    """Load the files again whenever they change, until cancelled; new ones that are broken leave the old in use."""
    known = await asyncio.to_thread(files.stamp)
    while True:
        await asyncio.sleep(_LOOK_SECONDS)
        try:
            now = await asyncio.to_thread(files.stamp)
            if now == known:
                continue
            known = now
            await asyncio.to_thread(files.load, context)
        except (OSError, ssl.SSLError) as error:
            log.error("certificate_unusable", path=str(files.certificate), error=str(error))
        else:
            log.info("certificate_renewed", path=str(files.certificate))


def address(host: str, port: int, *, encrypted: bool) -> str:
    """The address that people open on the server's own machine."""
    shown = {"0.0.0.0": "localhost", "::": "localhost"}.get(host, host)  # noqa: S104 - shown, not listened on
    name = f"[{shown}]" if ":" in shown else shown
    return f"{'https' if encrypted else 'http'}://{name}:{port}"


def first_password(settings: HttpSettings) -> str:
    """The password of the first admin that the settings name; empty: they name none; raises SETTINGS_INVALID."""
    if not settings.admin_password_file:
        return settings.admin_password.get_secret_value()
    path = Path(settings.admin_password_file).expanduser()
    try:
        text = path.read_text(encoding="utf-8").strip(os.linesep)
    except (OSError, UnicodeDecodeError) as error:
        raise GloraError(Reason.SETTINGS_INVALID, f"http.admin_password_file {path} cannot be read: {error}.") from None
    if not text:
        raise GloraError(Reason.SETTINGS_INVALID, f"http.admin_password_file {path} is empty.")
    return text


class _QuietServer(uvicorn.Server):
    """uvicorn without signal handlers of its own: this process has one place that decides when to stop."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.tried = asyncio.Event()
        """Set when it has started, or could not (`started` says which)."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().startup(sockets)
        except SystemExit:  # what uvicorn does where an application cannot start; `serving` says it in words
            self.should_exit = True
        self.tried.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
