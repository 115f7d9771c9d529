"""Adapters that are cut from a state: rendered once, kept as blobs, shared by devices.

One rendering per version, rank, number format and variant (what is cut, see ports.ReadoutVariant).
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, aclosing
from functools import partial
from pathlib import Path
from typing import Final

from glora_server.coordinator.model import Readout, Run, Version, new_id
from glora_server.coordinator.numerics import retrying
from glora_server.coordinator.ports import (
    Blobs,
    NumericsEngine,
    ReadoutVariant,
    RenderJob,
    Store,
    StrategyChoice,
)
from glora_server.coordinator.run_spec import RunSpec
from glora_server.coordinator.shards import read_shards, shards
from glora_server.coordinator.workspace import Workspace
from glora_server.rounds.ids import VersionId
from glora_wire.digests import Digest, HashAlgorithm, digest_file
from glora_wire.errors import GloraError, Reason
from glora_wire.manifest import Manifest
from glora_wire.names import dense_key, lora_key
from glora_wire.payload import layout
from glora_wire.tensors import TensorDtype, TensorSpec

_FROZEN: Final = frozenset({"tail", "state"})
"""Variants that devices load beside the adapter that they train; that one has the dense tensors."""

_Key = tuple[VersionId, int, ReadoutVariant]


class Readouts:
    """Renders adapters and hands out the files."""

    def __init__(
        self,
        *,
        store: Store,
        blobs: Blobs,
        numerics: NumericsEngine,
        workspace: Workspace,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._blobs = blobs
        self._numerics = numerics
        self._workspace = workspace
        self._clock = clock
        self._making: dict[_Key, asyncio.Task[Readout]] = {}

    async def ensure(
        self, run: Run, version: Version, rank: int, *, variant: ReadoutVariant = "train", first: int = 0
    ) -> Readout:
        """The adapter of that rank in the run's wire format; rendered now when it is asked for the first time.

        `first` is how many directions a "tail" leaves out; a version has one tail of each rank. Everyone who asks
        meanwhile shares one rendering, which goes on also when all of them go away.
        """
        key = (version.id, rank, variant)
        task = self._making.get(key)
        if task is None:
            task = self._making[key] = asyncio.create_task(self._ensure(run, version, rank, variant, first))
            task.add_done_callback(partial(self._made, key))
        return await asyncio.shield(task)

    def _made(self, key: _Key, task: asyncio.Task[Readout]) -> None:
        del self._making[key]
        if not task.cancelled():
            task.exception()  # those who still wait get it; nobody may be left

    async def _ensure(self, run: Run, version: Version, rank: int, variant: ReadoutVariant, first: int) -> Readout:
        spec = RunSpec.from_json(run.spec_json)
        dtype = spec.wire.dtype
        known = await self._store.read(lambda uow: uow.versions.readout(version.id, rank, dtype.value, variant))
        if known is not None and await asyncio.to_thread(self._blobs.exists, known.digest):
            return known
        path = self._workspace.scratch / f"readout-{new_id()}"
        try:
            ranks = dict.fromkeys((module.name for module in run.manifest.modules), rank)
            await self.render(
                run,
                version,
                ranks=ranks,
                scale=spec.lora.scale,
                dtype=dtype,
                path=path,
                variant=variant,
                first=first,
                with_dense=variant not in _FROZEN,
            )
            digest = await asyncio.to_thread(_sync_and_digest, path, spec.wire.hash)
            readout = Readout(
                version_id=version.id,
                rank=rank,
                dtype=dtype.value,
                variant=variant,
                digest=digest,
                created_at=self._clock(),
            )
            return await self._keep(path, readout)
        finally:
            await asyncio.to_thread(partial(path.unlink, missing_ok=True))

    def open(self, readout: Readout) -> tuple[Path, Callable[[], None]]:
        """The file of a readout and a function that gives it back."""
        stack = ExitStack()
        return stack.enter_context(self._blobs.local(readout.digest)), stack.close

    async def render(
        self,
        run: Run,
        version: Version,
        *,
        ranks: Mapping[str, int],
        scale: float,
        dtype: TensorDtype,
        path: Path,
        variant: ReadoutVariant = "train",
        first: int = 0,
        with_dense: bool = True,
    ) -> None:
        """Write the adapter file of `version` at `path`, each module at its rank of `ranks`.

        Raises VERSION_UNKNOWN when the version's tensors were dropped.
        """
        if version.pruned:
            raise GloraError(
                Reason.VERSION_UNKNOWN,
                f"Version {version.number} of run {run.name} was dropped by retention; "
                "raise retention.keep_versions or pin versions that you need.",
                version=version.number,
            )
        spec = RunSpec.from_json(run.spec_json)
        stored = set(await self._store.read(lambda uow: uow.versions.part_names(version.id)))
        if not with_dense:
            stored &= {module.name for module in run.manifest.modules}
        await asyncio.to_thread(_lay_out, path, present_specs(run.manifest, stored, ranks, dtype))
        for rank, names in _by_rank(run.manifest, stored, ranks):
            groups = tuple(shards(names, run.manifest, spec.lora.max_rank))
            async with aclosing(read_shards(self._store, version.id, groups)) as shards_read:
                async for parts in shards_read:
                    job = RenderJob(
                        path=path,
                        strategy=StrategyChoice(name=version.strategy, options=spec.strategy.options),
                        parts=parts,
                        rank=rank,
                        scale=scale,
                        seed=spec.seed,
                        version_number=version.number,
                        style=spec.lora.readout,
                        variant=variant,
                        first=first,
                    )
                    await retrying(partial(self._numerics.render, job))

    async def _keep(self, path: Path, readout: Readout) -> Readout:
        await asyncio.to_thread(self._blobs.adopt, path, readout.digest)
        await self._store.write(lambda uow: uow.versions.put_readout(readout))
        return readout


def present_specs(
    manifest: Manifest, stored: Collection[str], ranks: Mapping[str, int], dtype: TensorDtype
) -> tuple[TensorSpec, ...]:
    """Tensors of an adapter made from the `stored` parts; dense tensors that the server has no value of are absent."""
    specs: list[TensorSpec] = []
    for module in manifest.modules:
        rank = ranks[module.name]
        specs.append(TensorSpec(lora_key(module.name, "A"), dtype, (rank, module.in_features)))
        specs.append(TensorSpec(lora_key(module.name, "B"), dtype, (module.out_features, rank)))
    specs += (TensorSpec(dense_key(d.name), dtype, d.shape) for d in manifest.dense if d.name in stored)
    return tuple(specs)


def _by_rank(
    manifest: Manifest, stored: Collection[str], ranks: Mapping[str, int]
) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Names of the parts of each rank; dense parts come with the first."""
    dense = [d.name for d in manifest.dense if d.name in stored]
    for rank in sorted(set(ranks.values()), reverse=True):
        yield rank, (*(m.name for m in manifest.modules if ranks[m.name] == rank), *dense)
        dense = []


def _lay_out(path: Path, specs: Sequence[TensorSpec]) -> None:
    plan = layout(specs)
    with path.open("wb") as file:
        file.write(plan.header)
        file.truncate(plan.total_bytes)


def _sync_and_digest(path: Path, algorithm: HashAlgorithm) -> Digest:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return digest_file(path, algorithm)
