"""Folds a round's accepted updates into the next version: part by part, then one transaction that makes it current.

Parts of the unpublished version are written in short transactions while later ones are computed; the last
transaction publishes the version, moves the run's pointer, ends the round and notes what is owed, together. The
version's id is the round's id, so a second try after a crash finds what the first one left and goes on.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, replace
from functools import partial

import structlog

from glora_server.coordinator.blob_files import delete_all, local_file
from glora_server.coordinator.catalogue import Catalogue
from glora_server.coordinator.engine import Engine
from glora_server.coordinator.expectations import check_scales, uploaded_rank
from glora_server.coordinator.history import note_version
from glora_server.coordinator.hub import Hub
from glora_server.coordinator.model import (
    ModuleDiagnostics,
    Owed,
    OwedKind,
    Readout,
    Run,
    StatePart,
    TensorKind,
    Upload,
    Version,
)
from glora_server.coordinator.numerics import retrying
from glora_server.coordinator.observer import Observer
from glora_server.coordinator.ports import (
    AggregatedPart,
    AggregateJob,
    Blobs,
    NumericsEngine,
    Store,
    StrategyChoice,
    UnitOfWork,
    UpdateRef,
)
from glora_server.coordinator.readouts import Readouts
from glora_server.coordinator.run_spec import RunSpec
from glora_server.coordinator.shards import read_shards, shards
from glora_server.coordinator.transitions import Transition, step
from glora_server.rounds.assignment import AssignmentPhase
from glora_server.rounds.ids import VersionId
from glora_server.rounds.round import AggregationDone, AggregationFailed, Round, RoundPhase
from glora_server.rounds.weights import weights
from glora_wire.digests import Digest
from glora_wire.errors import GloraError, Reason, Refusal

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    run: Run
    round: Round
    base: Version
    uploads: tuple[Upload, ...]


class Folder:
    """Performs the owed effect "aggregate"."""

    def __init__(
        self,
        *,
        store: Store,
        blobs: Blobs,
        numerics: NumericsEngine,
        readouts: Readouts,
        catalogue: Catalogue,
        engine: Engine,
        hub: Hub,
        observer: Observer,
    ) -> None:
        self._store = store
        self._blobs = blobs
        self._numerics = numerics
        self._readouts = readouts
        self._catalogue = catalogue
        self._engine = engine
        self._hub = hub
        self._observer = observer
        engine.handle(OwedKind.AGGREGATE, self.aggregate)
        engine.handle(OwedKind.CLOSED, self._round_closed)

    async def aggregate(self, owed: Owed) -> None:
        """Make the version of the owed round; harmless when that was done before or the round was aborted."""
        work = await self._store.read(partial(_load, owed))
        if work is None:
            return
        begun = time.perf_counter()
        try:
            await self._make_parts(work)
            commit_begun = time.perf_counter()
            _, pruned = await self._engine.commit(partial(self._publish, work), moved=lambda made: (made[0],))
        except GloraError as error:
            if error.retry_after is not None:
                raise
            await self._give_up(work, owed, error.as_refusal())
            return
        except FileNotFoundError:
            lost = Refusal(reason=Reason.AGGREGATION_FAILED, message="The server lost the bytes of an update.")
            await self._give_up(work, owed, lost)
            return
        ended = time.perf_counter()
        seconds = ended - begun
        self._observer.aggregated(seconds=seconds, commit_seconds=ended - commit_begun, updates=len(work.uploads))
        log.info(
            "version_published",
            run=work.run.name,
            version=work.round.number,
            updates=len(work.uploads),
            seconds=round(seconds, 3),
        )
        await delete_all(self._blobs, (readout.digest for readout in pruned))
        self._wake_evaluators()

    async def _give_up(self, work: _Work, owed: Owed, refusal: Refusal) -> None:
        """End the round, unless it was ended meanwhile and that is why its parts could not be stored."""
        if await self._store.read(partial(_load, owed)) is None:
            return
        log.error(
            "aggregation_failed",
            run=work.run.name,
            round=work.round.number,
            reason=str(refusal.reason),
            message=refusal.message,
        )
        await self._engine.apply(work.round.id, AggregationFailed(refusal))

    async def _round_closed(self, owed: Owed) -> None:
        """Drop what a round that is over leaves behind: updates that nobody reads again, a version half made."""
        await delete_all(self._blobs, await self._store.read(partial(_unneeded_uploads, owed)))
        await self._store.write(partial(_drop_unfinished, owed))

    async def _make_parts(self, work: _Work) -> None:
        spec = RunSpec.from_json(work.run.spec_json)
        names, done = await self._store.read(partial(_progress, work))
        if done is None:
            await self._store.write(partial(self._begin, work))
        left = [name for name in names if name not in (done or ())]
        async with AsyncExitStack() as files:
            updates = await self._updates(work, spec, files)
            groups = tuple(shards(left, work.run.manifest, spec.lora.max_rank))
            await self._make_shards(work, spec, updates, groups)

    async def _make_shards(
        self, work: _Work, spec: RunSpec, updates: tuple[UpdateRef, ...], groups: Sequence[Sequence[str]]
    ) -> None:
        """Fold shard after shard; meanwhile the next one is read and the last one stored."""
        storing: asyncio.Task[None] | None = None
        try:
            async with aclosing(read_shards(self._store, work.base.id, groups)) as shards_read:
                async for previous in shards_read:
                    made = await self._fold(work, spec, updates, previous)
                    if storing is not None:
                        await storing
                    storing = asyncio.create_task(self._put(work, made))
            if storing is not None:
                await storing
        finally:
            if storing is not None:
                await asyncio.gather(storing, return_exceptions=True)

    async def _fold(
        self, work: _Work, spec: RunSpec, updates: tuple[UpdateRef, ...], previous: tuple[StatePart, ...]
    ) -> tuple[AggregatedPart, ...]:
        job = AggregateJob(
            strategy=StrategyChoice(name=spec.strategy.name, options=spec.strategy.options),
            parts=previous,
            updates=updates,
            rank=spec.lora.max_rank,
            round_index=work.round.number - 1,
            wire_dtype=spec.wire.dtype.value,
        )
        return await retrying(partial(self._numerics.aggregate, job))

    async def _put(self, work: _Work, made: tuple[AggregatedPart, ...]) -> None:
        await self._store.write(partial(_put_parts, VersionId(work.round.id), made))

    async def _updates(self, work: _Work, spec: RunSpec, files: AsyncExitStack) -> tuple[UpdateRef, ...]:
        shares = _shares(work, spec)
        wanted = await self._catalogue.of_round(spec, work.round.number)
        refs = []
        for upload, share in zip(work.uploads, shares, strict=True):
            granted, text = work.round.find(upload.assignment_id).rank, upload.adapter_config_json
            rank = uploaded_rank(text, work.run.manifest, granted, may_shrink=wanted.may_shrink)
            sent = None
            if wanted.needs_sent:
                readout = await self._readouts.ensure(work.run, work.base, granted)
                sent = await files.enter_async_context(local_file(self._blobs, readout.digest))
            refs.append(
                UpdateRef(
                    device_id=upload.device_id,
                    path=await files.enter_async_context(local_file(self._blobs, upload.digest)),
                    scales=await asyncio.to_thread(check_scales, text, work.run.manifest, spec, rank),
                    weight=share,
                    sent_path=sent,
                    sent_scale=spec.lora.scale,
                    digest=upload.digest.text,
                )
            )
        return tuple(refs)

    def _begin(self, work: _Work, uow: UnitOfWork) -> None:
        spec = RunSpec.from_json(work.run.spec_json)
        uow.versions.add(
            Version(
                id=VersionId(work.round.id),
                run_id=work.run.id,
                number=work.round.number,
                round_id=work.round.id,
                parent_id=work.base.id,
                strategy=spec.strategy.name,
                published=False,
                created_at=self._engine.clock(),
            )
        )

    def _publish(self, work: _Work, uow: UnitOfWork) -> tuple[Transition, tuple[Readout, ...]]:
        version_id = VersionId(work.round.id)
        run = uow.runs.get(work.run.id)
        spec = RunSpec.from_json(run.spec_json)
        by_module = {d.module: json.loads(d.values_json) for d in uow.versions.diagnostics(version_id)}
        measured = list(by_module.values())
        uow.versions.publish(version_id, json.dumps(summarise(measured)))
        at = self._engine.clock()
        note_version(uow, work.round, work.uploads, _shares(work, spec), by_module, at=at)
        uow.runs.save(replace(run, version_id=version_id, rounds_done=work.round.number))
        done = step(uow, work.round.id, AggregationDone(), at=at)
        return done, uow.versions.prune(run.id, keep=spec.retention.keep_versions)

    def _wake_evaluators(self) -> None:
        for device_id, (profile, _) in self._hub.available(self._engine.clock()).items():
            if profile.evaluates:
                self._hub.wake_device(device_id)


def _shares(work: _Work, spec: RunSpec) -> tuple[float, ...]:
    """The weight of each update in the mean."""
    return weights(
        [upload.training_rows for upload in work.uploads],
        max_rows=spec.limits.max_training_rows,
        max_share=spec.limits.max_weight_share,
    )


def _load(owed: Owed, uow: UnitOfWork) -> _Work | None:
    round_ = uow.rounds.get(owed.round_id)
    if round_.phase is not RoundPhase.AGGREGATING:
        return None
    accepted = {a.id for a in round_.assignments if a.phase is AssignmentPhase.ACCEPTED_UPDATE}
    return _Work(
        run=uow.runs.get(owed.run_id),
        round=round_,
        base=uow.versions.get(round_.version_id),
        uploads=tuple(upload for upload in uow.uploads.of_round(round_.id) if upload.assignment_id in accepted),
    )


def _unneeded_uploads(owed: Owed, uow: UnitOfWork) -> tuple[Digest, ...]:
    """Contents of the round's updates, without those that a readout or a live round has in common with them."""
    run = uow.runs.get(owed.run_id)
    uploads = uow.uploads.of_round(owed.round_id)
    if not uploads or RunSpec.from_json(run.spec_json).retention.keep_uploads:
        return ()
    needed = set(uow.versions.readout_digests())
    for live in uow.rounds.live():
        needed |= {upload.digest.text for upload in uow.uploads.of_round(live.id)}
    return tuple(upload.digest for upload in uploads if upload.digest.text not in needed)


def _drop_unfinished(owed: Owed, uow: UnitOfWork) -> None:
    if uow.rounds.get(owed.round_id).phase is not RoundPhase.COMMITTED:
        uow.versions.drop(VersionId(owed.round_id))


def _progress(work: _Work, uow: UnitOfWork) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
    """Names of all parts of the next version, and of those that are stored already (None: nothing is)."""
    manifest = work.run.manifest
    names = tuple(m.name for m in manifest.modules) + tuple(d.name for d in manifest.dense)
    try:
        uow.versions.get(VersionId(work.round.id))
    except GloraError:
        return names, None
    return names, uow.versions.part_names(VersionId(work.round.id))


def _put_parts(version_id: VersionId, made: Sequence[AggregatedPart], uow: UnitOfWork) -> None:
    uow.versions.put_parts(version_id, *(item.part for item in made))
    measured = (
        ModuleDiagnostics(version_id=version_id, module=item.part.name, values_json=item.diagnostics_json)
        for item in made
        if item.part.kind is TensorKind.MODULE
    )
    uow.versions.put_diagnostics(*measured)


def summarise(modules: Sequence[Mapping[str, object]]) -> dict[str, float]:
    """Means over modules of every number that aggregation measured for each of them."""
    sums: dict[str, list[float]] = {}
    for values in modules:
        for name, value in values.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                sums.setdefault(name, []).append(float(value))
    return {name: sum(values) / len(values) for name, values in sorted(sums.items())}
