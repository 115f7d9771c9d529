"""Chunks that are written and read by hand are those that protobuf writes and reads."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from glora.v1 import coordinator_pb2 as pb
from glora_wire.chunks import Chunk, pack_part, unpacker

_LARGE = bytes(range(256)) * 4096
_BOTH = [
    (pb.PullAdapterResponse, unpacker(pb.PullAdapterResponse)),
    (pb.PushUpdateRequest, unpacker(pb.PushUpdateRequest)),
]
Message = type[pb.PullAdapterResponse] | type[pb.PushUpdateRequest]
Unpack = Callable[[bytes], object]


@pytest.mark.parametrize(("message", "unpack"), _BOTH)
@pytest.mark.parametrize("offset", [0, 1, 127, 128, 2**20, 2**32 + 5, 2**63 - 1, 2**63, 2**64 - 1])
@pytest.mark.parametrize("data", [b"", b"x", b"y" * 127, b"z" * 128, _LARGE], ids=len)
def test_a_chunk_is_what_protobuf_makes_of_it(message: Message, unpack: Unpack, offset: int, data: bytes) -> None:
    packed = message(chunk=pb.Chunk(offset=offset, data=data)).SerializeToString()
    assert pack_part(Chunk(offset, data)) == packed
    assert pack_part(Chunk(offset, memoryview(data))) == packed
    assert unpack(packed) == (offset, data)


def test_the_data_of_a_chunk_is_not_copied() -> None:
    packed = pack_part(Chunk(5, _LARGE))
    chunk = unpacker(pb.PushUpdateRequest)(packed)
    assert isinstance(chunk, Chunk)
    assert isinstance(chunk.data, memoryview)
    assert chunk.data.obj is packed


@pytest.mark.parametrize("part", ["header", "trailer"])
def test_other_parts_are_protobufs(part: str) -> None:
    message = pb.PushUpdateRequest()
    getattr(message, part).digest.value = b"v" * 32
    assert unpacker(pb.PushUpdateRequest)(pack_part(message)) == message


@pytest.mark.parametrize(
    ("packed", "chunk"),
    [
        (b"\x12\x07\x12\x03abc\x08\x05", (5, b"abc")),  # the fields in the other order
        (b"\x12\x09\x08\x01\x08\x05\x12\x03abc", (5, b"abc")),  # a field twice: the last one holds
        (b"\x12\x05\x12\x03abc\x12\x02\x08\x05", (5, b"abc")),  # the chunk in two pieces, which are put together
        (b"\x12\x09\x08\x05\x12\x03abc\x18\x01", (5, b"abc")),  # a field that is not known
        (b"\x12\x87\x00\x08\x05\x12\x03abc", (5, b"abc")),  # a length with a digit too many
        (b"\x12\x02\x08\x05", (5, b"")),
        (b"\x12\x00", (0, b"")),
    ],
)
def test_a_chunk_that_was_written_in_another_way_is_read_all_the_same(packed: bytes, chunk: tuple[int, bytes]) -> None:
    assert unpacker(pb.PushUpdateRequest)(packed) == chunk
    read = pb.PushUpdateRequest.FromString(packed).chunk
    assert (read.offset, read.data) == chunk


@pytest.mark.parametrize("packed", [b"\x12", b"\x12\x05\x12\x09abc", b"\x12\x04\x12\x03ab", b"\x12" + b"\xff" * 12])
def test_what_is_cut_short_is_no_chunk(packed: bytes) -> None:
    with pytest.raises(Exception, match=r"(?i)pars"):
        unpacker(pb.PushUpdateRequest)(packed)


def test_an_empty_part_is_a_message() -> None:
    assert unpacker(pb.PullAdapterResponse)(b"") == pb.PullAdapterResponse()
