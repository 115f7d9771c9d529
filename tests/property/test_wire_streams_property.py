"""Any chunking with any cuts and resumes decodes to the same bytes; any other sequence of chunks is refused."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from glora_wire.digests import HashAlgorithm, digest_bytes
from glora_wire.errors import GloraError, Reason
from glora_wire.streams import StreamAssembler

Chunk = tuple[int, bytes]
MAX_CHUNK = 16

payloads = st.binary(max_size=200)
sizes = st.lists(st.integers(1, MAX_CHUNK), min_size=1, max_size=8)


def cut(data: bytes, sizes: Sequence[int], start: int = 0) -> list[Chunk]:
    """`data` from `start` in chunks whose sizes cycle through `sizes`."""
    chunks: list[Chunk] = []
    while start < len(data):
        size = sizes[len(chunks) % len(sizes)]
        chunks.append((start, data[start : start + size]))
        start += size
    return chunks


def receive(data: bytes, chunks: Sequence[Chunk], stored: bytearray) -> StreamAssembler:
    """A receiver that stores what the assembler lets through, as server and client do."""
    stream = StreamAssembler(max_chunk_bytes=MAX_CHUNK)
    stream.header(digest_bytes(data), len(stored), len(data))
    for offset, piece in chunks:
        stream.chunk(offset, len(piece))
        stored += piece
    return stream


@given(
    data=payloads,
    attempts=st.lists(st.tuples(sizes, st.integers(0, 30), st.integers(0, 20)), max_size=6),
    final=sizes,
    algorithm=st.sampled_from(HashAlgorithm),
)
def test_any_chunking_with_any_cuts_decodes_alike(
    data: bytes, attempts: list[tuple[list[int], int, int]], final: list[int], algorithm: HashAlgorithm
) -> None:
    stored = bytearray()
    for chunking, delivered, lost in attempts:
        receive(data, cut(data, chunking, len(stored))[:delivered], stored)
        # A crash loses what was not yet safely stored; the next attempt asks and starts there.
        del stored[max(len(stored) - lost, 0) :]
    stream = receive(data, cut(data, final, len(stored)), stored)
    stream.trailer(digest_bytes(data))
    stream.verify(digest_bytes(bytes(stored)))
    assert stream.complete
    assert stored == data
    assert digest_bytes(stored, algorithm) == digest_bytes(data, algorithm)


def outcome(data: bytes, chunks: Sequence[Chunk]) -> Reason | None:
    """The reason that a whole transfer with these chunks is refused for; None when it is taken."""
    try:
        receive(data, chunks, bytearray()).trailer(digest_bytes(data))
    except GloraError as error:
        return error.reason
    return None


@given(data=payloads, sizes=sizes, order=st.randoms())
def test_reordering_is_refused(data: bytes, sizes: list[int], order: random.Random) -> None:
    chunks = cut(data, sizes)
    shuffled = chunks.copy()
    order.shuffle(shuffled)
    assert outcome(data, shuffled) is (None if shuffled == chunks else Reason.OFFSET_INVALID)


@given(data=payloads, sizes=sizes, at=st.integers(0, 300), again_after=st.integers(0, 300))
def test_duplication_is_refused(data: bytes, sizes: list[int], at: int, again_after: int) -> None:
    chunks = cut(data, sizes)
    assume(chunks)
    at %= len(chunks)
    position = at + 1 + again_after % (len(chunks) - at)
    assert outcome(data, [*chunks[:position], chunks[at], *chunks[position:]]) is Reason.OFFSET_INVALID


@given(data=payloads, sizes=sizes, at=st.integers(0, 300))
def test_loss_is_refused(data: bytes, sizes: list[int], at: int) -> None:
    chunks = cut(data, sizes)
    assume(chunks)
    at %= len(chunks)
    expected = Reason.UPLOAD_TRUNCATED if at == len(chunks) - 1 else Reason.OFFSET_INVALID
    assert outcome(data, chunks[:at] + chunks[at + 1 :]) is expected


@given(data=payloads, at=st.integers(0, 300), bit=st.integers(0, 7))
def test_a_flipped_bit_is_refused(data: bytes, at: int, bit: int) -> None:
    assume(data)
    stored = bytearray()
    stream = receive(data, cut(data, [MAX_CHUNK]), stored)
    stream.trailer(digest_bytes(data))
    stored[at % len(data)] ^= 1 << bit
    with pytest.raises(GloraError) as caught:
        stream.verify(digest_bytes(stored))
    assert caught.value.reason is Reason.DIGEST_MISMATCH
