"""Pulling adapters and pushing updates, both resumable at any byte, across restarts of either side."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from glora.v1 import coordinator_pb2, coordinator_pb2_grpc, types_pb2
from glora_client.channel import SHORT_SECONDS, Stop
from glora_client.state import StateFolder, StoredUpdate
from glora_wire.chunks import Chunk
from glora_wire.digests import Digest, Hasher, from_proto, hasher, to_proto
from glora_wire.errors import GloraError, Reason
from glora_wire.streams import MAX_CHUNK_BYTES, StreamAssembler, file_chunks

# A stream is given up when it takes longer than this; the next one resumes where it ended.
_STREAM_SECONDS: Final = 1800.0
_READ_BYTES: Final = 1024 * 1024

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


@dataclass(frozen=True, slots=True)
class PulledAdapter:
    """A verified payload file and its adapter_config.json."""

    path: Path
    config_json: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of an update; `message` says why when it was not accepted."""

    state: coordinator_pb2.UploadState.ValueType
    reason: str
    message: str


class _Partial:
    """A half-done download: the bytes so far, and which payload they belong to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.meta = path.with_suffix(".meta")

    def digest(self) -> Digest | None:
        """Which payload the bytes belong to; None when there are none."""
        try:
            return Digest.parse(json.loads(self.meta.read_text(encoding="utf-8"))["digest"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def start(self, digest: Digest) -> None:
        """Forget what was there and begin this payload."""
        self.drop()
        self.meta.write_text(json.dumps({"digest": digest.text}), encoding="utf-8")

    def drop(self) -> None:
        """Forget it."""
        self.meta.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)

    def size(self) -> int:
        """Bytes so far."""
        try:
            return self.path.stat().st_size
        except FileNotFoundError:
            return 0


def pull_adapter(
    stub: coordinator_pb2_grpc.CoordinatorServiceStub,
    state: StateFolder,
    stop: Stop,
    *,
    assignment: str,
    adapter_key: str,
    max_chunk_bytes: int,
    progress: Progress = lambda _done, _total: None,
) -> PulledAdapter:
    """The adapter as a file whose digest was verified; one attempt, resuming what earlier ones left.

    A payload that lies in the cache already is not transferred again. Raises Stopped, and GloraError: what PullAdapter
    says, DIGEST_MISMATCH or STREAM_MALFORMED for a stream that is not right (the next attempt starts from 0).
    """
    partial = _Partial(state.path / "partial" / f"{file_name(assignment)}-{file_name(adapter_key)}.part")
    known = partial.digest()
    # Bytes are flushed to the disk in no particular order when a device loses power: the digest finds that out.
    offset = min(partial.size(), known.size) if known is not None else 0
    request = coordinator_pb2.PullAdapterRequest(assignment=assignment, adapter_key=adapter_key, offset=offset)
    if known is not None and offset:
        request.digest.CopyFrom(to_proto(known))
    call = stub.PullAdapter(request, timeout=_STREAM_SECONDS)
    try:
        with stop.ending(call):
            return _receive(
                call,
                state,
                partial,
                offset,
                max_chunk_bytes=max_chunk_bytes or MAX_CHUNK_BYTES,
                progress=progress,
            )
    except GloraError as error:
        if error.reason in {
            Reason.DIGEST_CHANGED,
            Reason.OFFSET_INVALID,
            Reason.DIGEST_MISMATCH,
            Reason.STREAM_MALFORMED,
        }:
            partial.drop()
        raise
    finally:
        call.cancel()


def _receive(
    call: Iterator[Chunk | coordinator_pb2.PullAdapterResponse],
    state: StateFolder,
    partial: _Partial,
    offset: int,
    *,
    max_chunk_bytes: int,
    progress: Progress,
) -> PulledAdapter:
    first = next(call, None)
    if first is None or isinstance(first, Chunk) or first.WhichOneof("part") != "header":
        raise GloraError(Reason.STREAM_MALFORMED, "The server's stream does not begin with a header.")
    digest, config_json = from_proto(first.header.digest), first.header.adapter_config_json
    cached = state.path / "adapters" / f"{digest.algorithm}-{digest.hex}.safetensors"
    if cached.is_file() and cached.stat().st_size == digest.size:
        os.utime(cached)
        partial.drop()
        return PulledAdapter(cached, config_json)
    if offset == 0:
        partial.start(digest)
    assembler = StreamAssembler(max_chunk_bytes=max_chunk_bytes)
    assembler.header(digest, offset)
    with partial.path.open("r+b" if offset else "wb") as file:
        running = hasher(digest.algorithm)
        _hash_beginning(file, offset, running)
        for part in call:
            if isinstance(part, Chunk):
                assembler.chunk(part.offset, len(part.data))
                file.write(part.data)
                running.update(part.data)
                progress(assembler.position, digest.size)
            elif part.WhichOneof("part") == "trailer":
                assembler.trailer(from_proto(part.trailer.digest))
            else:
                raise GloraError(Reason.STREAM_MALFORMED, "The server's stream has a part that is not known.")
        assembler.verify(Digest(digest.algorithm, running.digest(), assembler.position))
        file.truncate(digest.size)
        os.fsync(file.fileno())
    partial.path.replace(cached)
    partial.drop()
    return PulledAdapter(cached, config_json)


def _hash_beginning(file: BinaryIO, length: int, running: Hasher) -> None:
    """Hash what an earlier attempt left and stand behind it: the state of a hash does not survive a restart."""
    buffer = bytearray(min(_READ_BYTES, length))
    view = memoryview(buffer)
    remaining = length
    while remaining:
        count = file.readinto(view[: min(len(view), remaining)])  # type: ignore[attr-defined]  # files opened "b" have it
        if not count:
            raise GloraError(Reason.STREAM_MALFORMED, "The partial download became shorter; starting again.")
        running.update(view[:count])
        remaining -= count


def query_upload(
    stub: coordinator_pb2_grpc.CoordinatorServiceStub, stop: Stop, update: StoredUpdate
) -> coordinator_pb2.QueryUploadResponse:
    """What the server has of the update; raises Stopped and GloraError."""
    request = coordinator_pb2.QueryUploadRequest(
        assignment=update.assignment, digest=to_proto(Digest.parse(update.digest))
    )
    call = stub.QueryUpload.future(request, timeout=SHORT_SECONDS)
    with stop.ending(call):
        return call.result()


def push_update(
    stub: coordinator_pb2_grpc.CoordinatorServiceStub,
    state: StateFolder,
    stop: Stop,
    update: StoredUpdate,
    *,
    progress: Progress = lambda _done, _total: None,
    fresh: bool = False,
) -> Verdict:
    """What became of the update; one attempt, from the byte that the server has. Raises Stopped and GloraError.

    `fresh`: nothing of it was ever sent, so there is nothing to ask about.
    """
    offset = 0
    if not fresh:
        answer = query_upload(stub, stop, update)
        if answer.state in {
            coordinator_pb2.UPLOAD_STATE_RECEIVED,
            coordinator_pb2.UPLOAD_STATE_ACCEPTED,
            coordinator_pb2.UPLOAD_STATE_REJECTED,
            coordinator_pb2.UPLOAD_STATE_DISCARDED,
        }:
            return Verdict(answer.state, answer.reason, answer.message)
        offset = answer.committed_bytes
    parts = _parts(update, state.update_path, offset, progress)
    call = stub.PushUpdate.future(parts, timeout=_STREAM_SECONDS)  # type: ignore[arg-type]  # see work_stub
    with stop.ending(call):
        response = call.result()
    return Verdict(response.state, response.reason, response.message)


def _parts(
    update: StoredUpdate, path: Path, offset: int, progress: Progress
) -> Iterator[Chunk | coordinator_pb2.PushUpdateRequest]:
    digest = Digest.parse(update.digest)
    message = to_proto(digest)
    yield coordinator_pb2.PushUpdateRequest(
        header=coordinator_pb2.PushHeader(
            assignment=update.assignment,
            digest=message,
            offset=offset,
            adapter_config_json=update.adapter_config_json,
            training_rows=update.training_rows,
            completed_steps=update.completed_steps,
            stopped_early=update.stopped_early,
            training_loss=update.training_loss,
            training_seconds=update.training_seconds,
        )
    )
    size = min(MAX_CHUNK_BYTES, update.max_chunk_bytes or MAX_CHUNK_BYTES)
    for position, data in file_chunks(path, offset, size):
        yield Chunk(position, data)
        progress(position + len(data), digest.size)
    yield coordinator_pb2.PushUpdateRequest(trailer=coordinator_pb2.Trailer(digest=message))


def report_evaluations(
    stub: coordinator_pb2_grpc.CoordinatorServiceStub,
    stop: Stop,
    *,
    assignment: str,
    evaluations: list[types_pb2.Evaluation],
    complete: bool,
) -> None:
    """Tell the server what was measured; raises Stopped and GloraError."""
    request = coordinator_pb2.ReportMetricsRequest(assignment=assignment, evaluations=evaluations, complete=complete)
    call = stub.ReportMetrics.future(request, timeout=SHORT_SECONDS)
    with stop.ending(call):
        call.result()


def file_name(name: str) -> str:
    """A name from the server made safe as part of a file name."""
    return "".join(character if character.isalnum() else "_" for character in name)[:100]
