"""The order of a transfer, for both sides and both directions: one header, chunks without a gap, one trailer.

    expecting header ──header──▶ expecting chunks ──chunk──▶ expecting chunks ──trailer──▶ done

Nothing here reads or writes: callers tell what arrived, store the bytes, and keep the running hash.
After an error the assembler is broken: the stream is over, what was stored before stays and can be resumed.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Final, NoReturn

from glora_wire.digests import Digest
from glora_wire.errors import GloraError, Reason

MAX_CHUNK_BYTES: Final = 1024 * 1024


class StreamState(Enum):
    """What an assembler waits for."""

    HEADER = "header"
    CHUNKS = "chunks"
    DONE = "done"
    BROKEN = "broken"


class StreamAssembler:
    """Checks that the parts of one stream come in order and add up to the payload that the header announced."""

    def __init__(self, *, max_chunk_bytes: int = MAX_CHUNK_BYTES) -> None:
        self._max_chunk_bytes = max_chunk_bytes
        self._state = StreamState.HEADER
        self._digest: Digest | None = None
        self._position = 0

    @property
    def state(self) -> StreamState:
        """What is expected next."""
        return self._state

    @property
    def position(self) -> int:
        """Bytes of the payload that have been seen, the resumed part included: the offset of the next chunk."""
        return self._position

    @property
    def digest(self) -> Digest:
        """Digest that the header announced; raises ValueError before the header."""
        if self._digest is None:
            raise ValueError("no header has come yet")
        return self._digest

    @property
    def complete(self) -> bool:
        """Whether the trailer has come; only then can the bytes become anything."""
        return self._state is StreamState.DONE

    def header(self, digest: Digest, offset: int = 0, limit: int | None = None) -> None:
        """Open the stream at byte `offset` of the payload `digest`, of at most `limit` bytes (None: no limit).

        Raises GloraError STREAM_MALFORMED, UPLOAD_TOO_LARGE, OFFSET_INVALID.
        """
        if self._state is not StreamState.HEADER:
            self._refuse(Reason.STREAM_MALFORMED, "A second header came; a stream has one, at its beginning.")
        if limit is not None and digest.size > limit:
            self._refuse(
                Reason.UPLOAD_TOO_LARGE,
                f"The header announces {digest.size} bytes; this transfer may have at most {limit}.",
                size=digest.size,
                limit=limit,
            )
        if not 0 <= offset <= digest.size:
            self._refuse(
                Reason.OFFSET_INVALID,
                f"The stream starts at byte {offset} of a payload of {digest.size} bytes; ask where to resume.",
                offset=offset,
                size=digest.size,
            )
        self._digest = digest
        self._position = offset
        self._state = StreamState.CHUNKS

    def chunk(self, offset: int, length: int) -> None:
        """Take note of `length` bytes at `offset`; call before storing them.

        Raises GloraError STREAM_MALFORMED, CHUNK_TOO_LARGE, OFFSET_INVALID, UPLOAD_TOO_LARGE.
        """
        digest = self._open("A chunk")
        if length <= 0:
            self._refuse(Reason.STREAM_MALFORMED, "An empty chunk came; send at least one byte in each.")
        if length > self._max_chunk_bytes:
            self._refuse(
                Reason.CHUNK_TOO_LARGE,
                f"A chunk of {length} bytes came; the largest allowed is {self._max_chunk_bytes}.",
                length=length,
                limit=self._max_chunk_bytes,
            )
        if offset != self._position:
            self._refuse(
                Reason.OFFSET_INVALID,
                f"A chunk came for byte {offset}, but byte {self._position} is next; ask where to resume.",
                offset=offset,
                expected=self._position,
            )
        if offset + length > digest.size:
            self._refuse(
                Reason.UPLOAD_TOO_LARGE,
                f"The chunks reach byte {offset + length}, but the header announced {digest.size} bytes.",
                end=offset + length,
                size=digest.size,
            )
        self._position += length

    def trailer(self, digest: Digest) -> None:
        """Close the stream; raises GloraError STREAM_MALFORMED, UPLOAD_TRUNCATED, DIGEST_MISMATCH."""
        announced = self._open("A trailer")
        if self._position < announced.size:
            self._refuse(
                Reason.UPLOAD_TRUNCATED,
                f"The trailer came after {self._position} of {announced.size} bytes; resume there.",
                position=self._position,
                size=announced.size,
            )
        if digest != announced:
            self._refuse(
                Reason.DIGEST_MISMATCH,
                f"The trailer's digest {digest.text} is not the header's {announced.text}; send again from 0.",
            )
        self._state = StreamState.DONE

    def verify(self, computed: Digest) -> None:
        """Return when the bytes that were stored have the announced digest.

        Raises GloraError DIGEST_MISMATCH, and STREAM_MALFORMED before the trailer.
        """
        if self._state is not StreamState.DONE:
            self._refuse(Reason.STREAM_MALFORMED, "The stream ended without a trailer; resume it.")
        if computed != self.digest:
            self._refuse(
                Reason.DIGEST_MISMATCH,
                f"The bytes that arrived have digest {computed.text}, but {self.digest.text} was announced; "
                "send again from 0.",
            )

    def _open(self, part: str) -> Digest:
        if self._state is StreamState.CHUNKS and self._digest is not None:
            return self._digest
        why = {
            StreamState.DONE: "after the trailer, which ends the stream",
            StreamState.BROKEN: "on a stream that was refused already",
        }.get(self._state, "before the header")
        raise self._broken(Reason.STREAM_MALFORMED, f"{part} came {why}.")

    def _refuse(self, reason: Reason, message: str, **details: object) -> NoReturn:
        raise self._broken(reason, message, **details)

    def _broken(self, reason: Reason, message: str, **details: object) -> GloraError:
        self._state = StreamState.BROKEN
        return GloraError(reason, message, **details)


def file_chunks(path: Path, offset: int = 0, chunk_bytes: int = MAX_CHUNK_BYTES) -> Iterator[tuple[int, bytes]]:
    """The file from byte `offset` on, as (offset, at most `chunk_bytes` bytes); constant memory; raises OSError."""
    if chunk_bytes <= 0 or offset < 0:
        raise ValueError("chunk_bytes must be positive and offset not negative")
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        while data := file.read(chunk_bytes):
            yield offset, data
            offset += len(data)
