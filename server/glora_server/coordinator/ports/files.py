"""Files addressed by their content."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from glora_wire.digests import Digest


class Blobs(Protocol):
    """Files addressed by their content."""

    def adopt(self, path: Path, digest: Digest) -> None:
        """Move a finished, synced local file into the store; harmless when the content is there already."""
        ...

    def local(self, digest: Digest) -> AbstractContextManager[Path]:
        """A local path with the content while the context is open; raises FileNotFoundError."""
        ...

    def exists(self, digest: Digest) -> bool:
        """Whether the content is there."""
        ...

    def delete(self, digest: Digest) -> None:
        """Remove; harmless when it is not there."""
        ...

    def stored(self) -> Iterable[Digest]:
        """Every content that is there (for clean-up)."""
        ...
