"""One stream of one update, from its header to the verdict."""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, Protocol

from glora_server.coordinator.errors import storage_error
from glora_server.coordinator.messages import UploadHeader, UploadStatus
from glora_server.coordinator.spool import Spool, open_spool, wrong_offset
from glora_server.coordinator.workspace import Workspace
from glora_server.rounds.assignment import Assignment
from glora_server.rounds.ids import AssignmentId, RoundId
from glora_wire.digests import Digest
from glora_wire.errors import GloraError, Reason

_SLOW_BYTES_PER_SECOND = 2_000_000
_PROLONG_EVERY_SECONDS = 5.0


class Desk(Protocol):
    """What a session needs of the service that opened it."""

    workspace: Workspace

    async def receive(self, assignment: Assignment, round_id: RoundId, header: UploadHeader, path: Path) -> None:
        """Make the verified file an update of the round, durably; drop it where the round went on without it."""
        ...

    async def verdict(self, assignment_id: AssignmentId, digest: Digest) -> UploadStatus:
        """The answer once the update was judged; "received" when that takes too long."""
        ...

    async def prolong(self, assignment: Assignment, round_id: RoundId) -> None:
        """Keep the device in the round a little longer, where its deadline is near; raises ASSIGNMENT_CLOSED."""
        ...

    def moved(self, assignment: Assignment, done: int, total: int) -> None:
        """Show how far the upload is."""
        ...

    def closed(self, session: UploadSession) -> None:
        """Forget a session that ended."""
        ...


class Places(asyncio.Semaphore):
    """Places for fast streams: how many there are, are taken, and are waited for."""

    def __init__(self, total: int) -> None:
        super().__init__(total)
        self.total = total
        self.used = 0
        self.waiting = 0

    async def acquire(self) -> Literal[True]:
        """Wait for a place."""
        self.waiting += 1
        try:
            taken = await super().acquire()
        finally:
            self.waiting -= 1
        self.used += 1
        return taken

    def release(self) -> None:
        """Give a place back."""
        self.used -= 1
        super().release()


@dataclass(slots=True)
class Place:
    """A place among the fast streams, given back once."""

    places: asyncio.Semaphore
    held: bool = False

    async def take(self) -> None:
        """Wait for a place."""
        await self.places.acquire()
        self.held = True

    def give_back(self) -> None:
        """Let somebody else have it."""
        if self.held:
            self.held = False
            self.places.release()


class UploadSession:
    """One stream of one update."""

    def __init__(
        self, service: Desk, assignment: Assignment, round_id: RoundId, header: UploadHeader, place: Place
    ) -> None:
        self._service = service
        self._round_id = round_id
        self._header = header
        self._place = place
        self._spool: Spool | None = None
        self._working: asyncio.Future[None] | None = None
        self._begun = time.monotonic()
        self._taken = 0
        self._prolonged_at = -math.inf
        self.assignment = assignment
        self._ended: GloraError | None = None
        self.idle = asyncio.Lock()
        """Held while a chunk is being written, so that whoever ends the session can wait for the file."""

    async def wait_for_place(self) -> None:
        """Wait until there is room for one more fast stream."""
        await self._place.take()

    async def begin(self) -> None:
        """Open the spool file and hash what it holds; raises OFFSET_INVALID when the device is wrong about it."""
        async with self.idle:
            await self._unbroken(asyncio.to_thread(self._open_file))

    def _open_file(self) -> None:
        path = self._service.workspace.partial(self.assignment.id, self._header.digest)
        self._spool = open_spool(path, self._header.digest, self._header.offset)

    async def chunk(self, offset: int, data: bytes | memoryview) -> None:
        """Store the next bytes; raises OFFSET_INVALID, UPLOAD_TOO_LARGE, STORAGE_FULL, or why it was ended."""
        async with self.idle:
            spool = self._open_spool()
            if offset != spool.size:
                raise wrong_offset(spool.size)
            if spool.size + len(data) > self._header.digest.size:
                raise GloraError(Reason.UPLOAD_TOO_LARGE, "The update is longer than its header announced.")
            try:
                await self._unbroken(asyncio.to_thread(spool.write, data))
            except OSError as error:
                raise storage_error(error) from error
            self._taken += len(data)
        self._service.moved(self.assignment, spool.size, self._header.digest.size)
        self._make_room()
        await self._prolong()

    async def finish(self, digest: Digest) -> UploadStatus:
        """Check the whole update against `digest`, hand it in, wait for the verdict."""
        self._place.give_back()  # all bytes are here: what gRPC reads ahead is somebody else's now
        async with self.idle:
            spool = self._open_spool()
            if digest != self._header.digest:
                raise GloraError(Reason.STREAM_MALFORMED, "Header and trailer announce different digests.")
            if spool.size < digest.size:
                raise GloraError(
                    Reason.UPLOAD_TRUNCATED,
                    f"The update ended after {spool.size} of {digest.size} bytes; resume it there.",
                    committed_bytes=spool.size,
                )
            if spool.hash.digest() != digest.value:
                await self._drop()
                raise GloraError(
                    Reason.DIGEST_MISMATCH,
                    "The bytes that arrived are not those that were announced; they were dropped, send them again.",
                )
            await self._unbroken(self._hand_in(spool))
            await self.close()
        return await self._service.verdict(self.assignment.id, digest)

    async def _hand_in(self, spool: Spool) -> None:
        try:
            await asyncio.to_thread(os.fsync, spool.descriptor)
        except OSError as error:
            raise storage_error(error) from error
        await self._service.receive(self.assignment, self._round_id, self._header, spool.path)

    async def close(self) -> None:
        """Let go of the file and the place; what was stored stays for the next stream."""
        self._place.give_back()
        if self._working is not None:
            await asyncio.wait({self._working})
        if self._spool is not None:
            spool, self._spool = self._spool, None
            await asyncio.to_thread(os.close, spool.descriptor)
        self._service.closed(self)

    async def end(self, reason: GloraError) -> None:
        """Let the stream fail with `reason`; returns when the file is not touched any more."""
        self._ended = reason
        async with self.idle:
            await self.close()

    async def _unbroken(self, work: Coroutine[object, object, None]) -> None:
        """Do `work` on the file; a stream that is cancelled goes at once, but `close` waits until `work` is done."""
        self._working = asyncio.ensure_future(work)
        await asyncio.shield(self._working)

    async def _drop(self) -> None:
        spool = self._open_spool()
        await self.close()
        await asyncio.to_thread(partial(spool.path.unlink, missing_ok=True))

    def _open_spool(self) -> Spool:
        if self._ended is not None:
            raise self._ended
        if self._spool is None:
            raise GloraError(Reason.STREAM_MALFORMED, "The upload has ended; begin another one.")
        return self._spool

    def _make_room(self) -> None:
        seconds = time.monotonic() - self._begun
        if seconds > 1.0 and self._taken / seconds < _SLOW_BYTES_PER_SECOND:
            self._place.give_back()

    async def _prolong(self) -> None:
        """A transfer that moves keeps its device in the round past the deadline."""
        now = time.monotonic()
        if now - self._prolonged_at > _PROLONG_EVERY_SECONDS:
            self._prolonged_at = now
            await self._service.prolong(self.assignment, self._round_id)
