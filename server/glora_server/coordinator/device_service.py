"""What devices ask in a round: work, adapters, and to be heard."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from glora_server.coordinator.catalogue import Catalogue
from glora_server.coordinator.engine import Engine
from glora_server.coordinator.errors import assignment_closed, not_yours
from glora_server.coordinator.evaluations import has_unseen_version, next_evaluation, without_pruned
from glora_server.coordinator.expectations import config_json, max_upload_bytes
from glora_server.coordinator.hub import Hub
from glora_server.coordinator.members import Members
from glora_server.coordinator.messages import (
    AdapterOffer,
    EvaluationRecord,
    OpenAdapter,
    ProgressAnswer,
    WorkAnswer,
    WorkOffer,
)
from glora_server.coordinator.model import Device, DeviceState, Measurement, Profile, Run, Version
from glora_server.coordinator.notices import notices_for
from glora_server.coordinator.offers import offered_adapters
from glora_server.coordinator.opening import Opener, seed_of
from glora_server.coordinator.ports import Store, UnitOfWork
from glora_server.coordinator.readouts import Readouts
from glora_server.coordinator.run_spec import RunSpec
from glora_server.coordinator.views import LiveProgress
from glora_server.rounds import assignment as machine
from glora_server.rounds.assignment import (
    AWAITED,
    Accept,
    Assignment,
    AssignmentEvent,
    AssignmentKind,
    AssignmentPhase,
    Complete,
    Decline,
    Deliver,
    Fail,
    Prolong,
)
from glora_server.rounds.ids import AssignmentId, DeviceId
from glora_server.rounds.round import LIVE, Moved
from glora_wire.digests import Digest
from glora_wire.errors import GloraError, Reason, Refusal

_STATES = {
    DeviceState.PENDING: (Reason.DEVICE_PENDING, "waits for an operator: glora device approve {name}"),
    DeviceState.SUSPENDED: (Reason.DEVICE_SUSPENDED, "was suspended by an operator; it may work again once approved"),
    DeviceState.REVOKED: (Reason.DEVICE_REVOKED, "was revoked by an operator; it has to join again with a new token"),
}


_EVALUATION_SECONDS = 3600.0
"""How long a device that took an evaluation has for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """An assignment with all that it is about."""

    assignment: Assignment
    run: Run
    spec: RunSpec
    version: Version
    number: int
    """Of the round; of the version where there is no round (evaluations)."""


@dataclass(slots=True, kw_only=True)
class DeviceService:
    """The use cases of CoordinatorService, uploads excepted."""

    store: Store
    engine: Engine
    opener: Opener
    hub: Hub
    readouts: Readouts
    catalogue: Catalogue
    _members: Members = field(init=False)

    def __post_init__(self) -> None:
        """Know nobody yet."""
        self._members = Members(self.store, self.hub)

    async def identify(self, key_sha256: str) -> Device:
        """The device that holds the key; raises when it may not speak now."""
        device = await self._members.holder(key_sha256)
        if device is None:
            raise GloraError(
                Reason.CERTIFICATE_UNKNOWN,
                "The server does not know this device's certificate; join again with a new token.",
            )
        if device.state is not DeviceState.APPROVED:
            reason, what = _STATES[device.state]
            message = f"Device {device.name} {what.format(name=device.name)}."
            raise GloraError(reason, message, device=device.name)
        self.hub.seen(device.id, self.engine.clock())
        return device

    async def wait_for_work(self, device: Device, profile: Profile, *, timeout: float) -> WorkAnswer:  # noqa: ASYNC109 - a long poll has one
        """An offer as soon as there is one; else what speaks against it, at once if that is news to the device."""
        key = ("device", device.id)
        until = time.monotonic() + timeout
        answered = False
        self.hub.arrive(device.id, profile, self.engine.clock())
        try:
            await self.opener.device_arrived()
            while True:
                seen = self.hub.signals.revision(key)
                offer = await self._offer(device, profile)
                since = self.hub.since(device.id)
                notices = () if offer else await self.store.read(partial(notices_for, device, profile, since))
                left = until - time.monotonic()
                against = frozenset((notice.run_name, notice.reason.value) for notice in notices)
                if offer is not None or left <= 0 or self.hub.is_news(device.id, against):
                    answered = True
                    self.hub.tell(device.id, against)
                    return WorkAnswer(offer=offer, notices=notices)
                if await self.hub.signals.wait(key, seen, left) != seen:
                    # What woke it may be that it was revoked, or granted another rank.
                    device = await self.identify(device.key_sha256)
        finally:
            self.hub.leave(device.id, self.engine.clock(), lost=not answered)

    async def _offer(self, device: Device, profile: Profile) -> WorkOffer | None:
        waiting, work = await self.store.read(partial(_waiting, device.id))
        if work is not None:
            return await self._describe(work)
        if waiting:
            waiting = await self.store.write(partial(without_pruned, waiting, at=self.engine.clock()))
        if not waiting and profile.evaluates and await self.store.read(has_unseen_version(device, profile)):
            made = await self.store.write(lambda uow: next_evaluation(uow, device, profile, at=self.engine.clock()))
            waiting = [made] if made is not None else []
        if not waiting:
            return None
        return await self._describe(await self.store.read(partial(_work, waiting[0])))

    async def _describe(self, work: _Work) -> WorkOffer:
        assignment, run, spec = work.assignment, work.run, work.spec
        wanted = await self.catalogue.of_round(spec, work.number)
        limit = 0
        if assignment.kind is AssignmentKind.TRAIN:
            limit = max_upload_bytes(run.manifest, assignment.rank, spec.wire.dtype, wanted.upload_set)
        return WorkOffer(
            assignment=assignment,
            run=run,
            spec=spec,
            round_number=work.number,
            version=work.version,
            adapters=await self._adapters(work),
            strategy=wanted,
            max_upload_bytes=limit,
            seed=seed_of(spec.seed, run.id, work.number, assignment.device_id),
            deadline_at=self._deadline(assignment),
        )

    async def _adapters(self, work: _Work) -> tuple[AdapterOffer, ...]:
        """What the device downloads; the same answer for as long as the assignment is open."""
        wanted = await self.catalogue.of_round(work.spec, work.number)
        held = 0
        if wanted.frozen:
            ranks = await self.store.read(lambda uow: uow.versions.module_ranks(work.version.id))
            held = max(ranks.values(), default=0)
        return offered_adapters(work.assignment, wanted, held)

    def _deadline(self, assignment: Assignment) -> float:
        """Evaluations have no round whose deadline could move: they get their time again whenever they are offered."""
        if assignment.kind is AssignmentKind.TRAIN:
            return assignment.deadline_at
        return max(assignment.deadline_at, self.engine.clock() + 600.0)

    async def accepted(self, device: Device, assignment_id: AssignmentId) -> ProgressAnswer:
        """The device took the work."""
        return await self._report(device, assignment_id, Accept())

    async def progress(
        self, device: Device, assignment_id: AssignmentId, *, phase: str, done: int, total: int, loss: float
    ) -> ProgressAnswer:
        """Show how far the device is, also while it measures what it has sent; kept in memory only."""
        assignment = await self.store.read(partial(_own, device, assignment_id))
        if assignment.is_open:
            loss = loss if math.isfinite(loss) else 0.0
            live = LiveProgress(phase=phase, done=done, total=total, loss=loss, at=self.engine.clock())
            self.hub.progress[assignment_id] = live
            self.hub.run_changed(assignment.run_id)
        elif assignment.phase is AssignmentPhase.ACCEPTED_UPDATE:
            self.hub.measures(device.id, assignment.run_id)
        return self._answer(assignment)

    async def declined(
        self, device: Device, assignment_id: AssignmentId, refusal: Refusal, *, permanent: bool
    ) -> ProgressAnswer:
        """The device would not."""
        return await self._report(device, assignment_id, Decline(refusal, permanent))

    async def failed(
        self, device: Device, assignment_id: AssignmentId, refusal: Refusal, *, permanent: bool
    ) -> ProgressAnswer:
        """The device could not."""
        return await self._report(device, assignment_id, Fail(refusal, permanent))

    async def measured(
        self,
        device: Device,
        assignment_id: AssignmentId,
        evaluations: Sequence[EvaluationRecord],
        *,
        complete: bool,
    ) -> None:
        """Store evaluations; `complete` ends an EVALUATE assignment."""
        for item in evaluations:
            _check_evaluation(item)
        assignment = await self.store.write(partial(self._measured, device, assignment_id, tuple(evaluations)))
        if complete and assignment.kind is AssignmentKind.EVALUATE and assignment.is_open:
            await self._move(assignment, Complete())
        self.hub.run_changed(assignment.run_id)

    def _measured(
        self, device: Device, assignment_id: AssignmentId, evaluations: tuple[EvaluationRecord, ...], uow: UnitOfWork
    ) -> Assignment:
        assignment = _own(device, assignment_id, uow)
        version = uow.versions.get(assignment.version_id)
        uow.measurements.put(
            [
                Measurement(
                    assignment_id=assignment_id,
                    run_id=assignment.run_id,
                    device_id=device.id,
                    version_id=version.id,
                    version_number=version.number,
                    phase=item.phase,
                    rank=item.rank,
                    loss=item.loss,
                    accuracy=item.accuracy,
                    rows=item.rows,
                    seconds=item.seconds,
                    measured_at=self.engine.clock(),
                )
                for item in evaluations
            ]
        )
        newest = uow.lists.newest_round(assignment.run_id)
        if newest is None or newest.id != assignment.round_id or newest.phase not in LIVE:
            # What comes in while its round goes on is counted when that ends (coordinator/history.py).
            uow.history.rescore(assignment.run_id, version.number)
        return assignment

    async def open_adapter(
        self, device: Device, assignment_id: AssignmentId, *, key: str, offset: int, digest: Digest | None
    ) -> OpenAdapter:
        """The adapter file of an open assignment, rendered when it is asked for the first time."""
        work = await self.store.read(partial(_own_work, device, assignment_id))
        run, spec = work.run, work.spec
        if not work.assignment.is_open:
            raise assignment_closed(work.assignment)
        offer = next((offer for offer in await self._adapters(work) if offer.key == key), None)
        if offer is None:
            raise GloraError(Reason.ADAPTER_UNKNOWN, f"The assignment has no adapter {key!r}.", adapter=key)
        readout = await self.readouts.ensure(run, work.version, offer.rank, variant=offer.variant, first=offer.first)
        _check_resume(readout.digest, offset, digest)
        path, release = await asyncio.to_thread(self.readouts.open, readout)
        # Dropout is for what is trained: the frozen part is the model as it is.
        dropout = 0.0 if offer.use == "frozen" else spec.lora.dropout
        return OpenAdapter(
            digest=readout.digest,
            adapter_config_json=config_json(run.manifest, rank=offer.rank, scale=spec.lora.scale, dropout=dropout),
            path=path,
            release=release,
        )

    async def delivered(self, device: Device, assignment_id: AssignmentId, key: str) -> None:
        """An adapter went out whole."""
        work = await self.store.read(partial(_own_work, device, assignment_id))
        offers = await self._adapters(work)
        if key == offers[-1].key and work.assignment.is_open:
            await self._move(
                work.assignment, Deliver(self.hub.traffic_of(assignment_id).down)
            )  # a round that closed meanwhile does not undo the download

    async def _report(self, device: Device, assignment_id: AssignmentId, event: AssignmentEvent) -> ProgressAnswer:
        assignment = await self.store.read(partial(_own, device, assignment_id))
        if assignment.is_open:
            assignment = await self._move(assignment, event)
        return self._answer(assignment)

    async def _move(self, assignment: Assignment, event: AssignmentEvent) -> Assignment:
        """The assignment after `event`, or as its round left it when that was faster; raises ILLEGAL_TRANSITION."""
        if assignment.round_id is None:
            return await self._move_evaluation(assignment.id, event)
        try:
            round_ = await self.engine.apply(assignment.round_id, Moved(assignment.id, event))
        except GloraError as error:
            now = await self.store.read(lambda uow: uow.rounds.assignment(assignment.id))
            if error.reason is not Reason.ILLEGAL_TRANSITION or now.is_open:
                raise
            return now
        return round_.find(assignment.id)

    async def _move_evaluation(self, assignment_id: AssignmentId, event: AssignmentEvent) -> Assignment:
        at = self.engine.clock()

        def work(uow: UnitOfWork) -> Assignment:
            before = uow.rounds.assignment(assignment_id)
            after = machine.advance(before, event, at=at)
            if isinstance(event, Accept):
                after = machine.advance(after, Prolong(at + _EVALUATION_SECONDS), at=at)
            if after != before:
                uow.rounds.save_assignment(after)
            return after

        moved = await self.store.write(work)
        if not moved.is_open:
            self.hub.drop_assignments([moved.id])
        self.hub.run_changed(moved.run_id)
        return moved

    def _answer(self, assignment: Assignment) -> ProgressAnswer:
        # Whose update was accepted may still measure what it trained.
        if assignment.is_open or assignment.phase is AssignmentPhase.ACCEPTED_UPDATE:
            return ProgressAnswer(cancelled=False, deadline_at=self._deadline(assignment))
        return ProgressAnswer(
            cancelled=True,
            reason=str(assignment.reason or Reason.ASSIGNMENT_CLOSED),
            deadline_at=assignment.deadline_at,
        )


def _own(device: Device, assignment_id: AssignmentId, uow: UnitOfWork) -> Assignment:
    assignment = uow.rounds.assignment(assignment_id)
    if assignment.device_id != device.id:
        raise not_yours(assignment_id)
    return assignment


def _own_work(device: Device, assignment_id: AssignmentId, uow: UnitOfWork) -> _Work:
    return _work(_own(device, assignment_id, uow), uow)


def _work(assignment: Assignment, uow: UnitOfWork) -> _Work:
    run, version = uow.runs.get(assignment.run_id), uow.versions.get(assignment.version_id)
    return _Work(
        assignment=assignment,
        run=run,
        spec=RunSpec.from_json(run.spec_json),
        version=version,
        number=version.number if assignment.round_id is None else uow.rounds.number(assignment.round_id),
    )


def _waiting(device_id: DeviceId, uow: UnitOfWork) -> tuple[list[Assignment], _Work | None]:
    """What the device could begin with, and all about what it should train where that is among it."""
    waiting = [a for a in uow.rounds.open_for(device_id) if a.phase in AWAITED]
    train = next((a for a in waiting if a.kind is AssignmentKind.TRAIN), None)
    return waiting, None if train is None else _work(train, uow)


def _check_resume(current: Digest, offset: int, wanted: Digest | None) -> None:
    if offset > 0 and wanted != current:
        raise GloraError(Reason.DIGEST_CHANGED, "The adapter is not the one that the download began with; start again.")
    if not 0 <= offset <= current.size:
        raise GloraError(
            Reason.OFFSET_INVALID, f"The adapter has {current.size} bytes; {offset} is not a position in it."
        )


def _check_evaluation(item: EvaluationRecord) -> None:
    if item.rows < 1 or not math.isfinite(item.loss) or not 0.0 <= item.accuracy <= 1.0 or item.rank < 1:
        raise GloraError(
            Reason.METRICS_INVALID,
            f"An evaluation needs rows (got {item.rows}), a finite loss ({item.loss}), an accuracy from 0 to 1 "
            f"({item.accuracy}) and a rank ({item.rank}).",
        )
