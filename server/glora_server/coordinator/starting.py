"""Checks a new run and makes its first state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

from glora_server.coordinator.model import Run, StatePart, Version, new_id
from glora_server.coordinator.numerics import retrying
from glora_server.coordinator.ports import InitialiseJob, NumericsEngine, Store, StrategyChoice, UnitOfWork
from glora_server.coordinator.run_spec import RunSpec
from glora_server.rounds.ids import RunId, VersionId
from glora_server.rounds.run import RunPhase
from glora_wire.errors import GloraError, Reason
from glora_wire.manifest import BaseInit, Manifest, NormalInit

PRUNING_KEYS: Final = frozenset({"hetlora_gamma", "hetlora_lambda"})
"""What devices read in training.extra (glora_client.pruning)."""
_TAKEN_NAMES: Final = frozenset({"new"})
"""Names that a run's page could not have."""


@dataclass(slots=True, kw_only=True)
class RunStarter:
    """What happens before the first round."""

    store: Store
    numerics: NumericsEngine
    clock: Callable[[], float]

    async def draft(self, spec: RunSpec, manifest: Manifest) -> Run:
        """A run that could work, not stored yet; raises when strategy, ranks and manifest do not fit together."""
        if spec.name in _TAKEN_NAMES:
            raise GloraError(
                Reason.SPEC_INVALID,
                f"A run cannot be named {spec.name!r}, for /runs/{spec.name} is the form for new runs; choose another.",
            )
        if manifest.task != spec.model.task:
            raise GloraError(
                Reason.MANIFEST_INVALID,
                f"The manifest is for {manifest.task}, but model.task of the run is {spec.model.task}.",
            )
        await self.check_strategy(spec)
        return Run(
            id=RunId(new_id()),
            name=spec.name,
            phase=RunPhase.CREATED,
            spec_json=spec.to_json(),
            manifest=manifest,
            version_id=None,
            created_at=self.clock(),
        )

    async def check_strategy(self, spec: RunSpec) -> None:
        """Return when the strategy can serve the run's options and ranks; raises what speaks against it."""
        choice = StrategyChoice(name=spec.strategy.name, options=spec.strategy.options)
        refusal = await retrying(
            partial(self.numerics.check_strategy, choice, min_rank=spec.policy.min_rank, max_rank=spec.lora.max_rank)
        )
        if refusal is not None:
            raise GloraError(refusal.reason, refusal.message)
        prunes = sorted(key for key in spec.training.extra if key in PRUNING_KEYS)
        if prunes and not (await retrying(partial(self.numerics.describe, choice, round_index=0))).may_shrink:
            raise GloraError(
                Reason.SPEC_INVALID,
                f"training.extra has {' and '.join(prunes)}, by which devices shrink their rank, and strategy "
                f"{choice.name} does not take smaller ranks than it granted; leave them out or use hetlora.",
            )

    async def first_version(self, run: Run) -> VersionId:
        """Version 0, stored and not published: an empty state, dense tensors drawn from the run's seed."""
        spec = RunSpec.from_json(run.spec_json)
        dense = [d for d in run.manifest.dense if not isinstance(d.init, BaseInit)]
        job = InitialiseJob(
            strategy=StrategyChoice(name=spec.strategy.name, options=spec.strategy.options),
            modules=tuple((m.name, m.out_features, m.in_features) for m in run.manifest.modules),
            dense=tuple((d.name, d.shape, d.init.std if isinstance(d.init, NormalInit) else 0.0) for d in dense),
            rank=spec.lora.max_rank,
            seed=spec.seed,
        )
        parts = await retrying(partial(self.numerics.initialise, job))
        version = Version(
            id=VersionId(f"{run.id}0"),
            run_id=run.id,
            number=0,
            round_id=None,
            parent_id=None,
            strategy=spec.strategy.name,
            published=False,
            created_at=self.clock(),
        )
        await self.store.write(partial(_store, version, parts))
        return version.id


def _store(version: Version, parts: tuple[StatePart, ...], uow: UnitOfWork) -> None:
    """Stores the parts; a start that was cut off before may have left the version already."""
    try:
        known = uow.versions.get(version.id)
    except GloraError:
        uow.versions.add(version)
    else:
        if known.published:
            return
    uow.versions.put_parts(version.id, *parts)
