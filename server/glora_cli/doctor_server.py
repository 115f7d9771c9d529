"""What `glora doctor` looks at where a server runs or is to run: settings, folder, ports, database, certificates."""

from __future__ import annotations

import shutil
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import httpx2
from cryptography import x509
from sqlalchemy.exc import SQLAlchemyError

from glora_cli.doctor import Check, broken, note, ok
from glora_server.config import Settings, prepare_data_dir
from glora_server.storage import migrate
from glora_server.storage.database import connect
from glora_server.storage.errors import unusable
from glora_wire.errors import GloraError

_LITTLE_DISK: Final = 2 * 2**30
_NO_DISK: Final = 200 * 2**20
_SOON_DAYS: Final = 30
_DAY: Final = 86400.0


def check_server(settings: Settings) -> Iterator[Check]:
    """Everything about the server that `settings` describe."""
    yield from check_data_dir(settings.data_dir)
    yield from check_ports(settings)
    yield check_database(settings)
    yield from check_certificates(settings.data_dir / "authority")


def check_data_dir(folder: Path) -> Iterator[Check]:
    """Whether the data folder can be used, is private, and has room."""
    existed = folder.exists()
    try:
        if existed:
            prepare_data_dir(folder)
    except GloraError as error:
        yield broken("data folder", error.message, "then run `glora doctor` again")
        return
    if not existed:
        yield note("data folder", f"{folder} is not there yet; the server makes it at its first start")
    elif stat.S_IMODE(folder.stat().st_mode) & 0o077:
        yield broken("data folder", f"others may look into {folder}", f"chmod 700 {folder}")
    else:
        yield ok("data folder", f"{folder} is writable and private")
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(nearest).free
    sentence = f"{free / 2**30:.1f} GiB free for {folder}"
    if free < _NO_DISK:
        yield broken("disk", sentence, "free some space, or choose another folder with --data-dir")
    elif free < _LITTLE_DISK:
        yield note("disk", sentence, "uploads and versions need room; 2 GiB is little for more than a trial")
    else:
        yield ok("disk", sentence)


def check_ports(settings: Settings) -> Iterator[Check]:
    """Whether the three ports are free, or used by a glora server that runs already."""
    running = _answers(settings.http.host, settings.http.port)
    for name, host, port in (
        ("grpc", settings.grpc.host, settings.grpc.port),
        ("enrolment", settings.enrolment.host, settings.enrolment.port),
        ("http", settings.http.host, settings.http.port),
    ):
        problem = _why_not_free(host, port)
        if problem is None:
            yield ok(f"port {port}", f"free for {name}")
        elif running:
            yield ok(f"port {port}", "used, and a glora server is running here")
        else:
            advice = f"stop what uses it (ss -ltnp 'sport = :{port}'), or set {name}.port"
            yield broken(f"port {port}", f"{name} cannot listen on {host}:{port}: {problem}", advice)


def _why_not_free(host: str, port: int) -> str | None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen(1)
        except OSError as error:
            return error.strerror or str(error)
    return None


def _answers(host: str, port: int) -> bool:
    """Whether a glora server answers at the HTTP port."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104
    try:
        answer = httpx2.get(f"http://{reachable}:{port}/readyz", timeout=2.0, trust_env=False)
        return "checks" in answer.json()
    except (httpx2.HTTPError, ValueError):
        return False


def check_database(settings: Settings) -> Check:
    """Whether the database answers and has the schema of this version."""
    file = settings.data_dir / "glora.sqlite3"
    if not settings.database.url.get_secret_value() and not file.exists():
        return note("database", f"{file} is not there yet; the server makes it at its first start")
    try:
        database = connect(settings.database_url)
    except GloraError as error:
        return broken("database", error.message, "correct database.url")
    try:
        with (database.reader or database.writer).connect() as connection:
            found, head = migrate.current(connection), migrate.head()
    except SQLAlchemyError as error:
        told = unusable(error, database.url_for_log)
        return broken("database", told.message, "start the database, or correct database.url")
    finally:
        database.dispose()
    if found == head:
        return ok("database", f"{database.url_for_log} has schema {found}")
    if found is None:
        return note("database", f"{database.url_for_log} is empty; the server fills it at its first start")
    return note("database", f"{database.url_for_log} has schema {found}, not {head}", "run `glora db upgrade`")


def check_certificates(folder: Path, now: float | None = None) -> Iterator[Check]:
    """Whether the certificates of the authority and of the server are good for a while."""
    moment = time.time() if now is None else now
    for file, name in (("ca.pem", "certificate authority"), ("server.pem", "server certificate")):
        path = folder / file
        if not path.exists():
            yield note(name, f"{path} is not there yet; the server makes it at its first start")
            continue
        try:
            certificate = x509.load_pem_x509_certificate(path.read_bytes())
        except (OSError, ValueError) as error:
            yield broken(name, f"{path} cannot be read: {error}", "restore it from a backup")
            continue
        yield _validity(name, certificate, moment)


def _validity(name: str, certificate: x509.Certificate, moment: float) -> Check:
    begins, ends = certificate.not_valid_before_utc.timestamp(), certificate.not_valid_after_utc.timestamp()
    days = (ends - moment) / _DAY
    if moment < begins:
        return broken(name, "is valid only in the future, so the clock must be wrong", "set the clock")
    if days <= 0:
        return broken(name, f"expired {-days:.0f} days ago", "restart the server, which renews its own; see the guide")
    if days < _SOON_DAYS:
        return note(name, f"expires in {days:.0f} days", "restart the server, which renews its own")
    return ok(name, f"valid for {days:.0f} days")
