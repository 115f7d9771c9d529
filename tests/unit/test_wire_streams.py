"""Each way in which a stream can go wrong has its reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from glora_wire.digests import digest_bytes
from glora_wire.errors import GloraError, Reason
from glora_wire.streams import MAX_CHUNK_BYTES, StreamAssembler, StreamState, file_chunks

DATA = bytes(range(100))
DIGEST = digest_bytes(DATA)
OTHER = digest_bytes(b"x" * 100)


def opened(offset: int = 0) -> StreamAssembler:
    stream = StreamAssembler(max_chunk_bytes=60)
    stream.header(DIGEST, offset, 100)
    return stream


def closed() -> StreamAssembler:
    stream = opened(100)
    stream.trailer(DIGEST)
    return stream


def test_a_stream_from_beginning_to_end() -> None:
    stream = StreamAssembler()
    assert stream.state is StreamState.HEADER
    stream.header(DIGEST, 0, 100)
    assert (stream.state, stream.position, stream.digest) == (StreamState.CHUNKS, 0, DIGEST)
    stream.chunk(0, 60)
    stream.chunk(60, 40)
    assert (stream.position, stream.complete) == (100, False)
    stream.trailer(DIGEST)
    stream.verify(digest_bytes(DATA))
    assert stream.complete


def test_resuming_at_the_end_and_an_empty_payload() -> None:
    assert closed().complete
    stream = StreamAssembler()
    stream.header(digest_bytes(b""), 0, 0)
    stream.trailer(digest_bytes(b""))
    assert stream.complete


def refused(reason: Reason) -> pytest.RaisesExc[GloraError]:
    return pytest.raises(GloraError, check=lambda error: error.reason is reason)


def test_headers() -> None:
    with refused(Reason.UPLOAD_TOO_LARGE):
        StreamAssembler().header(DIGEST, 0, 99)
    with refused(Reason.OFFSET_INVALID):
        StreamAssembler().header(DIGEST, 101, 100)
    with refused(Reason.OFFSET_INVALID):
        StreamAssembler().header(DIGEST, -1, 100)
    with refused(Reason.STREAM_MALFORMED):
        opened().header(DIGEST, 0, 100)
    with pytest.raises(ValueError, match="no header"):
        _ = StreamAssembler().digest


@pytest.mark.parametrize(
    ("offset", "length", "reason"),
    [
        (0, 0, Reason.STREAM_MALFORMED),
        (0, -5, Reason.STREAM_MALFORMED),
        (0, 61, Reason.CHUNK_TOO_LARGE),
        (1, 10, Reason.OFFSET_INVALID),
        (-1, 10, Reason.OFFSET_INVALID),
    ],
)
def test_chunks(offset: int, length: int, reason: Reason) -> None:
    stream = opened()
    with refused(reason):
        stream.chunk(offset, length)
    assert (stream.state, stream.position) == (StreamState.BROKEN, 0)


def test_more_than_announced() -> None:
    stream = opened(50)
    with refused(Reason.UPLOAD_TOO_LARGE):
        stream.chunk(50, 51)


def test_order() -> None:
    with refused(Reason.STREAM_MALFORMED):
        StreamAssembler().chunk(0, 1)
    with refused(Reason.STREAM_MALFORMED):
        StreamAssembler().trailer(DIGEST)
    with refused(Reason.STREAM_MALFORMED):
        closed().chunk(100, 1)
    with refused(Reason.STREAM_MALFORMED):
        closed().trailer(DIGEST)
    with refused(Reason.STREAM_MALFORMED):
        closed().header(DIGEST)


def test_trailers_and_verification() -> None:
    with refused(Reason.UPLOAD_TRUNCATED):
        opened(99).trailer(DIGEST)
    with refused(Reason.DIGEST_MISMATCH):
        opened(100).trailer(OTHER)
    with refused(Reason.DIGEST_MISMATCH):
        closed().verify(OTHER)
    with refused(Reason.STREAM_MALFORMED):
        opened(100).verify(DIGEST)


def test_a_refused_stream_stays_refused() -> None:
    stream = opened()
    with refused(Reason.OFFSET_INVALID):
        stream.chunk(5, 5)
    with refused(Reason.STREAM_MALFORMED):
        stream.chunk(0, 5)
    with refused(Reason.STREAM_MALFORMED):
        stream.trailer(DIGEST)


def test_file_chunks(tmp_path: Path) -> None:
    path = tmp_path / "payload"
    path.write_bytes(DATA)
    assert list(file_chunks(path, 30, 40)) == [(30, DATA[30:70]), (70, DATA[70:])]
    assert list(file_chunks(path)) == [(0, DATA)]
    assert list(file_chunks(path, 100, 8)) == []
    assert MAX_CHUNK_BYTES == 2**20
    for offset, size in ((0, 0), (-1, 5)):
        with pytest.raises(ValueError, match="positive"):
            next(file_chunks(path, offset, size))
