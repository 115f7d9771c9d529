"""Adapters down, updates up: the rpcs PullAdapter, QueryUpload and PushUpdate as coordinator.proto says."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import grpc.aio
import pytest
from rpc_world import SETTINGS, World, eventually, push_parts, refused, running_world

from glora.v1 import coordinator_pb2, coordinator_pb2_grpc
from glora_server.coordinator.messages import UploadStatus
from glora_wire import digests
from glora_wire.digests import Digest, HashAlgorithm, digest_bytes
from glora_wire.errors import Reason, Refusal
from glora_wire.streams import MAX_CHUNK_BYTES

Part = coordinator_pb2.PushUpdateRequest
BIG = os.urandom(20 * 1000 * 1000)
SMALL = BIG[:3_000_000]


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with running_world(tmp_path / "authority") as running:
        yield running


@pytest.fixture
async def stub(world: World) -> AsyncIterator[coordinator_pb2_grpc.CoordinatorServiceAsyncStub]:
    async with world.channel() as channel:
        yield coordinator_pb2_grpc.CoordinatorServiceStub(channel)


def offer(world: World, tmp_path: Path, payload: bytes) -> Digest:
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(payload)
    digest = digest_bytes(payload)
    world.devices.adapter = (path, digest)
    return digest


def pull(offset: int = 0, digest: Digest | None = None) -> coordinator_pb2.PullAdapterRequest:
    request = coordinator_pb2.PullAdapterRequest(assignment="assignments/a1", adapter_key="train", offset=offset)
    if digest is not None:
        request.digest.CopyFrom(digests.to_proto(digest))
    return request


async def collect(call: AsyncIterator[coordinator_pb2.PullAdapterResponse], offset: int) -> bytes:
    """The bytes of a whole stream, whose order is checked."""
    parts = [part async for part in call]
    assert [part.WhichOneof("part") for part in parts] == ["header", *["chunk"] * (len(parts) - 2), "trailer"]
    assert parts[0].header.digest == parts[-1].trailer.digest
    assert parts[0].header.adapter_config_json == '{"r": 8}'
    received = bytearray()
    for part in parts[1:-1]:
        assert part.chunk.offset == offset + len(received)
        assert 0 < len(part.chunk.data) <= MAX_CHUNK_BYTES
        received += part.chunk.data
    return bytes(received)


async def test_pull_delivers_every_byte_and_says_so(
    world: World, stub: coordinator_pb2_grpc.CoordinatorServiceAsyncStub, tmp_path: Path
) -> None:
    offer(world, tmp_path, BIG)
    assert await collect(aiter(stub.PullAdapter(pull(), timeout=60)), 0) == BIG
    assert world.devices.called("open_adapter") == [("open_adapter", "d1", "a1", "train", 0)]
    assert world.devices.called("delivered") == [("delivered", "d1", "a1", "train")]
    assert world.observer.down["a1"] == len(BIG)
    assert world.devices.open_adapters == 0


@pytest.mark.parametrize("offset", [1, MAX_CHUNK_BYTES, len(SMALL) - 1, len(SMALL)])
async def test_pull_resumes_at_any_byte(
    world: World, stub: coordinator_pb2_grpc.CoordinatorServiceAsyncStub, tmp_path: Path, offset: int
) -> None:
    digest = offer(world, tmp_path, SMALL)
    assert await collect(aiter(stub.PullAdapter(pull(offset, digest), timeout=60)), offset) == SMALL[offset:]


async def test_pull_refuses_to_splice_two_versions(
    world: World, stub: coordinator_pb2_grpc.CoordinatorServiceAsyncStub, tmp_path: Path
) -> None:
    offer(world, tmp_path, SMALL)
    with refused(Reason.DIGEST_CHANGED, grpc.StatusCode.FAILED_PRECONDITION):
        await collect(aiter(stub.PullAdapter(pull(5, digest_bytes(b"old")), timeout=60)), 5)
    with refused(Reason.REQUEST_INVALID, grpc.StatusCode.INVALID_ARGUMENT) as errors:
        await collect(aiter(stub.PullAdapter(pull(5), timeout=60)), 5)
    assert "digest" in errors[0].message


async def test_pull_beyond_the_end_is_out_of_range(
    world: World, stub: coordinator_pb2_grpc.CoordinatorServiceAsyncStub, tmp_path: Path
) -> None:
    digest = offer(world, tmp_path, SMALL)
    with refused(Reason.OFFSET_INVALID, grpc.StatusCode.OUT_OF_RANGE):
        await collect(aiter(stub.PullAdapter(pull(len(SMALL) + 1, digest), timeout=60)), 0)
    assert world.devices.open_adapters == 0
    assert not world.devices.called("delivered")


async def test_pull_of_an_unknown_adapter(world: World, stub: coordinator_pb2_grpc.CoordinatorServiceAsyncStub) -> None:
    with refused(Reason.ADAPTER_UNKNOWN, grpc.StatusCode.NOT_FOUND) as errors:
        await collect(aiter(stub.PullAdapter(pull(), timeout=60)), 0)
    assert errors[0].details == {"key": "train"}
    assert world.observer.finished == [("PullAdapter", "NOT_FOUND")]


async def test_abandoned_pull_closes_the_adapter_and_is_not_delivered(
    world: World, stub: coordinator_pb2_grpc.CoordinatorServiceAsyncStub, tmp_path: Path
) -> None:
    offer(world, tmp_path, BIG)
    call = stub.PullAdapter(pull(), timeout=60)
    await call.read()
    assert world.devices.open_adapters == 1
    call.cancel()
    await eventually(lambda: world.devices.open_adapters == 0)
    await eventually(lambda: world.observer.finished == [("PullAdapter", "CANCELLED")])
    assert not world.devices.called("delivered")


async def test_adapter_file_that_is_too_short_is_never_passed_off_as_whole(
    world: World, stub: coordinator_pb2_grpc.CoordinatorServiceAsyncStub, tmp_path: Path
) -> None:
    offer(world, tmp_path, SMALL)
    assert world.devices.adapter is not None
    os.truncate(world.devices.adapter[0], len(SMALL) - 1)
    with refused(Reason.INTERNAL, grpc.StatusCode.INTERNAL):
        await collect(aiter(stub.PullAdapter(pull(), timeout=60)), 0)
    assert not world.devices.called("delivered")


async def test_push_takes_a_large_update_and_gives_the_verdict(
    world: World, stub: coordinator_pb2_grpc.CoordinatorServiceAsyncStub
) -> None:
    answer = await stub.PushUpdate(push_parts(BIG), timeout=60)
    assert answer.state == coordinator_pb2.UPLOAD_STATE_ACCEPTED
    assert world.uploads.partial == BIG
    device_id, assignment_id, header = world.uploads.opened[0]
    assert (device_id, assignment_id) == ("d1", "a1")
    assert (header.digest, header.offset, header.training_rows) == (digest_bytes(BIG), 0, 10)
    assert world.uploads.streams[0].closed == 1
    assert world.observer.up["a1"] == len(BIG)


@pytest.mark.parametrize("have", [1, MAX_CHUNK_BYTES + 7, len(SMALL)])
async def test_push_resumes_where_query_says(
    world: World, stub: coordinator_pb2_grpc.CoordinatorServiceAsyncStub, have: int
) -> None:
    world.uploads.partial += SMALL[:have]
    request = coordinator_pb2.QueryUploadRequest(
        assignment="assignments/a1", digest=digests.to_proto(digest_bytes(SMALL))
    )
    status = await stub.QueryUpload(request, timeout=60)
    assert status.state == coordinator_pb2.UPLOAD_STATE_PARTIAL
    assert status.committed_bytes == have
    answer = await stub.PushUpdate(push_parts(SMALL, offset=have, chunk=100_000), timeout=60)
    assert answer.state == coordinator_pb2.UPLOAD_STATE_ACCEPTED
    assert world.uploads.partial == SMALL


async def test_push_that_was_answered_before_gets_that_answer_at_once(
    world: World, stub: coordinator_pb2_grpc.CoordinatorServiceAsyncStub
) -> None:
    refusal = Refusal(reason=Reason.NON_FINITE, message="NaN in q_proj")
    world.uploads.answered = UploadStatus(state="rejected", committed_bytes=len(BIG), refusal=refusal)
    answer = await world.push(push_parts(BIG))
    assert answer.state == coordinator_pb2.UPLOAD_STATE_REJECTED
    assert (answer.reason, answer.message) == ("NON_FINITE", "NaN in q_proj")
    request = coordinator_pb2.QueryUploadRequest(
        assignment="assignments/a1", digest=digests.to_proto(digest_bytes(BIG))
    )
    status = await stub.QueryUpload(request, timeout=60)
    assert (status.state, status.reason) == (coordinator_pb2.UPLOAD_STATE_REJECTED, "NON_FINITE")
    assert not world.uploads.streams


async def test_abandoned_push_closes_its_session_and_keeps_what_came(
    world: World, stub: coordinator_pb2_grpc.CoordinatorServiceAsyncStub
) -> None:
    call = stub.PushUpdate(timeout=60)
    for part in list(push_parts(SMALL))[:2]:
        await call.write(part)
    await eventually(lambda: len(world.uploads.partial) == MAX_CHUNK_BYTES)
    call.cancel()
    await eventually(lambda: world.uploads.streams[0].closed == 1)
    assert len(world.uploads.partial) == MAX_CHUNK_BYTES
    assert world.observer.finished == [("PushUpdate", "CANCELLED")]


async def test_silent_push_is_ended_so_that_others_get_its_place(tmp_path: Path) -> None:
    settings = replace(SETTINGS, stall_seconds=1.0)

    async def silent() -> AsyncIterator[Part]:
        for part in list(push_parts(SMALL))[:2]:
            yield part
        await asyncio.Event().wait()

    async with running_world(tmp_path, settings) as world, world.channel() as channel:
        with refused(Reason.UPLOAD_TRUNCATED) as errors:
            await coordinator_pb2_grpc.CoordinatorServiceStub(channel).PushUpdate(silent(), timeout=60)
        assert re.search(r"\b1(\.0)? seconds", errors[0].message)
        assert world.uploads.streams[0].closed == 1


async def test_server_that_stops_ends_a_push_and_closes_its_session(tmp_path: Path) -> None:
    async with running_world(tmp_path, replace(SETTINGS, grace_seconds=0.1)) as world, world.channel() as channel:
        call = coordinator_pb2_grpc.CoordinatorServiceStub(channel).PushUpdate(timeout=60)
        for part in list(push_parts(SMALL))[:2]:
            await call.write(part)
        await eventually(lambda: world.uploads.partial)
        await world.servers.stop()
        await eventually(lambda: world.uploads.streams[0].closed == 1)
        with pytest.raises(grpc.aio.AioRpcError):
            await call


def edited(change: Callable[[list[Part]], None]) -> Iterator[Part]:
    parts = list(push_parts(SMALL))
    change(parts)
    yield from parts


def grow_first_chunk(parts: list[Part]) -> None:
    parts[1].chunk.data = bytes(MAX_CHUNK_BYTES + 1)


def swap_chunks(parts: list[Part]) -> None:
    parts[1], parts[2] = parts[2], parts[1]


def empty_chunk(parts: list[Part]) -> None:
    parts[1].chunk.data = b""


def extra_chunk(parts: list[Part]) -> None:
    chunk = coordinator_pb2.Chunk(offset=len(SMALL), data=b"x")
    parts.insert(-1, Part(chunk=chunk))


def other_trailer(parts: list[Part]) -> None:
    parts[-1].trailer.digest.value = bytes(32)


def other_bytes(parts: list[Part]) -> None:
    parts[1].chunk.data = bytes(MAX_CHUNK_BYTES)


def set_header(**fields: object) -> Callable[[list[Part]], None]:
    def change(parts: list[Part]) -> None:
        for name, value in fields.items():
            setattr(parts[0].header, name, value)

    return change


def short_digest(parts: list[Part]) -> None:
    parts[0].header.digest.value = b"short"


def unknown_hash(parts: list[Part]) -> None:
    parts[0].header.digest.algorithm = 77  # type: ignore[assignment]  # a number that no version knows


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda parts: parts.pop(0), Reason.STREAM_MALFORMED),
        (lambda parts: parts.clear(), Reason.STREAM_MALFORMED),
        (lambda parts: parts.insert(0, Part()), Reason.STREAM_MALFORMED),
        (lambda parts: parts.insert(1, Part()), Reason.STREAM_MALFORMED),
        (lambda parts: parts.insert(1, parts[0]), Reason.STREAM_MALFORMED),
        (lambda parts: parts.pop(), Reason.UPLOAD_TRUNCATED),
        (lambda parts: parts.pop(2), Reason.OFFSET_INVALID),
        (lambda parts: parts.pop(-2), Reason.UPLOAD_TRUNCATED),
        (grow_first_chunk, Reason.CHUNK_TOO_LARGE),
        (swap_chunks, Reason.OFFSET_INVALID),
        (empty_chunk, Reason.STREAM_MALFORMED),
        (extra_chunk, Reason.UPLOAD_TOO_LARGE),
        (other_trailer, Reason.DIGEST_MISMATCH),
        (lambda parts: parts[-1].trailer.Clear(), Reason.REQUEST_INVALID),
        (other_bytes, Reason.DIGEST_MISMATCH),
        (short_digest, Reason.STREAM_MALFORMED),
        (unknown_hash, Reason.STREAM_MALFORMED),
        (lambda parts: parts[0].header.ClearField("digest"), Reason.REQUEST_INVALID),
        (set_header(assignment=""), Reason.REQUEST_INVALID),
        (set_header(assignment="runs/a1"), Reason.REQUEST_INVALID),
        (set_header(assignment="assignments/../x"), Reason.REQUEST_INVALID),
        (set_header(offset=2**63), Reason.REQUEST_INVALID),
        (set_header(offset=7), Reason.OFFSET_INVALID),
        (set_header(training_rows=2**64 - 1), Reason.WEIGHT_INVALID),
        (set_header(training_loss=float("nan")), Reason.METRICS_INVALID),
        (set_header(training_seconds=float("inf")), Reason.METRICS_INVALID),
    ],
)
async def test_wrong_streams_are_refused_with_their_reason(
    world: World,
    change: Callable[[list[Part]], None],
    reason: Reason,
) -> None:
    with refused(reason):
        await world.push(edited(change))
    await eventually(lambda: world.observer.finished)
    assert all(session.closed == 1 for session in world.uploads.streams)
    assert world.observer.finished[0][1] not in ("OK", "INTERNAL")


async def test_message_over_four_mebibytes_is_refused_before_it_is_parsed(world: World) -> None:
    parts = list(push_parts(SMALL))
    parts[1].chunk.data = bytes(5 * 1024 * 1024)
    with refused(Reason.TOO_MANY_REQUESTS, grpc.StatusCode.RESOURCE_EXHAUSTED):
        await world.push(parts)
    await eventually(lambda: all(session.closed == 1 for session in world.uploads.streams))
    assert not world.uploads.partial


async def test_sha256_uploads_are_taken_too(
    world: World, stub: coordinator_pb2_grpc.CoordinatorServiceAsyncStub
) -> None:
    request = coordinator_pb2.QueryUploadRequest(
        assignment="assignments/a1", digest=digests.to_proto(digest_bytes(SMALL, HashAlgorithm.SHA256))
    )
    await stub.QueryUpload(request, timeout=60)
    assert world.uploads.queries == [("d1", "a1", digest_bytes(SMALL, HashAlgorithm.SHA256))]


async def test_pushes_of_many_devices_go_on_side_by_side(
    world: World, stub: coordinator_pb2_grpc.CoordinatorServiceAsyncStub
) -> None:
    """A push that waits for its next chunk holds up nobody."""
    waiting = stub.PushUpdate(timeout=60)
    await waiting.write(next(push_parts(SMALL)))
    await eventually(lambda: len(world.uploads.streams) == 1)
    answer = await stub.PushUpdate(push_parts(SMALL), timeout=60)
    assert answer.state == coordinator_pb2.UPLOAD_STATE_ACCEPTED
    waiting.cancel()
    await eventually(lambda: world.uploads.streams[0].closed == 1)
