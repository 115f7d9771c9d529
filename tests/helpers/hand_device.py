"""A device written by hand: speaks the protocol with a real certificate, and sends whatever a test wants."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import grpc
import numpy as np
import safetensors.numpy

from glora.v1 import coordinator_pb2, coordinator_pb2_grpc, types_pb2
from glora_client.capabilities import profile
from glora_client.channel import work_channel
from glora_client.state import StateFolder
from glora_wire import digests
from glora_wire.digests import Digest, digest_bytes
from glora_wire.errors import GloraError
from glora_wire.rpc_errors import error_from_rpc

Tensors = dict[str, np.ndarray]
Request = coordinator_pb2.PushUpdateRequest
State = coordinator_pb2.UploadState
_SECONDS: Final = 60.0
CHUNK: Final = 1024 * 1024


@dataclass(eq=False)
class HandDevice:
    """A joined device; the blocking stub, for grpc.aio loses the status of a server that answers early."""

    state_dir: Path
    fingerprint: str
    name: str = ""
    rank: int = 0
    channel: grpc.Channel = field(init=False)
    stub: coordinator_pb2_grpc.CoordinatorServiceStub = field(init=False)

    def __post_init__(self) -> None:
        state = StateFolder(self.state_dir, lock=False)
        identity = state.identity()
        assert identity is not None
        self.name, self.rank = identity.name, identity.rank
        self.channel = work_channel(identity, state.credentials())
        self.stub = coordinator_pb2_grpc.CoordinatorServiceStub(self.channel)

    def close(self) -> None:
        self.channel.close()

    def ask(self) -> grpc.Future[coordinator_pb2.WaitForWorkResponse]:
        """The question for work, under way."""
        about = profile(rank=self.rank, fingerprint=self.fingerprint, training_rows=100)
        return self.stub.WaitForWork.future(coordinator_pb2.WaitForWorkRequest(profile=about), timeout=_SECONDS)

    def accept(self, assignment: types_pb2.Assignment) -> None:
        report = coordinator_pb2.ReportProgressRequest(assignment=assignment.name, accepted=coordinator_pb2.Accepted())
        self.stub.ReportProgress(report, timeout=_SECONDS)

    def pull(self, assignment: types_pb2.Assignment) -> tuple[bytes, str]:
        """Payload and adapter_config.json of the assignment's first adapter."""
        request = coordinator_pb2.PullAdapterRequest(assignment=assignment.name, adapter_key=assignment.adapters[0].key)
        payload, config = bytearray(), ""
        for part in self.stub.PullAdapter(request, timeout=_SECONDS):
            config = config or part.header.adapter_config_json
            payload += part.chunk.data
        return bytes(payload), config

    def push(
        self,
        assignment: types_pb2.Assignment,
        payload: bytes,
        config: str,
        *,
        digest: Digest | None = None,
        stop_at: int | None = None,
        rows: int = 100,
        chunk: int = CHUNK,
    ) -> coordinator_pb2.PushUpdateResponse:
        """The answer to an update, resumed where the server has it; raises the GloraError that the server told."""
        announced = digests.to_proto(digest or digest_bytes(payload))
        known = self.stub.QueryUpload(
            coordinator_pb2.QueryUploadRequest(assignment=assignment.name, digest=announced), timeout=_SECONDS
        )
        offset = known.committed_bytes if known.state == State.UPLOAD_STATE_PARTIAL else 0

        def parts() -> Iterator[Request]:
            header = coordinator_pb2.PushHeader(
                assignment=assignment.name,
                digest=announced,
                offset=offset,
                adapter_config_json=config,
                training_rows=rows,
                completed_steps=1,
                training_loss=1.0,
                training_seconds=1.0,
            )
            yield Request(header=header)
            end = len(payload) if stop_at is None else stop_at
            for start in range(offset, end, chunk):
                yield Request(chunk=coordinator_pb2.Chunk(offset=start, data=payload[start : min(end, start + chunk)]))
            yield Request(trailer=coordinator_pb2.Trailer(digest=announced))

        try:
            return self.stub.PushUpdate(parts(), timeout=_SECONDS)
        except grpc.RpcError as error:
            raise error_from_rpc(error) from None

    def refusal(self, assignment: types_pb2.Assignment, payload: bytes, config: str, **how: object) -> GloraError:
        """The error with which the server ends the push."""
        try:
            answer = self.push(assignment, payload, config, **how)  # type: ignore[arg-type]  # passed through
        except GloraError as error:
            return error
        raise AssertionError(f"the server answered {State.Name(answer.state)} {answer.reason}")


def trained(payload: bytes) -> Tensors:
    """What an honest device makes of an adapter: the same tensors, moved a little."""
    generator = np.random.default_rng(3)
    return {
        name: (values + 0.01 * generator.standard_normal(values.shape)).astype(values.dtype)
        for name, values in safetensors.numpy.load(payload).items()
    }


def packed(tensors: Mapping[str, np.ndarray]) -> bytes:
    """A payload of these tensors."""
    return safetensors.numpy.save({name: np.ascontiguousarray(values) for name, values in tensors.items()})


def with_header(payload: bytes, change: Callable[[dict[str, object]], None]) -> bytes:
    """The payload with a header that `change` has been at, of whatever length it then has."""
    length = int.from_bytes(payload[:8], "little")
    header = json.loads(payload[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + payload[8 + length :]
