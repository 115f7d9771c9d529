"""Adapters on their way down and updates on their way up, piece by piece; no payload is ever whole in memory."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, TypeVar

from glora.v1 import coordinator_pb2
from glora_server.coordinator.messages import OpenAdapter, UploadHeader, UploadStatus
from glora_server.rpc import requests
from glora_server.rpc.edge import Context, Edge
from glora_server.rpc.services import UploadStream
from glora_wire import digests
from glora_wire.chunks import Chunk
from glora_wire.errors import GloraError, Reason
from glora_wire.streams import MAX_CHUNK_BYTES, StreamAssembler

_CHECK_SECONDS: Final = 1.0
"""A transfer asks this often whether its device may still work."""

T = TypeVar("T")
Part = Chunk | coordinator_pb2.PushUpdateRequest
Counter = Callable[[int], None]
"""Told the length of every chunk that went through."""


class Guard:
    """Asks during a long transfer whether its device was suspended or revoked meanwhile."""

    def __init__(self, edge: Edge, context: Context) -> None:
        self._edge = edge
        self._context = context
        self._checked_at = time.monotonic()

    async def check(self) -> None:
        """Return when the device may go on; raises DEVICE_REVOKED and its like; asks at most once a second."""
        if time.monotonic() - self._checked_at >= _CHECK_SECONDS:
            await self.check_now()

    async def check_now(self) -> None:
        """As `check`, and asks in any case."""
        await self._edge.identify(self._context)
        self._checked_at = time.monotonic()


class Download:
    """One PullAdapter stream."""

    def __init__(self, context: Context, guard: Guard, *, reading: Executor, stall_seconds: float) -> None:
        self._context = context
        self._guard = guard
        self._reading = reading
        self._stall_seconds = stall_seconds

    async def send(self, adapter: OpenAdapter, offset: int, sent: Counter) -> None:
        """Write header, the chunks from byte `offset` on, and trailer; raises OFFSET_INVALID."""
        order = StreamAssembler()
        order.header(adapter.digest, offset)
        digest = digests.to_proto(adapter.digest)
        header = coordinator_pb2.PullHeader(digest=digest, adapter_config_json=adapter.adapter_config_json)
        await self._write(coordinator_pb2.PullAdapterResponse(header=header))
        async with self._opened(adapter.path) as descriptor:
            while order.position < adapter.digest.size:
                await self._guard.check()
                await self._send_piece(order, descriptor, sent)
        await self._write(coordinator_pb2.PullAdapterResponse(trailer=coordinator_pb2.Trailer(digest=digest)))

    async def _send_piece(self, order: StreamAssembler, descriptor: int, sent: Counter) -> None:
        position = order.position
        wanted = min(MAX_CHUNK_BYTES, order.digest.size - position)
        data = await self._in_thread(lambda: os.pread(descriptor, wanted, position))
        if len(data) < wanted:
            raise RuntimeError(f"an adapter ends after {position + len(data)} of {order.digest.size} bytes")
        order.chunk(position, len(data))
        await self._write(Chunk(position, data))
        sent(len(data))

    async def _write(self, message: Chunk | coordinator_pb2.PullAdapterResponse) -> None:
        async with _within(self._stall_seconds, "The device took nothing"):
            await self._context.write(message)

    @asynccontextmanager
    async def _opened(self, path: Path) -> AsyncIterator[int]:
        descriptor = await self._in_thread(lambda: os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._reading, work)


class Incoming:
    """The parts of one PushUpdate stream, in the order in which the protocol wants them."""

    def __init__(self, parts: AsyncIterator[Part], guard: Guard, *, stall_seconds: float) -> None:
        self._parts = parts
        self._guard = guard
        self._stall_seconds = stall_seconds

    async def header(self) -> coordinator_pb2.PushHeader:
        """The first part; raises STREAM_MALFORMED when it is no header."""
        part = await self._next()
        if part is None or isinstance(part, Chunk) or part.WhichOneof("part") != "header":
            found = "nothing" if part is None else "a chunk" if isinstance(part, Chunk) else part.WhichOneof("part")
            raise GloraError(
                Reason.STREAM_MALFORMED,
                f"The stream began with {found or 'an empty part'}; it must begin with a header.",
            )
        return part.header

    async def receive(self, header: UploadHeader, session: UploadStream, received: Counter) -> UploadStatus:
        """Hand chunks to the session one at a time until the trailer; the session's verdict.

        Raises what StreamAssembler raises, UPLOAD_TRUNCATED when the stream ends early, and what the session raises.
        """
        order = StreamAssembler()
        order.header(header.digest, header.offset)
        while (part := await self._next()) is not None:
            if isinstance(part, Chunk):
                order.chunk(part.offset, len(part.data))
                await self._guard.check()
                received(len(part.data))  # first, for a stream may end while its chunk is on the way to the disk
                await session.chunk(part.offset, part.data)
                continue
            match part.WhichOneof("part"):
                case "trailer":
                    order.trailer(requests.trailer_digest(part.trailer))
                    await self._guard.check_now()
                    return await session.finish(header.digest)
                case "header":
                    order.header(header.digest, header.offset)
                case _:
                    raise GloraError(Reason.STREAM_MALFORMED, "A part came that is no header, chunk or trailer.")
        raise GloraError(
            Reason.UPLOAD_TRUNCATED,
            f"The stream ended without a trailer after byte {order.position} of {header.digest.size}; resume there.",
            position=order.position,
            size=header.digest.size,
        )

    async def _next(self) -> Part | None:
        async with _within(self._stall_seconds, "The device sent nothing"):
            return await anext(self._parts, None)


@asynccontextmanager
async def _within(seconds: float, what: str) -> AsyncIterator[None]:
    """Raises UPLOAD_TRUNCATED when the body takes longer: a peer that hangs must not hold its place for ever."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as error:
        raise GloraError(
            Reason.UPLOAD_TRUNCATED, f"{what} for {seconds:g} seconds, so the transfer was ended; resume it."
        ) from error
