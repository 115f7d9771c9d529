"""Partial uploads on disk: a file whose size is what was committed, and the running hash over it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from glora_wire.digests import Digest, Hasher, hasher
from glora_wire.errors import GloraError, Reason

_READ_BYTES = 1024 * 1024


@dataclass(slots=True, kw_only=True)
class Spool:
    """An open partial upload; only its session touches it."""

    path: Path
    descriptor: int
    hash: Hasher
    size: int

    def write(self, data: bytes | memoryview) -> None:
        """Append; raises OSError when the disk does not take it."""
        self.hash.update(data)
        view = memoryview(data)
        while view:
            view = view[os.write(self.descriptor, view) :]
        self.size += len(data)


def open_spool(path: Path, digest: Digest, offset: int) -> Spool:
    """The partial upload at `path`, hashed as far as it goes; raises OFFSET_INVALID when `offset` is not its end."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        size = os.fstat(descriptor).st_size
        if offset != size:
            raise wrong_offset(size)
        spool = Spool(path=path, descriptor=descriptor, hash=hasher(digest.algorithm), size=size)
        position = 0
        while position < size:
            piece = os.pread(descriptor, _READ_BYTES, position)
            spool.hash.update(piece)
            position += len(piece)
    except BaseException:
        os.close(descriptor)
        raise
    return spool


def committed(path: Path) -> int:
    """Bytes of the partial upload that are stored."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def wrong_offset(committed: int) -> GloraError:
    """The error for a stream that does not go on where the stored bytes end."""
    return GloraError(
        Reason.OFFSET_INVALID,
        f"{committed} bytes of the update are stored; the stream must go on there.",
        committed_bytes=committed,
    )
