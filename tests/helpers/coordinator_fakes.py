"""Small fakes around a real coordinator: a clock, blobs in a folder, an authority, a store that ends the process."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from tiny_numerics import Fuse

from glora_server.coordinator.ports import IssuedCertificate, UnitOfWork
from glora_server.storage.store import SqlStore
from glora_wire.digests import Digest
from glora_wire.errors import GloraError, Reason

T = TypeVar("T")
START = 1_800_000_000.0


class Clock:
    """Unix time that stands still until a test moves it."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> float:
        return self.now


class FolderBlobs:
    """Blobs in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def _path(self, digest: Digest) -> Path:
        return self.folder / digest.text

    def adopt(self, path: Path, digest: Digest) -> None:
        path.replace(self._path(digest))

    @contextlib.contextmanager
    def local(self, digest: Digest) -> Iterator[Path]:
        if not self.exists(digest):
            raise FileNotFoundError(digest.text)
        yield self._path(digest)

    def exists(self, digest: Digest) -> bool:
        return self._path(digest).exists()

    def delete(self, digest: Digest) -> None:
        self._path(digest).unlink(missing_ok=True)

    def stored(self) -> Iterable[Digest]:
        return [Digest.parse(path.name) for path in sorted(self.folder.iterdir())]


class FakeAuthority:
    """Certificates of plain text; a request is "csr KEY"."""

    certificate_pem = "the authority"
    pin = "cd" * 32

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.issued = 0

    def key_of(self, certificate_request_pem: str) -> str:
        word, _, key = certificate_request_pem.partition(" ")
        if word != "csr":
            raise GloraError(Reason.CSR_INVALID, "That is not a request.")
        return hashlib.sha256(key.encode()).hexdigest()

    def issue(self, certificate_request_pem: str, device_id: str, name: str) -> IssuedCertificate:
        self.key_of(certificate_request_pem)
        self.issued += 1
        pem = f"certificate {self.issued} of {device_id} {name}"
        return IssuedCertificate(pem=pem, serial=str(self.issued), expires_at=self._clock() + 1000.0)


class BreakableStore:
    """The store, with the end of the process before or after the next write of some work, by its function's name."""

    def __init__(self, inner: SqlStore, fuse: Fuse) -> None:
        self._inner = inner
        self._fuse = fuse
        self.crash_before = ""
        self.crash_after = ""

    async def write(self, work: Callable[[UnitOfWork], T]) -> T:
        name = getattr(getattr(work, "func", work), "__name__", "")
        if name == self.crash_before:
            self._fuse.blow(name)
        result = await self._inner.write(work)
        if name == self.crash_after:
            self._fuse.blow(name)
        return result

    async def read(self, work: Callable[[UnitOfWork], T]) -> T:
        return await self._inner.read(work)
