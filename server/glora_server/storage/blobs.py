"""Blobs: files under the name of their content, in a local folder or in whatever fsspec can reach.

    <root>/<algorithm>/<first two hex digits>/<hex>-<size>

A local blob appears by a rename on its own file system, after its bytes are on the disk: it is there whole or not at
all, also after a power cut. Elsewhere a blob is uploaded and its size compared; object stores show an object when it
is complete.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import fsspec  # type: ignore[import-untyped]

from glora_server.storage.errors import disk_trouble
from glora_wire.digests import Digest, HashAlgorithm, digest_file
from glora_wire.errors import GloraError, Reason

CACHE_BYTES: Final = 4 * 1024**3
"""How much of a remote store is kept in the local cache."""
_NAME: Final = re.compile(r"(?P<hex>[0-9a-f]{64})-(?P<size>[0-9]+)")
_LOCAL: Final = frozenset({"file", "local"})


class FsspecBlobs:
    """The port `Blobs` over a folder or an fsspec URL (`s3://bucket/prefix`); blocks, may be called from any thread.

    `cache` is a local folder for copies of remote blobs; a local root does not use it.
    """

    def __init__(self, root: str | Path, cache: Path, *, cache_bytes: int = CACHE_BYTES) -> None:
        self._where = str(root)
        self._folder = _local_folder(root)
        self._cache = _Cache(cache, cache_bytes)
        self._files: Any = None
        if self._folder is None:
            self._files, self._prefix = _remote(str(root))
        else:
            with self._troubles():
                self._folder.mkdir(parents=True, exist_ok=True)

    def adopt(self, path: Path, digest: Digest) -> None:
        """Move a finished local file into the store; raises DIGEST_MISMATCH when its size is not that of the digest.

        The hash is not computed again. Raises STORAGE_FULL, DATA_DIR_UNUSABLE.
        """
        size = path.stat().st_size
        if size != digest.size:
            raise _mismatch(digest, size)
        with self._troubles():
            if self._folder is not None:
                _move_in(path, self._folder / _key(digest))
                return
            self._files.put_file(str(path), self._remote_path(digest))
            stored = int(self._files.info(self._remote_path(digest))["size"])
            if stored != digest.size:
                raise _mismatch(digest, stored)
            path.unlink()

    @contextlib.contextmanager
    def local(self, digest: Digest) -> Iterator[Path]:
        """A local path with the content while the context is open; raises FileNotFoundError, DIGEST_MISMATCH."""
        if self._folder is not None:
            path = self._folder / _key(digest)
            size = path.stat().st_size
            if size != digest.size:
                raise _mismatch(digest, size)
            yield path
            return
        with self._cache.using(digest) as cached:
            with self._troubles():
                self._cache.fill(digest, lambda part: self._files.get_file(self._remote_path(digest), str(part)))
            yield cached

    def exists(self, digest: Digest) -> bool:
        """Whether the content is there."""
        if self._folder is not None:
            return (self._folder / _key(digest)).is_file()
        self._files.invalidate_cache()
        return bool(self._files.isfile(self._remote_path(digest)))

    def delete(self, digest: Digest) -> None:
        """Remove; harmless when it is not there. Whoever has it open reads on."""
        with self._troubles(), contextlib.suppress(FileNotFoundError):
            if self._folder is not None:
                (self._folder / _key(digest)).unlink()
                return
            self._cache.drop(digest)
            self._files.rm_file(self._remote_path(digest))

    def stored(self) -> Iterator[Digest]:
        """Every content that is there; files that are not blobs are passed over."""
        for algorithm in HashAlgorithm:
            for name in self._names(algorithm):
                match = _NAME.fullmatch(name)
                if match is not None:
                    yield Digest(algorithm, bytes.fromhex(match["hex"]), int(match["size"]))

    def _names(self, algorithm: HashAlgorithm) -> Iterator[str]:
        if self._folder is not None:
            yield from (path.name for path in (self._folder / algorithm.value).glob("??/*"))
            return
        self._files.invalidate_cache()
        found: list[str] = self._files.find(f"{self._prefix}/{algorithm.value}")
        yield from (path.rpartition("/")[2] for path in found)

    def _remote_path(self, digest: Digest) -> str:
        return f"{self._prefix}/{_key(digest)}"

    @contextlib.contextmanager
    def _troubles(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            instead = disk_trouble(error, self._where)
            if instead is error:
                raise
            raise instead from error


class _Cache:
    """Local copies of remote blobs: verified once, used by many, the longest unused ones dropped first."""

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder = folder
        self._limit = limit
        self._users: Counter[Path] = Counter()
        self._lock = threading.Lock()
        self._filling = threading.Lock()

    @contextlib.contextmanager
    def using(self, digest: Digest) -> Iterator[Path]:
        """The path of the copy, which is not dropped while the context is open (it may not be there yet)."""
        path = self._folder / _key(digest)
        with self._lock:
            self._users[path] += 1
        try:
            yield path
        finally:
            with self._lock:
                self._users[path] -= 1
                if not self._users[path]:
                    del self._users[path]
            self._shrink()

    def fill(self, digest: Digest, download: Callable[[Path], object]) -> None:
        """Make the copy with `download(part: Path)` unless it is there; raises DIGEST_MISMATCH for other content.

        One at a time: what many devices ask for at once is downloaded once.
        """
        path = self._folder / _key(digest)
        with self._filling:
            if path.is_file() and path.stat().st_size == digest.size:
                os.utime(path)
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f".{path.name}.{uuid4().hex}")
            try:
                download(part)
                if digest_file(part, digest.algorithm) != digest:
                    raise _mismatch(digest, part.stat().st_size)
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)

    def drop(self, digest: Digest) -> None:
        """Forget the copy."""
        (self._folder / _key(digest)).unlink(missing_ok=True)

    def _shrink(self) -> None:
        with self._lock:
            copies = [(path, path.stat()) for path in self._folder.glob("*/??/[0-9a-f]*") if path.is_file()]
            size = sum(stat.st_size for _, stat in copies)
            for path, stat in sorted(copies, key=lambda copy: copy[1].st_mtime):
                if size <= self._limit:
                    break
                if path not in self._users:
                    path.unlink(missing_ok=True)
                    size -= stat.st_size


def _key(digest: Digest) -> str:
    return f"{digest.algorithm.value}/{digest.hex[:2]}/{digest.hex}-{digest.size}"


def _local_folder(root: str | Path) -> Path | None:
    """The folder that `root` names; None when it is a URL of something else."""
    if isinstance(root, Path):
        return root
    scheme, separator, rest = root.partition("://")
    if not separator:
        return Path(root)
    return Path(rest) if scheme in _LOCAL else None


def _remote(url: str) -> tuple[Any, str]:
    """The file system of `url` and the prefix inside it; raises DATA_DIR_UNUSABLE when it cannot be used."""
    try:
        files, prefix = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise GloraError(
            Reason.DATA_DIR_UNUSABLE,
            f"The blob store {url} cannot be used: {error}. For S3: pip install 'glora[s3]'.",
        ) from error
    return files, str(prefix).rstrip("/")


def _move_in(path: Path, target: Path) -> None:
    """Rename `path` to `target`, both the bytes and the names on the disk before this returns."""
    _sync(path)
    if not target.parent.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        _sync(target.parent.parent)
        _sync(target.parent.parent.parent)
    try:
        path.replace(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        _copy_in(path, target)
    _sync(target.parent)


def _copy_in(path: Path, target: Path) -> None:
    """The same from another file system: a copy beside the target, then the rename."""
    part = target.with_name(f".{target.name}.{uuid4().hex}")
    try:
        shutil.copyfile(path, part)
        _sync(part)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    path.unlink()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _mismatch(digest: Digest, size: int) -> GloraError:
    return GloraError(
        Reason.DIGEST_MISMATCH,
        f"The content {digest.text} is damaged: {size} bytes instead of {digest.size}, or other bytes.",
        digest=digest.text,
        size=size,
    )
