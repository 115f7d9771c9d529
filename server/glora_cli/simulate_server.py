"""The server's side of a simulated run: the service's own jobs, called in this process on adapter files in a folder."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import load_file
from torch import Tensor

from glora_client.plan import AdapterUse, DeliveredAdapter
from glora_server.aggregation import ClientContract, InitSource, MergeInstruction, check_options, find_strategy
from glora_server.coordinator.expectations import check_file, check_scales, config_json, upload_specs
from glora_server.coordinator.model import StatePart, TensorKind
from glora_server.coordinator.ports import (
    AggregatedPart,
    AggregateJob,
    CheckJob,
    InitialiseJob,
    RenderJob,
    StrategyChoice,
    UpdateRef,
)
from glora_server.coordinator.readouts import present_specs
from glora_server.coordinator.run_spec import RunSpec
from glora_server.coordinator.shards import shards
from glora_server.engines import folding, jobs
from glora_server.engines.catalogue import contract
from glora_server.engines.states import module_state
from glora_server.engines.tensors import to_bytes, wire_dtype
from glora_server.rounds.ids import DeviceId
from glora_server.rounds.weights import weights
from glora_wire.errors import GloraError, Refusal
from glora_wire.manifest import BaseInit, Manifest, NormalInit
from glora_wire.names import lora_key
from glora_wire.payload import PayloadWriter, layout
from glora_wire.tensors import TensorSpec

_CPU: Final = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """What a virtual device sent: a payload file, its adapter_config.json and how many rows it trained on."""

    device_id: DeviceId
    path: Path
    config_json: str
    rank: int
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Folded:
    """What a round's aggregation said, module by module, and how many seconds it took."""

    modules: tuple[Mapping[str, object], ...]
    seconds: float


class SimulatedServer:
    """The state of one run and what the service does with it; every file is in the wire's number format."""

    def __init__(self, spec: RunSpec, manifest: Manifest, folder: Path) -> None:
        self._spec = spec
        self._manifest = manifest
        self._folder = folder
        self._choice = StrategyChoice(name=spec.strategy.name, options=spec.strategy.options)
        self._rule = check_options(spec.strategy.name, spec.strategy.options).get("rule")
        self._parts = self._blank = self._first_parts()
        self._files: dict[str, Path] = {}
        self.version = 0

    def contract(self) -> ClientContract:
        """What devices must do in the round that comes next."""
        return contract(self._choice, round_index=self.version)

    def offer(self, rank: int) -> tuple[DeliveredAdapter, ...]:
        """The adapters that a device of that rank is handed to train with, the one to train first."""
        wanted = self.contract()
        if wanted.init is not InitSource.FROZEN_STATE or self.version == 0:
            return (self._delivered(self.readout(rank), AdapterUse.TRAIN, rank), *self._merges())
        if self._rule == "frozen_tail":
            main = self._delivered(self.readout(rank), AdapterUse.TRAIN, rank)
            tail = self._spec.lora.max_rank - rank
            return (main, self._delivered(self._tail(rank), AdapterUse.FROZEN, tail)) if tail else (main,)
        top = self._spec.lora.max_rank
        return (
            self._delivered(self._fresh(rank), AdapterUse.TRAIN, rank),
            self._delivered(self.readout(top), AdapterUse.FROZEN, top),
        )

    def exhibit(self, rank: int) -> tuple[DeliveredAdapter, ...]:
        """The adapters that make the model of that rank, as an evaluating device is handed them."""
        return (self._delivered(self.readout(rank), AdapterUse.EVALUATE, rank), *self._merges())

    def personal(self, rank: int, own: Path, use: AdapterUse) -> DeliveredAdapter:
        """The readout with the B of the device's last adapter `own` in place of the server's."""
        tensors, kept = load_file(str(self.readout(rank))), load_file(str(own))
        for module in self._manifest.modules:
            tensors[lora_key(module.name, "B")] = kept[lora_key(module.name, "B")]
        path = own.with_name(f"{own.stem}-personal.safetensors")
        self._compose(path, rank, tensors)
        return self._delivered(path, use, rank)

    def readout(self, rank: int) -> Path:
        """The adapter file of the current version at that rank; rendered when it is asked for the first time."""
        return self._kept(f"readout-{rank}", rank, self._parts)

    def judge(self, upload: Upload) -> Refusal | None:
        """Why the update is not taken, by the checks of the service: scales, header, numbers, norm."""
        try:
            scales = check_scales(upload.config_json, self._manifest, self._spec, upload.rank)
            check_file(upload.path, self._manifest, upload.rank, self._spec.wire.dtype)
        except GloraError as error:
            return error.as_refusal()
        job = CheckJob(
            path=upload.path,
            scales=scales,
            expected=upload_specs(self._manifest, upload.rank, self._spec.wire.dtype),
            max_norm=self._spec.limits.max_update_norm,
        )
        return jobs.check(job, _CPU).refusal

    def fold(self, uploads: Sequence[Upload]) -> Folded:
        """Make the next version of these accepted updates; raises AGGREGATION_FAILED with what was refused."""
        begun = time.perf_counter()
        updates = self._updates(uploads)
        names = tuple(part.name for part in self._parts)
        parts = {part.name: part for part in self._parts}
        made: list[AggregatedPart] = []
        with torch.no_grad():
            for shard in shards(names, self._manifest, self._spec.lora.max_rank):
                job = AggregateJob(
                    strategy=self._choice,
                    parts=tuple(parts[name] for name in shard),
                    updates=updates,
                    rank=self._spec.lora.max_rank,
                    round_index=self.version,
                    wire_dtype=self._spec.wire.dtype.value,
                )
                made += folding.fold(job, _CPU)
        self._parts = tuple(item.part for item in made)
        self.version += 1
        self._forget()
        modules = tuple(json.loads(item.diagnostics_json) for item in made if item.part.kind is TensorKind.MODULE)
        return Folded(modules=modules, seconds=time.perf_counter() - begun)

    def skip(self) -> None:
        """Go on to the next round with the same state, when no update was accepted."""
        self.version += 1
        self._forget()

    def _updates(self, uploads: Sequence[Upload]) -> tuple[UpdateRef, ...]:
        limits = self._spec.limits
        shares = weights(
            [upload.rows for upload in uploads], max_rows=limits.max_training_rows, max_share=limits.max_weight_share
        )
        return tuple(
            UpdateRef(
                device_id=upload.device_id,
                path=upload.path,
                scales=check_scales(upload.config_json, self._manifest, self._spec, upload.rank),
                weight=share,
                sent_path=self.readout(upload.rank),
                sent_scale=self._spec.lora.scale,
            )
            for upload, share in zip(uploads, shares, strict=True)
        )

    def _first_parts(self) -> tuple[StatePart, ...]:
        dense = [d for d in self._manifest.dense if not isinstance(d.init, BaseInit)]
        job = InitialiseJob(
            strategy=self._choice,
            modules=tuple((m.name, m.out_features, m.in_features) for m in self._manifest.modules),
            dense=tuple((d.name, d.shape, d.init.std if isinstance(d.init, NormalInit) else 0.0) for d in dense),
            rank=self._spec.lora.max_rank,
            seed=self._spec.seed,
        )
        return jobs.initialise(job, _CPU)

    def _merges(self) -> tuple[DeliveredAdapter, ...]:
        """All that was merged into the base so far, as one adapter of scale 1; the base starts plain each time."""
        strategy = find_strategy(self._choice.name)
        if not self.contract().merges or self.version == 0:
            return ()
        found = {
            part.name: strategy.merge(module_state(part, strategy=strategy.name, device=_CPU), joining=True)
            for part in self._parts
            if part.kind is TensorKind.MODULE
        }
        given = {name: merge for name, merge in found.items() if merge is not None and merge.left.shape[1]}
        if not given:
            return ()
        rank = max(merge.left.shape[1] for merge in given.values())
        if "merge" not in self._files:
            tensors = load_file(str(self.readout(self._spec.lora.max_rank)))
            for module in self._manifest.modules:
                shape = module.out_features, module.in_features
                a, b = _padded(given.get(module.name), rank, shape)
                tensors[lora_key(module.name, "A")], tensors[lora_key(module.name, "B")] = a, b
            path = self._folder / f"v{self.version}-merge.safetensors"
            self._compose(path, rank, tensors)
            self._files["merge"] = path
        text = config_json(self._manifest, rank=rank, scale=1.0)
        return (DeliveredAdapter(path=self._files["merge"], config_json=text, use=AdapterUse.MERGE, rank=rank),)

    def _fresh(self, rank: int) -> Path:
        """B = 0 and A drawn from (seed, module, version), with the dense tensors of the current version."""
        blank = [part for part in self._blank if part.kind is TensorKind.MODULE]
        dense = [part for part in self._parts if part.kind is TensorKind.DENSE]
        return self._kept(f"fresh-{rank}", rank, (*blank, *dense))

    def _tail(self, rank: int) -> Path:
        """What the state holds beyond its readout of that rank: the last columns and rows of the largest readout."""
        key = f"tail-{rank}"
        if key not in self._files:
            top = self._spec.lora.max_rank
            tensors = load_file(str(self.readout(top)))
            for module in self._manifest.modules:
                a, b = lora_key(module.name, "A"), lora_key(module.name, "B")
                tensors[a], tensors[b] = tensors[a][rank:], tensors[b][:, rank:]
            path = self._folder / f"v{self.version}-{key}.safetensors"
            self._compose(path, top - rank, tensors)
            self._files[key] = path
        return self._files[key]

    def _kept(self, key: str, rank: int, parts: Sequence[StatePart]) -> Path:
        if key not in self._files:
            path = self._folder / f"v{self.version}-{key}.safetensors"
            self._render(path, rank, {part.name: part for part in parts})
            self._files[key] = path
        return self._files[key]

    def _render(self, path: Path, rank: int, parts: Mapping[str, StatePart]) -> None:
        plan = layout(self._specs(rank, parts))
        with path.open("wb") as file:
            file.write(plan.header)
            file.truncate(plan.total_bytes)
        for shard in shards(tuple(parts), self._manifest, self._spec.lora.max_rank):
            job = RenderJob(
                path=path,
                strategy=self._choice,
                parts=tuple(parts[name] for name in shard),
                rank=rank,
                scale=self._spec.lora.scale,
                seed=self._spec.seed,
                version_number=self.version,
                style=self._spec.lora.readout,
            )
            with torch.no_grad():
                jobs.render(job, _CPU)

    def _specs(self, rank: int, parts: Mapping[str, StatePart]) -> tuple[TensorSpec, ...]:
        ranks = dict.fromkeys((module.name for module in self._manifest.modules), rank)
        stored = [part.name for part in parts.values() if part.tensors]
        return present_specs(self._manifest, stored, ranks, self._spec.wire.dtype)

    def _compose(self, path: Path, rank: int, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors as an adapter of that rank in the wire's number format."""
        specs = self._specs(rank, {part.name: part for part in self._parts})
        dtype = wire_dtype(self._spec.wire.dtype)
        with PayloadWriter(path, specs) as writer:
            for spec in specs:
                writer.write(spec.name, to_bytes(tensors[spec.name], dtype))

    def _delivered(self, path: Path, use: AdapterUse, rank: int) -> DeliveredAdapter:
        lora = self._spec.lora
        text = config_json(self._manifest, rank=rank, scale=lora.scale, dropout=lora.dropout)
        return DeliveredAdapter(path=path, config_json=text, use=use, rank=rank)

    def _forget(self) -> None:
        for path in self._files.values():
            path.unlink(missing_ok=True)
        self._files.clear()


def _padded(merge: MergeInstruction | None, rank: int, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(A, B) of that rank whose product is the merge of a module: zeros where it has fewer directions."""
    a, b = torch.zeros(rank, shape[1]), torch.zeros(shape[0], rank)
    if merge is not None:
        own = merge.left.shape[1]
        a[:own], b[:, :own] = merge.right, merge.left
    return a, b
