"""The parts of a transfer as they travel; chunks are read and written by hand, as protobuf does it but two copies less.

    PullAdapterResponse, PushUpdateRequest { Chunk chunk = 2; }      Chunk { uint64 offset = 1; bytes data = 2; }

What is not written as protobuf writes it, other field orders or fields that are not known, is left to protobuf.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple, TypeVar

from glora.v1 import coordinator_pb2

Part = TypeVar("Part", coordinator_pb2.PullAdapterResponse, coordinator_pb2.PushUpdateRequest)

_CHUNK: Final = 0x12
_OFFSET: Final = 0x08
_DATA: Final = 0x12
"""Field number and wire type."""
_VARINT_BITS: Final = 63
"""Offsets that need the last bit of 64 are left to protobuf."""


class Chunk(NamedTuple):
    """The part that carries bytes of the payload."""

    offset: int
    data: bytes | memoryview


def pack_part(part: Chunk | coordinator_pb2.PullAdapterResponse | coordinator_pb2.PushUpdateRequest) -> bytes:
    """The part as it travels, either way."""
    if not isinstance(part, Chunk):
        return part.SerializeToString()
    offset, data = part
    inner = b"\x08" + _varint(offset) if offset else b""
    if data:
        inner += b"\x12" + _varint(len(data))
    return b"".join((b"\x12", _varint(len(inner) + len(data)), inner, data))


def unpacker(message: type[Part]) -> Callable[[bytes], Chunk | Part]:
    """A function that reads a part; the data of a chunk is a view of what is read. Raises DecodeError."""

    def unpack(packed: bytes) -> Chunk | Part:
        if (chunk := _chunk(packed)) is not None:
            return chunk
        part = message.FromString(packed)
        return Chunk(part.chunk.offset, part.chunk.data) if part.WhichOneof("part") == "chunk" else part

    return unpack


def _chunk(packed: bytes) -> Chunk | None:
    """The chunk that the bytes are as a whole; None when they are something else, or written in another way."""
    try:
        if packed[0] != _CHUNK:
            return None
        length, at = _read_varint(packed, 1)
        if length != len(packed) - at:
            return None
        offset = 0
        if packed[at] == _OFFSET:
            offset, at = _read_varint(packed, at + 1)
        if packed[at] != _DATA:
            return None
        length, at = _read_varint(packed, at + 1)
    except IndexError:
        return None
    return Chunk(offset, memoryview(packed)[at:]) if length == len(packed) - at else None


def _varint(number: int) -> bytes:
    digits = bytearray()
    while number > 0x7F:
        digits.append(number & 0x7F | 0x80)
        number >>= 7
    digits.append(number)
    return bytes(digits)


def _read_varint(packed: bytes, at: int) -> tuple[int, int]:
    """The number at `at`, and where it ends; raises IndexError where there is none."""
    number = 0
    for shift in range(0, _VARINT_BITS, 7):
        digit = packed[at]
        at += 1
        number |= (digit & 0x7F) << shift
        if digit <= 0x7F:
            return number, at
    raise IndexError("the number is too long")
