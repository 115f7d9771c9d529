"""Digests: a hash together with the size of what was hashed, so that two payloads are the same when both agree."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final, Protocol, Self

from blake3 import blake3

from glora.v1 import types_pb2
from glora_wire.errors import GloraError, Reason

_READ_BYTES: Final = 1024 * 1024
_VALUE_BYTES: Final = 32
"""Both algorithms give 32 bytes."""


class HashAlgorithm(StrEnum):
    """Hash functions that a digest may use."""

    BLAKE3 = "blake3"
    SHA256 = "sha256"


_TO_PROTO: Final = {
    HashAlgorithm.BLAKE3: types_pb2.HASH_ALGORITHM_BLAKE3,
    HashAlgorithm.SHA256: types_pb2.HASH_ALGORITHM_SHA256,
}
_FROM_PROTO: Final = {number: algorithm for algorithm, number in _TO_PROTO.items()}


class Hasher(Protocol):
    """A running hash: feed it bytes, ask for the digest at any time."""

    def update(self, data: bytes | memoryview, /) -> object:
        """Take `data` into the hash."""
        ...

    def digest(self) -> bytes:
        """Hash of everything so far, 32 bytes."""
        ...


@dataclass(frozen=True, slots=True)
class Digest:
    """A hash (32 bytes) and the size in bytes of what was hashed; raises ValueError for impossible values."""

    algorithm: HashAlgorithm
    value: bytes
    size: int

    def __post_init__(self) -> None:
        if len(self.value) != _VALUE_BYTES:
            raise ValueError(f"a {self.algorithm} digest has {_VALUE_BYTES} bytes, not {len(self.value)}")
        if self.size < 0:
            raise ValueError(f"a size cannot be negative: {self.size}")

    @property
    def hex(self) -> str:
        """The hash in lower-case hex."""
        return self.value.hex()

    @property
    def text(self) -> str:
        """The digest as one word, "blake3:<hex>:<size>"; what `parse` reads."""
        return f"{self.algorithm}:{self.hex}:{self.size}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """The digest that `text` spells; raises ValueError when it is not exactly what `Digest.text` writes."""
        algorithm, _, rest = text.partition(":")
        value, _, size = rest.partition(":")
        try:
            digest = cls(HashAlgorithm(algorithm), bytes.fromhex(value), int(size))
        except ValueError as error:
            raise ValueError(f"not a digest (algorithm:hex:size): {text[:120]!r}") from error
        if digest.text != text:
            raise ValueError(f"not a digest in its canonical spelling: {text[:120]!r}")
        return digest


def hasher(algorithm: HashAlgorithm) -> Hasher:
    """A new running hash."""
    match algorithm:
        case HashAlgorithm.BLAKE3:
            return blake3()
        case HashAlgorithm.SHA256:
            return hashlib.sha256()


def digest_bytes(data: bytes | bytearray | memoryview, algorithm: HashAlgorithm = HashAlgorithm.BLAKE3) -> Digest:
    """Digest of `data`."""
    view = memoryview(data).cast("B")
    running = hasher(algorithm)
    running.update(view)
    return Digest(algorithm, running.digest(), view.nbytes)


def digest_file(path: Path, algorithm: HashAlgorithm = HashAlgorithm.BLAKE3, limit: int | None = None) -> Digest:
    """Digest of the file, or of its first `limit` bytes; constant memory; raises OSError."""
    running = hasher(algorithm)
    size = 0
    buffer = bytearray(_READ_BYTES)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while limit is None or size < limit:
            wanted = _READ_BYTES if limit is None else min(_READ_BYTES, limit - size)
            count = file.readinto(view[:wanted])
            if not count:
                break
            running.update(view[:count])
            size += count
    return Digest(algorithm, running.digest(), size)


def to_proto(digest: Digest) -> types_pb2.Digest:
    """The digest as a message."""
    return types_pb2.Digest(algorithm=algorithm_to_proto(digest.algorithm), value=digest.value, size_bytes=digest.size)


def from_proto(message: types_pb2.Digest) -> Digest:
    """The digest in a message; raises GloraError STREAM_MALFORMED for an unknown algorithm or a wrong length."""
    algorithm = algorithm_from_proto(message.algorithm)
    try:
        return Digest(algorithm, message.value, message.size_bytes)
    except ValueError as error:
        raise GloraError(Reason.STREAM_MALFORMED, f"The digest in the message is not one: {error}.") from error


def algorithm_to_proto(algorithm: HashAlgorithm) -> types_pb2.HashAlgorithm.ValueType:
    """Number of the algorithm in the protos."""
    return _TO_PROTO[algorithm]


def algorithm_from_proto(number: types_pb2.HashAlgorithm.ValueType) -> HashAlgorithm:
    """The algorithm with this number; raises GloraError STREAM_MALFORMED when there is none."""
    try:
        return _FROM_PROTO[number]
    except KeyError:
        raise GloraError(
            Reason.STREAM_MALFORMED,
            f"The digest uses hash algorithm number {number}, which is not known here; use BLAKE3 or SHA-256.",
            algorithm=number,
        ) from None
