"""Judges received updates: header against plan, then the numbers; the verdict is the round's next event."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial

import structlog

from glora_server.coordinator.blob_files import local_file
from glora_server.coordinator.catalogue import Catalogue
from glora_server.coordinator.engine import Engine, one
from glora_server.coordinator.expectations import check_file, check_scales, upload_specs, uploaded_rank
from glora_server.coordinator.model import Owed, OwedKind, Run, Upload, Version
from glora_server.coordinator.numerics import retrying
from glora_server.coordinator.observer import Observer
from glora_server.coordinator.ports import Blobs, CheckJob, NumericsEngine, Store, UnitOfWork
from glora_server.coordinator.readouts import Readouts
from glora_server.coordinator.run_spec import RunSpec
from glora_server.coordinator.transitions import Transition, step
from glora_server.rounds.assignment import AcceptUpdate, Assignment, AssignmentPhase, RejectUpdate
from glora_server.rounds.ids import AssignmentId, RoundId
from glora_server.rounds.round import GATHERING, Moved, Round
from glora_wire.errors import GloraError, Reason, Refusal

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    """An update that is to be judged, the round that it is for and the version that it was made from."""

    run: Run
    round_number: int
    base: Version
    assignment: Assignment
    upload: Upload


@dataclass(frozen=True, slots=True, kw_only=True)
class _Verdict:
    """What came of it: what speaks against it, its norm, and its rank where that is smaller than granted."""

    refusal: Refusal | None
    norm: float | None = None
    shrunk_rank: int | None = None


class Judge:
    """Performs the owed effect "validate"."""

    def __init__(
        self,
        *,
        store: Store,
        blobs: Blobs,
        numerics: NumericsEngine,
        readouts: Readouts,
        catalogue: Catalogue,
        engine: Engine,
        observer: Observer,
    ) -> None:
        self._store = store
        self._blobs = blobs
        self._numerics = numerics
        self._readouts = readouts
        self._catalogue = catalogue
        self._engine = engine
        self._observer = observer
        engine.handle(OwedKind.VALIDATE, self.validate)

    async def validate(self, owed: Owed) -> None:
        """Judge the update of the owed assignment; harmless when that was done before or the round is over."""
        case = await self._store.read(partial(_load, owed))
        if case is None:
            return
        verdict = await self._verdict(case)
        refusal = verdict.refusal
        done = await self._engine.commit(partial(self._enter, owed, verdict), moved=one)
        if done is None:
            return
        self._observer.upload_judged(refusal)
        if refusal is not None:
            log.warning(
                "update_rejected",
                run=case.run.name,
                assignment=case.assignment.id,
                device=case.assignment.device_id,
                reason=str(refusal.reason),
                message=refusal.message,
            )

    async def _verdict(self, case: _Case) -> _Verdict:
        """What speaks against the update, if anything does; trouble that passes is raised and leaves it owed.

        An update that ends the worker three times in a row is refused: the round must not wait for it for ever.
        """
        try:
            async with AsyncExitStack() as files:
                job, rank = await self._job(case, files)
                result = await retrying(partial(self._numerics.check, job))
        except GloraError as error:
            if error.retry_after is not None:
                raise
            return _Verdict(refusal=error.as_refusal())
        except FileNotFoundError:
            message = "The server lost the bytes of the update; it cannot be counted in this round."
            return _Verdict(refusal=Refusal(reason=Reason.INTERNAL, message=message))
        smaller = rank if result.refusal is None and rank < case.assignment.rank else None
        return _Verdict(refusal=result.refusal, norm=result.norm, shrunk_rank=smaller)

    async def _job(self, case: _Case, files: AsyncExitStack) -> tuple[CheckJob, int]:
        """The judgement of the numbers, and the update's rank; raises what is wrong with the headers."""
        run, text = case.run, case.upload.adapter_config_json
        spec = RunSpec.from_json(run.spec_json)
        wanted = await self._catalogue.of_round(spec, case.round_number)
        path = await files.enter_async_context(local_file(self._blobs, case.upload.digest))
        rank = uploaded_rank(text, run.manifest, case.assignment.rank, may_shrink=wanted.may_shrink)
        scales = await asyncio.to_thread(check_scales, text, run.manifest, spec, rank)
        await asyncio.to_thread(check_file, path, run.manifest, rank, spec.wire.dtype, wanted.upload_set)
        sent = None
        if wanted.upload_set != "both":
            readout = await self._readouts.ensure(run, case.base, case.assignment.rank)
            sent = await files.enter_async_context(local_file(self._blobs, readout.digest))
        job = CheckJob(
            path=path,
            scales=scales,
            expected=upload_specs(run.manifest, rank, spec.wire.dtype, wanted.upload_set),
            max_norm=spec.limits.max_update_norm,
            sent_path=sent,
            digest=case.upload.digest.text,
        )
        return job, rank

    def _enter(self, owed: Owed, found: _Verdict, uow: UnitOfWork) -> Transition | None:
        if owed.assignment_id is None or _due(owed.round_id, owed.assignment_id, uow) is None:
            return None
        uow.uploads.judged(owed.assignment_id, found.norm, found.shrunk_rank)
        verdict = AcceptUpdate() if found.refusal is None else RejectUpdate(found.refusal)
        return step(uow, owed.round_id, Moved(owed.assignment_id, verdict), at=self._engine.clock())


def _due(round_id: RoundId, assignment_id: AssignmentId, uow: UnitOfWork) -> tuple[Round, Assignment] | None:
    """The assignment in its round, when its update waits for a verdict."""
    round_ = uow.rounds.get(round_id)
    assignment = round_.find(assignment_id)
    due = round_.phase in GATHERING and assignment.phase is AssignmentPhase.RECEIVED
    return (round_, assignment) if due else None


def _load(owed: Owed, uow: UnitOfWork) -> _Case | None:
    """What is to be judged; None when there is nothing to judge any more."""
    if owed.assignment_id is None or (due := _due(owed.round_id, owed.assignment_id, uow)) is None:
        return None
    round_, assignment = due
    upload = uow.uploads.find(owed.assignment_id)
    if upload is None:
        return None
    return _Case(
        run=uow.runs.get(owed.run_id),
        round_number=round_.number,
        base=uow.versions.get(assignment.version_id),
        assignment=assignment,
        upload=upload,
    )
