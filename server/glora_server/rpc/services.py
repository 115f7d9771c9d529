"""What the gRPC edge needs from the rest of the server; the use cases satisfy these by their shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

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
from glora_server.coordinator.model import Device, Profile
from glora_server.rounds.ids import AssignmentId
from glora_wire.digests import Digest
from glora_wire.errors import Refusal


class DeviceUseCases(Protocol):
    """What a device may ask in a round; each may raise GloraError."""

    async def identify(self, key_sha256: str) -> Device:
        """The device of that key; raises CERTIFICATE_UNKNOWN and DEVICE_REVOKED, _SUSPENDED, _PENDING."""
        ...

    async def wait_for_work(self, device: Device, profile: Profile, *, timeout: float) -> WorkAnswer:  # noqa: ASYNC109
        """Work as soon as there is some, or an answer without an offer after `timeout` seconds."""
        ...

    async def accepted(self, device: Device, assignment_id: AssignmentId) -> ProgressAnswer:
        """The device took the work."""
        ...

    async def progress(
        self, device: Device, assignment_id: AssignmentId, *, phase: str, done: int, total: int, loss: float
    ) -> ProgressAnswer:
        """Where the device stands; `phase` is a DevicePhase of the protos in lower case."""
        ...

    async def declined(
        self, device: Device, assignment_id: AssignmentId, refusal: Refusal, *, permanent: bool
    ) -> ProgressAnswer:
        """The device would not."""
        ...

    async def failed(
        self, device: Device, assignment_id: AssignmentId, refusal: Refusal, *, permanent: bool
    ) -> ProgressAnswer:
        """The device could not."""
        ...

    async def measured(
        self, device: Device, assignment_id: AssignmentId, evaluations: Sequence[EvaluationRecord], *, complete: bool
    ) -> None:
        """Store evaluations."""
        ...

    async def open_adapter(
        self, device: Device, assignment_id: AssignmentId, *, key: str, offset: int, digest: Digest | None
    ) -> OpenAdapter:
        """The adapter, open until it is closed; raises DIGEST_CHANGED, OFFSET_INVALID, ADAPTER_UNKNOWN."""
        ...

    async def delivered(self, device: Device, assignment_id: AssignmentId, key: str) -> None:
        """The last byte of the adapter was sent."""
        ...


class UploadStream(Protocol):
    """One stream of an update on its way in."""

    async def chunk(self, offset: int, data: bytes | memoryview) -> None:
        """Store `data` at `offset`; never called again before it returned."""
        ...

    async def finish(self, digest: Digest) -> UploadStatus:
        """The verdict about the whole update."""
        ...

    async def close(self) -> None:
        """End the stream and keep what arrived; always called, also after `finish`."""
        ...


class UploadUseCases(Protocol):
    """How updates come in."""

    async def query(self, device: Device, assignment_id: AssignmentId, digest: Digest) -> UploadStatus:
        """How much has arrived and what became of it."""
        ...

    async def open(
        self, device: Device, assignment_id: AssignmentId, header: UploadHeader
    ) -> UploadStream | UploadStatus:
        """A stream to write to, or the answer where this update was answered already."""
        ...


class EnrolmentUseCases(Protocol):
    """How devices become members and stay it."""

    async def enrol(self, request: EnrolRequestRecord, peer: str) -> EnrolmentRecord:
        """A device with a certificate."""
        ...

    async def renew(self, device: Device, certificate_request_pem: str) -> EnrolmentRecord:
        """The same device with a new certificate."""
        ...


class PeerLimit(Protocol):
    """How often an address may call."""

    def check(self, peer: str) -> None:
        """Count one call; raises TOO_MANY_REQUESTS."""
        ...


class ServerIdentity(Protocol):
    """The certificates that the server shows and the one that it checks devices with."""

    @property
    def certificate_pem(self) -> str:
        """The authority's certificate."""
        ...

    @property
    def server_key_pem(self) -> bytes:
        """The server's private key."""
        ...

    @property
    def server_chain_pem(self) -> bytes:
        """The server's certificate and then the authority's."""
        ...

    def key_of_certificate(self, certificate_pem: bytes) -> str:
        """Hex SHA-256 of the public key in a certificate; raises CERTIFICATE_UNKNOWN."""
        ...


class RpcObserver(Protocol):
    """Counts calls and payload bytes; must be quick and must not fail."""

    def rpc_finished(self, *, method: str, code: str, seconds: float) -> None:
        """A call ended with the status code of that name."""
        ...

    def transferred(self, assignment_id: AssignmentId, *, down: int = 0, up: int = 0) -> None:
        """Payload bytes of an assignment went to (`down`) or came from (`up`) a device."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class UseCases:
    """Everything that calls are passed on to."""

    devices: DeviceUseCases
    uploads: UploadUseCases
    enrolment: EnrolmentUseCases


@dataclass(frozen=True, slots=True, kw_only=True)
class RpcSettings:
    """Addresses and times of the two gRPC servers; times in seconds, port 0 = any free one."""

    host: str = "0.0.0.0"  # noqa: S104 - devices dial in from elsewhere; mutual TLS guards the port
    port: int = 7443
    enrolment_host: str = "0.0.0.0"  # noqa: S104 - as above; a join token guards it
    enrolment_port: int = 7444
    public_host: str = ""
    """Host that devices should dial after joining; empty = the one that they joined at."""
    public_port: int = 0
    """Port that devices should dial after joining, where it is not `port`; 0 = the bound one."""
    poll_min_seconds: float = 25.0
    poll_max_seconds: float = 45.0
    """A long poll ends at a random moment between the two, so that devices do not come in step."""
    stall_seconds: float = 120.0
    """A transfer that moves nothing for so long is ended; the device resumes it."""
    grace_seconds: float = 5.0
    """How long calls may go on when the server stops."""
