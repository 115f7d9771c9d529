"""Takes updates in: bytes are spooled to disk as they come, and become an update when all of them verify.

A partial upload is a file named after its assignment and digest; its size is what was committed, so any process can
go on with it after a crash. One stream at a time owns it: a newer stream fences the older one. A few fast streams
are admitted at a time, because gRPC reads ahead and memory would grow with their number; a slow stream gives its
place back, so that it cannot keep others waiting.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import structlog

from glora_server.coordinator.catalogue import Catalogue
from glora_server.coordinator.engine import Engine, one
from glora_server.coordinator.errors import assignment_closed, not_yours, storage_error
from glora_server.coordinator.expectations import max_upload_bytes
from glora_server.coordinator.hub import Hub
from glora_server.coordinator.messages import UploadHeader, UploadStateName, UploadStatus
from glora_server.coordinator.model import Device, Owed, OwedKind, Run, Upload
from glora_server.coordinator.ports import Blobs, Store, UnitOfWork
from glora_server.coordinator.run_spec import RunSpec
from glora_server.coordinator.spool import committed
from glora_server.coordinator.transitions import Transition, step
from glora_server.coordinator.upload_session import Place, UploadSession
from glora_server.coordinator.views import LiveProgress
from glora_server.coordinator.workspace import Workspace
from glora_server.rounds.assignment import Assignment, AssignmentEvent, AssignmentPhase, Prolong, Receive, StartUpload
from glora_server.rounds.ids import AssignmentId, RoundId
from glora_server.rounds.round import PROLONG_SECONDS, Moved
from glora_wire.digests import Digest
from glora_wire.errors import GloraError, Reason, Refusal

log = structlog.get_logger(__name__)


@dataclass(slots=True, kw_only=True)
class UploadService:
    """Uploads of all devices."""

    store: Store
    blobs: Blobs
    engine: Engine
    hub: Hub
    catalogue: Catalogue
    workspace: Workspace
    places: asyncio.Semaphore
    verdict_seconds: float = 600.0
    _sessions: dict[AssignmentId, UploadSession] = field(default_factory=dict)

    async def query(self, device: Device, assignment_id: AssignmentId, digest: Digest) -> UploadStatus:
        """What became of the update; raises ASSIGNMENT_UNKNOWN."""
        assignment, upload = await self.store.read(partial(_find, device, assignment_id))
        known = _answer(assignment, upload, digest)
        if known is not None:
            return known
        path = self.workspace.partial(assignment_id, digest)
        return UploadStatus(state="partial", committed_bytes=await asyncio.to_thread(committed, path))

    def __post_init__(self) -> None:
        """Clean up after every round."""
        self.engine.handle(OwedKind.CLOSED, self._round_closed)

    async def open(
        self, device: Device, assignment_id: AssignmentId, header: UploadHeader
    ) -> UploadSession | UploadStatus:
        """A session for the bytes, or the answer when the update is here already.

        Raises ASSIGNMENT_UNKNOWN, ASSIGNMENT_CLOSED, UPLOAD_CONFLICT, UPLOAD_TOO_LARGE, WEIGHT_INVALID, OFFSET_INVALID.
        """
        found = await self.store.read(partial(_wanted_in_run, device, assignment_id, header.digest))
        if isinstance(found, UploadStatus):
            opened: UploadSession | UploadStatus = found
        else:
            assignment, round_id, run, number = found
            await self._check_header(assignment, run, number, header)
            opened = await self._take_over(device, assignment, round_id, header)
        if isinstance(opened, UploadStatus) and opened.state == "received":
            return await self.verdict(assignment_id, header.digest)
        return opened

    async def _take_over(
        self, device: Device, assignment: Assignment, round_id: RoundId, header: UploadHeader
    ) -> UploadSession | UploadStatus:
        """A session that is the only one of its assignment, once there is room for it."""
        session = UploadSession(self, assignment, round_id, header, Place(self.places))
        try:
            await session.wait_for_place()
            while (older := self._sessions.get(assignment.id)) is not None:
                await older.end(_fenced())
            self._sessions[assignment.id] = session
            # Whoever was fenced may have handed in its update, and the round may have closed, in the meantime.
            found = await self.store.read(partial(_wanted, device, assignment.id, header.digest))
            if isinstance(found, UploadStatus):
                await session.close()
                return found
            await asyncio.to_thread(self._drop_other_partials, assignment.id, header.digest)
            await session.begin()
            await self._move(assignment.id, round_id, StartUpload())
        except BaseException:
            await session.close()
            raise
        return session

    async def _move(self, assignment_id: AssignmentId, round_id: RoundId, event: AssignmentEvent) -> None:
        """Tell the round; raises ASSIGNMENT_CLOSED when it went on without the device."""
        try:
            await self.engine.apply(round_id, Moved(assignment_id, event))
        except GloraError as error:
            if error.reason is not Reason.ILLEGAL_TRANSITION:
                raise
            assignment = await self.store.read(lambda uow: uow.rounds.assignment(assignment_id))
            raise assignment_closed(assignment) from error

    async def receive(self, assignment: Assignment, round_id: RoundId, header: UploadHeader, path: Path) -> None:
        """Make the verified file an update of the round, durably; drop it where the round went on without it."""
        now = await self.store.read(lambda uow: uow.rounds.assignment(assignment.id))
        if not now.is_open:
            await asyncio.to_thread(partial(path.unlink, missing_ok=True))
            return
        try:
            await asyncio.to_thread(self.blobs.adopt, path, header.digest)
        except OSError as error:
            raise storage_error(error) from error
        upload = Upload(
            assignment_id=assignment.id,
            round_id=round_id,
            device_id=assignment.device_id,
            version_id=assignment.version_id,
            digest=header.digest,
            adapter_config_json=header.adapter_config_json,
            training_rows=header.training_rows,
            completed_steps=header.completed_steps,
            stopped_early=header.stopped_early,
            training_loss=header.training_loss,
            training_seconds=header.training_seconds,
            received_at=self.engine.clock(),
        )
        try:
            await self.engine.commit(partial(self._receive, upload), moved=one)
        except GloraError as error:
            if error.reason is not Reason.ILLEGAL_TRANSITION:
                raise
            log.info("update_came_too_late", assignment=assignment.id, device=assignment.device_id)

    async def prolong(self, assignment: Assignment, round_id: RoundId) -> None:
        """Keep the device in the round a little longer, where its deadline is near; raises ASSIGNMENT_CLOSED."""
        until = self.engine.clock() + PROLONG_SECONDS
        if until > assignment.deadline_at:
            await self._move(assignment.id, round_id, Prolong(until))

    def moved(self, assignment: Assignment, done: int, total: int) -> None:
        """Show how far the upload is."""
        now = self.engine.clock()
        self.hub.seen(assignment.device_id, now)
        self.hub.progress[assignment.id] = LiveProgress(phase="uploading", done=done, total=total, loss=0.0, at=now)

    def closed(self, session: UploadSession) -> None:
        """Forget a session that ended."""
        if self._sessions.get(session.assignment.id) is session:
            del self._sessions[session.assignment.id]

    def _receive(self, upload: Upload, uow: UnitOfWork) -> Transition:
        uow.uploads.add(upload)
        moved = self.hub.traffic_of(upload.assignment_id).up
        event = Moved(upload.assignment_id, Receive(upload.training_rows, max(moved, upload.digest.size)))
        return step(uow, upload.round_id, event, at=self.engine.clock())

    async def verdict(self, assignment_id: AssignmentId, digest: Digest) -> UploadStatus:
        """The answer once the update was judged; "received" when that takes too long."""
        key: tuple[str, AssignmentId] = ("assignment", assignment_id)
        until = time.monotonic() + self.verdict_seconds
        while True:
            seen = self.hub.signals.revision(key)
            assignment, upload = await self.store.read(
                lambda uow: (uow.rounds.assignment(assignment_id), uow.uploads.find(assignment_id))
            )
            known = _answer(assignment, upload, digest)
            left = until - time.monotonic()
            if known is None or known.state != "received" or left <= 0:
                return known or UploadStatus(state="partial", committed_bytes=0)
            await self.hub.signals.wait(key, seen, left)

    async def _check_header(self, assignment: Assignment, run: Run, number: int, header: UploadHeader) -> None:
        spec = RunSpec.from_json(run.spec_json)
        wanted = await self.catalogue.of_round(spec, number)
        limit = max_upload_bytes(run.manifest, assignment.rank, spec.wire.dtype, wanted.upload_set)
        if header.digest.size > limit:
            raise GloraError(
                Reason.UPLOAD_TOO_LARGE,
                f"The update has {header.digest.size} bytes; an update of rank {assignment.rank} has at most {limit}.",
                size=header.digest.size,
                limit=limit,
            )
        if header.training_rows < 1:
            raise GloraError(
                Reason.WEIGHT_INVALID, "The update says that it was trained on no rows; an update needs at least one."
            )

    async def _round_closed(self, owed: Owed) -> None:
        """End the streams of a round that is over and drop what they left."""
        round_ = await self.store.read(lambda uow: uow.rounds.get(owed.round_id))
        for assignment in round_.assignments:
            if (session := self._sessions.get(assignment.id)) is not None:
                await session.end(assignment_closed(assignment))
        await asyncio.to_thread(self._drop_partials, [a.id for a in round_.assignments])

    def _drop_partials(self, assignment_ids: Sequence[AssignmentId]) -> None:
        for path in self.workspace.partials(*assignment_ids):
            path.unlink(missing_ok=True)

    def _drop_other_partials(self, assignment_id: AssignmentId, digest: Digest) -> None:
        keep = self.workspace.partial(assignment_id, digest)
        for path in self.workspace.partials(assignment_id):
            if path != keep:
                path.unlink(missing_ok=True)


def _find(device: Device, assignment_id: AssignmentId, uow: UnitOfWork) -> tuple[Assignment, Upload | None]:
    assignment = uow.rounds.assignment(assignment_id)
    if assignment.device_id != device.id:
        raise not_yours(assignment_id)
    return assignment, uow.uploads.find(assignment_id)


def _wanted(
    device: Device, assignment_id: AssignmentId, digest: Digest, uow: UnitOfWork
) -> tuple[Assignment, RoundId] | UploadStatus:
    """The assignment and its round when the bytes are wanted, else the answer; raises why they are not."""
    assignment, upload = _find(device, assignment_id, uow)
    known = _answer(assignment, upload, digest)
    if known is not None and known.state != "discarded":
        return known
    return assignment, _uploadable(assignment, upload, digest)


def _wanted_in_run(
    device: Device, assignment_id: AssignmentId, digest: Digest, uow: UnitOfWork
) -> tuple[Assignment, RoundId, Run, int] | UploadStatus:
    """As `_wanted`, with the run and the number of the round."""
    found = _wanted(device, assignment_id, digest, uow)
    if isinstance(found, UploadStatus):
        return found
    assignment, round_id = found
    return assignment, round_id, uow.runs.get(assignment.run_id), uow.rounds.number(round_id)


def _answer(assignment: Assignment, upload: Upload | None, digest: Digest) -> UploadStatus | None:
    """What is known of an update with this digest; None when nothing of it became an update."""
    if upload is None or upload.digest != digest:
        if not assignment.is_open:
            return UploadStatus(state="discarded", committed_bytes=0, refusal=_refusal(assignment))
        return None
    if assignment.phase is AssignmentPhase.RECEIVED:
        return UploadStatus(state="received", committed_bytes=digest.size)
    if assignment.phase is AssignmentPhase.ACCEPTED_UPDATE:
        return UploadStatus(state="accepted", committed_bytes=digest.size)
    state: UploadStateName = "rejected" if assignment.phase is AssignmentPhase.REJECTED else "discarded"
    return UploadStatus(state=state, committed_bytes=digest.size, refusal=_refusal(assignment))


def _fenced() -> GloraError:
    return GloraError(Reason.UPLOAD_FENCED, "A newer upload of the same update took over; this one ends.")


def _refusal(assignment: Assignment) -> Refusal:
    reason = assignment.reason or Reason.ASSIGNMENT_CLOSED
    message = assignment.message or f"The assignment is {assignment.phase.value}."
    return Refusal(reason=reason, message=message)


def _uploadable(assignment: Assignment, upload: Upload | None, digest: Digest) -> RoundId:
    """The round that the update is for; raises UPLOAD_CONFLICT or ASSIGNMENT_CLOSED."""
    if upload is not None and upload.digest != digest:
        raise GloraError(
            Reason.UPLOAD_CONFLICT,
            f"Another update ({upload.digest.hex[:12]}) was received for this assignment; drop this one.",
            assignment=assignment.id,
        )
    if not assignment.is_open or assignment.round_id is None:
        raise assignment_closed(assignment)
    return assignment.round_id
