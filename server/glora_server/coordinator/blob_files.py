"""Blobs as local files, without making the event loop wait for the disk."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

from glora_server.coordinator.ports import Blobs
from glora_wire.digests import Digest


@asynccontextmanager
async def local_file(blobs: Blobs, digest: Digest) -> AsyncIterator[Path]:
    """A local path with the content while the context is open; raises FileNotFoundError."""
    stack = ExitStack()
    path = await asyncio.to_thread(stack.enter_context, blobs.local(digest))
    try:
        yield path
    finally:
        await asyncio.to_thread(stack.close)


async def delete_all(blobs: Blobs, digests: Iterable[Digest]) -> None:
    """Remove the contents."""
    for digest in digests:
        await asyncio.to_thread(blobs.delete, digest)
