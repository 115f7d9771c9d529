"""Where the server keeps files that are not blobs yet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from glora_wire.digests import Digest


@dataclass(frozen=True, slots=True)
class Workspace:
    """Folders below the data folder, on the same file system as local blobs."""

    root: Path

    @property
    def spool(self) -> Path:
        """Partial uploads; survive restarts."""
        return self.root / "spool"

    @property
    def scratch(self) -> Path:
        """Files in the making; emptied at every start."""
        return self.root / "scratch"

    def prepare(self) -> None:
        """Make the folders and drop what a former process left half made."""
        for folder in (self.spool, self.scratch):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for leftover in self.scratch.iterdir():
            leftover.unlink()

    def partial(self, assignment_id: str, digest: Digest) -> Path:
        """The spool file of one assignment and digest."""
        return self.spool / f"{assignment_id}.{digest.algorithm.value}-{digest.hex}-{digest.size}.part"

    def partials(self, *assignment_ids: str) -> list[Path]:
        """Every spool file of the assignments."""
        return sorted(path for path in self.spool.iterdir() if path.name.partition(".")[0] in assignment_ids)
