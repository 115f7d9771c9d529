"""Use cases behind the gRPC edge that remember what they were asked."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from glora_server.coordinator.messages import (
    EnrolmentRecord,
    EnrolRequestRecord,
    EvaluationRecord,
    OpenAdapter,
    ProgressAnswer,
    UploadHeader,
    UploadStatus,
    WorkAnswer,
)
from glora_server.coordinator.model import Device, DeviceState, Profile
from glora_server.rounds.ids import AssignmentId, DeviceId
from glora_server.rpc.services import UploadStream
from glora_server.security.authority import FileAuthority
from glora_wire.digests import Digest, digest_bytes
from glora_wire.errors import GloraError, Reason, Refusal


def device(device_id: str, key_sha256: str, state: DeviceState = DeviceState.APPROVED) -> Device:
    return Device(
        id=DeviceId(device_id),
        name=f"name-{device_id}",
        state=state,
        declared_rank=8,
        granted_rank=8,
        token_id=None,
        key_sha256=key_sha256,
        certificate_pem="",
        certificate_serial="",
        certificate_expires_at=0.0,
        created_at=0.0,
    )


_REFUSED = {
    DeviceState.REVOKED: Reason.DEVICE_REVOKED,
    DeviceState.SUSPENDED: Reason.DEVICE_SUSPENDED,
    DeviceState.PENDING: Reason.DEVICE_PENDING,
}


@dataclass(slots=True)
class FakeDevices:
    """DeviceUseCases."""

    members: dict[str, Device] = field(default_factory=dict)
    answers: asyncio.Queue[WorkAnswer] = field(default_factory=asyncio.Queue)
    calls: list[tuple[object, ...]] = field(default_factory=list)
    adapter: tuple[Path, Digest] | None = None
    progress_answer: ProgressAnswer = field(default_factory=lambda: ProgressAnswer(cancelled=False, deadline_at=1000.5))
    polls: int = 0
    lost_polls: int = 0
    open_adapters: int = 0
    fault: Exception | None = None

    def set_state(self, device_id: str, state: DeviceState) -> None:
        for key, member in self.members.items():
            if member.id == device_id:
                self.members[key] = replace(member, state=state)

    async def identify(self, key_sha256: str) -> Device:
        member = self.members.get(key_sha256)
        if member is None:
            raise GloraError(Reason.CERTIFICATE_UNKNOWN, "This device is not known here; join again.")
        if member.state in _REFUSED:
            raise GloraError(_REFUSED[member.state], f"The device is {member.state}.", device=member.name)
        return member

    async def wait_for_work(self, device: Device, profile: Profile, *, timeout: float) -> WorkAnswer:  # noqa: ASYNC109
        self.calls.append(("wait", device.id, profile, timeout))
        self.polls += 1
        try:
            return await asyncio.wait_for(self.answers.get(), timeout)
        except asyncio.CancelledError:
            self.lost_polls += 1
            raise
        finally:
            self.polls -= 1

    async def accepted(self, device: Device, assignment_id: AssignmentId) -> ProgressAnswer:
        if self.fault is not None:
            raise self.fault
        return self._note("accepted", device.id, assignment_id)

    async def progress(
        self, device: Device, assignment_id: AssignmentId, *, phase: str, done: int, total: int, loss: float
    ) -> ProgressAnswer:
        return self._note("progress", device.id, assignment_id, phase, done, total, loss)

    async def declined(
        self, device: Device, assignment_id: AssignmentId, refusal: Refusal, *, permanent: bool
    ) -> ProgressAnswer:
        return self._note("declined", device.id, assignment_id, refusal, permanent)

    async def failed(
        self, device: Device, assignment_id: AssignmentId, refusal: Refusal, *, permanent: bool
    ) -> ProgressAnswer:
        return self._note("failed", device.id, assignment_id, refusal, permanent)

    async def measured(
        self, device: Device, assignment_id: AssignmentId, evaluations: Sequence[EvaluationRecord], *, complete: bool
    ) -> None:
        self.calls.append(("measured", device.id, assignment_id, tuple(evaluations), complete))

    async def open_adapter(
        self, device: Device, assignment_id: AssignmentId, *, key: str, offset: int, digest: Digest | None
    ) -> OpenAdapter:
        self.calls.append(("open_adapter", device.id, assignment_id, key, offset))
        if self.adapter is None:
            raise GloraError(Reason.ADAPTER_UNKNOWN, "There is no such adapter.", key=key)
        path, current = self.adapter
        if digest is not None and digest != current:
            raise GloraError(Reason.DIGEST_CHANGED, "The adapter is another one now.")
        self.open_adapters += 1
        return OpenAdapter(digest=current, adapter_config_json='{"r": 8}', path=path, release=self._release)

    async def delivered(self, device: Device, assignment_id: AssignmentId, key: str) -> None:
        self.calls.append(("delivered", device.id, assignment_id, key))

    def _release(self) -> None:
        self.open_adapters -= 1

    def _note(self, *call: object) -> ProgressAnswer:
        self.calls.append(call)
        return self.progress_answer

    def called(self, name: str) -> list[tuple[object, ...]]:
        return [call for call in self.calls if call[0] == name]


@dataclass(slots=True)
class FakeStream:
    """UploadStream that keeps what it gets in `stored` and notices two jobs at once."""

    stored: bytearray
    closed: int = 0
    busy: bool = False

    async def chunk(self, offset: int, data: bytes | memoryview) -> None:
        assert not self.busy
        assert offset == len(self.stored)
        self.busy = True
        await asyncio.sleep(0)
        self.stored += data
        self.busy = False

    async def finish(self, digest: Digest) -> UploadStatus:
        if digest_bytes(self.stored) != digest:
            raise GloraError(Reason.DIGEST_MISMATCH, "Other bytes arrived than were announced.")
        return UploadStatus(state="accepted", committed_bytes=len(self.stored))

    async def close(self) -> None:
        await asyncio.sleep(0.01)
        self.closed += 1


@dataclass(slots=True)
class FakeUploads:
    """UploadUseCases."""

    partial: bytearray = field(default_factory=bytearray)
    queries: list[tuple[DeviceId, AssignmentId, Digest]] = field(default_factory=list)
    opened: list[tuple[DeviceId, AssignmentId, UploadHeader]] = field(default_factory=list)
    streams: list[FakeStream] = field(default_factory=list)
    answered: UploadStatus | None = None

    async def query(self, device: Device, assignment_id: AssignmentId, digest: Digest) -> UploadStatus:
        self.queries.append((device.id, assignment_id, digest))
        return self.answered or UploadStatus(state="partial", committed_bytes=len(self.partial))

    async def open(
        self, device: Device, assignment_id: AssignmentId, header: UploadHeader
    ) -> UploadStream | UploadStatus:
        self.opened.append((device.id, assignment_id, header))
        if self.answered is not None:
            return self.answered
        if header.offset != len(self.partial):
            raise GloraError(Reason.OFFSET_INVALID, "Ask where to resume.", expected=len(self.partial))
        self.streams.append(FakeStream(self.partial))
        return self.streams[-1]


@dataclass(slots=True)
class FakeEnrolment:
    """EnrolmentUseCases that take everyone with the secret "good"."""

    authority: FileAuthority
    devices: FakeDevices
    requests: list[tuple[EnrolRequestRecord, str]] = field(default_factory=list)

    async def enrol(self, request: EnrolRequestRecord, peer: str) -> EnrolmentRecord:
        self.requests.append((request, peer))
        if request.token_secret != "good":
            raise GloraError(Reason.TOKEN_UNKNOWN, "This server does not know the token.", token=request.token_id)
        member = device("new", self.authority.key_of(request.certificate_request_pem))
        self.devices.members[member.key_sha256] = member
        return self._record(member, request.certificate_request_pem)

    async def renew(self, device: Device, certificate_request_pem: str) -> EnrolmentRecord:
        return self._record(device, certificate_request_pem)

    def _record(self, member: Device, request_pem: str) -> EnrolmentRecord:
        issued = self.authority.issue(request_pem, member.id, member.name)
        return EnrolmentRecord(
            device=member,
            certificate_pem=issued.pem,
            authority_pem=self.authority.certificate_pem,
            expires_at=issued.expires_at,
            approval_pending=False,
        )


@dataclass(slots=True)
class FakeObserver:
    """RpcObserver."""

    finished: list[tuple[str, str]] = field(default_factory=list)
    down: Counter[str] = field(default_factory=Counter)
    up: Counter[str] = field(default_factory=Counter)

    def rpc_finished(self, *, method: str, code: str, seconds: float) -> None:
        assert seconds >= 0
        self.finished.append((method, code))

    def transferred(self, assignment_id: AssignmentId, *, down: int = 0, up: int = 0) -> None:
        self.down[assignment_id] += down
        self.up[assignment_id] += up
