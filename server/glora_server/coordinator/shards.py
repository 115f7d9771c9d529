"""A state in shards, for it is never whole in memory: some of its parts at a time, the next ones read ahead."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from functools import partial

from glora_server.coordinator.model import StatePart, TensorKind
from glora_server.coordinator.ports import Store, UnitOfWork
from glora_server.rounds.ids import VersionId
from glora_wire.manifest import Manifest

SHARD_BYTES = 16 * 1024 * 1024
"""How much of a state goes to the worker at a time; a few times as much is in memory."""


def shards(names: Sequence[str], manifest: Manifest, rank: int) -> Iterator[tuple[str, ...]]:
    """`names` in groups of at most SHARD_BYTES of state (float32), each group at least one part."""
    sizes = {module.name: 4 * rank * (module.out_features + module.in_features) for module in manifest.modules}
    group: list[str] = []
    size = 0
    for name in names:
        own = sizes.get(name, 1)
        if group and size + own > SHARD_BYTES:
            yield tuple(group)
            group, size = [], 0
        group.append(name)
        size += own
    if group:
        yield tuple(group)


async def read_shards(
    store: Store, version_id: VersionId, groups: Sequence[Sequence[str]]
) -> AsyncGenerator[tuple[StatePart, ...]]:
    """The parts of each group; the next group is being read while the caller works on one.

    A dense tensor that was never aggregated comes without tensors. Raises VERSION_UNKNOWN, DIGEST_MISMATCH.
    """
    reading: asyncio.Task[tuple[StatePart, ...]] | None = None
    try:
        for names in (*groups, None):
            parts = None if reading is None else await reading
            reading = None if names is None else asyncio.create_task(_read(store, version_id, names))
            if parts is not None:
                yield parts
    finally:
        if reading is not None:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)


async def _read(store: Store, version_id: VersionId, names: Sequence[str]) -> tuple[StatePart, ...]:
    return await store.read(partial(_parts, version_id, names))


def _parts(version_id: VersionId, names: Sequence[str], uow: UnitOfWork) -> tuple[StatePart, ...]:
    stored = set(uow.versions.part_names(version_id))
    found = {part.name: part for part in uow.versions.parts(version_id, [name for name in names if name in stored])}
    return tuple(found.get(name) or StatePart(name=name, kind=TensorKind.DENSE, tensors={}) for name in names)
