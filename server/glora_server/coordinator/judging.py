"""Judges received updates: header against plan, then the numbers; the verdict is the round's next event."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path

import structlog

from glora_server.coordinator.blob_files import local_file
from glora_server.coordinator.engine import Engine, one
from glora_server.coordinator.expectations import check_file, check_scales, upload_specs
from glora_server.coordinator.model import Owed, OwedKind, Run, Upload
from glora_server.coordinator.numerics import retrying
from glora_server.coordinator.observer import Observer
from glora_server.coordinator.ports import Blobs, CheckJob, NumericsEngine, Store, UnitOfWork
from glora_server.coordinator.run_spec import RunSpec
from glora_server.coordinator.transitions import Transition, step
from glora_server.rounds.assignment import AcceptUpdate, Assignment, AssignmentPhase, RejectUpdate
from glora_server.rounds.round import GATHERING, Moved
from glora_wire.errors import GloraError, Reason, Refusal

log = structlog.get_logger(__name__)


class Judge:
    """Performs the owed effect "validate"."""

    def __init__(
        self, *, store: Store, blobs: Blobs, numerics: NumericsEngine, engine: Engine, observer: Observer
    ) -> None:
        self._store = store
        self._blobs = blobs
        self._numerics = numerics
        self._engine = engine
        self._observer = observer
        engine.handle(OwedKind.VALIDATE, self.validate)

    async def validate(self, owed: Owed) -> None:
        """Judge the update of the owed assignment; harmless when that was done before or the round is over."""
        found = await self._store.read(partial(_load, owed))
        if found is None:
            return
        run, assignment, upload = found
        refusal, norm = await self._verdict(run, assignment, upload)
        done = await self._engine.commit(partial(self._enter, owed, refusal, norm), moved=one)
        if done is None:
            return
        self._observer.upload_judged(refusal)
        if refusal is not None:
            log.warning(
                "update_rejected",
                run=run.name,
                assignment=assignment.id,
                device=assignment.device_id,
                reason=str(refusal.reason),
                message=refusal.message,
            )

    async def _verdict(self, run: Run, assignment: Assignment, upload: Upload) -> tuple[Refusal | None, float | None]:
        """The refusal, or None and the norm; trouble that passes is raised and leaves the verdict owed.

        An update that ends the worker three times in a row is refused: the round must not wait for it for ever.
        """
        try:
            async with local_file(self._blobs, upload.digest) as path:
                result = await retrying(partial(self._numerics.check, await self._job(run, assignment, upload, path)))
        except GloraError as error:
            if error.retry_after is not None:
                raise
            return error.as_refusal(), None
        except FileNotFoundError:
            message = "The server lost the bytes of the update; it cannot be counted in this round."
            return Refusal(reason=Reason.INTERNAL, message=message), None
        return result.refusal, result.norm

    async def _job(self, run: Run, assignment: Assignment, upload: Upload, path: Path) -> CheckJob:
        """The judgement of the numbers; raises what is wrong with the headers."""
        spec = RunSpec.from_json(run.spec_json)
        scales = await asyncio.to_thread(check_scales, upload.adapter_config_json, run.manifest, spec, assignment.rank)
        await asyncio.to_thread(check_file, path, run.manifest, assignment.rank, spec.wire.dtype)
        return CheckJob(
            path=path,
            scales=scales,
            expected=upload_specs(run.manifest, assignment.rank, spec.wire.dtype),
            max_norm=spec.limits.max_update_norm,
        )

    def _enter(self, owed: Owed, refusal: Refusal | None, norm: float | None, uow: UnitOfWork) -> Transition | None:
        if _load(owed, uow) is None or owed.assignment_id is None:
            return None
        uow.uploads.judged(owed.assignment_id, norm)
        verdict = AcceptUpdate() if refusal is None else RejectUpdate(refusal)
        return step(uow, owed.round_id, Moved(owed.assignment_id, verdict), at=self._engine.clock())


def _load(owed: Owed, uow: UnitOfWork) -> tuple[Run, Assignment, Upload] | None:
    """What is to be judged; None when there is nothing to judge any more."""
    if owed.assignment_id is None:
        return None
    round_ = uow.rounds.get(owed.round_id)
    assignment = round_.find(owed.assignment_id)
    upload = uow.uploads.find(owed.assignment_id)
    if round_.phase not in GATHERING or assignment.phase is not AssignmentPhase.RECEIVED or upload is None:
        return None
    return uow.runs.get(owed.run_id), assignment, upload
