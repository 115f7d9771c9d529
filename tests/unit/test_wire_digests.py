"""Digests: known values, files, spelling, messages."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from glora.v1 import types_pb2
from glora_wire.digests import Digest, HashAlgorithm, digest_bytes, digest_file, from_proto, hasher, to_proto
from glora_wire.errors import GloraError, Reason

EMPTY_BLAKE3 = "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"


def test_known_values() -> None:
    assert digest_bytes(b"").text == f"blake3:{EMPTY_BLAKE3}:0"
    assert digest_bytes(b"abc", HashAlgorithm.SHA256).hex == hashlib.sha256(b"abc").hexdigest()


@pytest.mark.parametrize("algorithm", HashAlgorithm)
@pytest.mark.parametrize("size", [0, 1, 1024 * 1024 - 1, 1024 * 1024, 1024 * 1024 + 7])
def test_file_and_prefix_agree_with_bytes(tmp_path: Path, algorithm: HashAlgorithm, size: int) -> None:
    data = (bytes(range(251)) * (size // 251 + 1))[:size]
    path = tmp_path / "payload"
    path.write_bytes(data)
    assert digest_file(path, algorithm) == digest_bytes(data, algorithm)
    for limit in (0, size // 2, size, size + 5):
        assert digest_file(path, algorithm, limit) == digest_bytes(data[:limit], algorithm)


@pytest.mark.parametrize("algorithm", HashAlgorithm)
def test_hasher_takes_pieces(algorithm: HashAlgorithm) -> None:
    running = hasher(algorithm)
    running.update(b"ab")
    running.update(memoryview(b"c"))
    assert running.digest() == digest_bytes(b"abc", algorithm).value


@pytest.mark.parametrize("algorithm", HashAlgorithm)
def test_text_and_message_round_trip(algorithm: HashAlgorithm) -> None:
    digest = digest_bytes(b"x" * 300, algorithm)
    assert Digest.parse(digest.text) == digest
    assert from_proto(to_proto(digest)) == digest


@pytest.mark.parametrize(
    "text",
    [
        "",
        "blake3",
        f"md5:{EMPTY_BLAKE3}:0",
        f"blake3:{EMPTY_BLAKE3}",
        f"blake3:{EMPTY_BLAKE3}:-1",
        f"blake3:{EMPTY_BLAKE3}:+1",
        f"blake3:{EMPTY_BLAKE3}:01",
        f"blake3:{EMPTY_BLAKE3.upper()}:0",
        f"blake3:{EMPTY_BLAKE3[:-2]}:0",
        f"blake3:{EMPTY_BLAKE3}:0:0",
    ],
)
def test_other_spellings_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a digest"):
        Digest.parse(text)


@pytest.mark.parametrize(
    "message",
    [
        types_pb2.Digest(),
        types_pb2.Digest(algorithm=types_pb2.HASH_ALGORITHM_BLAKE3, value=b"short", size_bytes=1),
        types_pb2.Digest(algorithm=99, value=b"x" * 32),  # type: ignore[arg-type]  # a newer peer may send it
    ],
)
def test_messages_that_are_no_digest_are_refused(message: types_pb2.Digest) -> None:
    with pytest.raises(GloraError) as caught:
        from_proto(message)
    assert caught.value.reason is Reason.STREAM_MALFORMED
