"""Drops what crashes left on disk: blobs that no row names, partial uploads of assignments that are over."""

from __future__ import annotations

import asyncio
from pathlib import Path

import structlog

from glora_server.coordinator.ports import Blobs, Store, UnitOfWork
from glora_server.coordinator.workspace import Workspace
from glora_server.rounds.ids import AssignmentId
from glora_wire.errors import GloraError

log = structlog.get_logger(__name__)


async def sweep(store: Store, blobs: Blobs, workspace: Workspace) -> None:
    """Clean up; only before the server takes uploads, because a file in the making has no row yet."""
    named = await store.read(lambda uow: uow.uploads.digests() | uow.versions.readout_digests())
    orphans = await asyncio.to_thread(lambda: [digest for digest in blobs.stored() if digest.text not in named])
    for digest in orphans:
        await asyncio.to_thread(blobs.delete, digest)
    partials = await asyncio.to_thread(lambda: list(workspace.spool.iterdir()))
    stale = await store.read(lambda uow: [path for path in partials if _is_over(uow, path)])
    for path in stale:
        await asyncio.to_thread(path.unlink)
    if orphans or stale:
        log.info("swept", blobs=len(orphans), partial_uploads=len(stale))


def _is_over(uow: UnitOfWork, path: Path) -> bool:
    """Whether the partial upload belongs to nothing that is still open."""
    try:
        return not uow.rounds.assignment(AssignmentId(path.name.partition(".")[0])).is_open
    except GloraError:
        return True
