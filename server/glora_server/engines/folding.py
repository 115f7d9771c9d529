"""Aggregation of one shard of parts: files of updates and the previous state in, the new state out."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from glora_server.aggregation import (
    AggregationError,
    AggregationResult,
    ClientContract,
    ClientDiagnostics,
    ClientUpdate,
    Diagnostics,
    LayerState,
    PrincipalAngles,
    UploadSet,
    aggregate_many,
    dense_average,
)
from glora_server.coordinator.model import StatePart, TensorKind
from glora_server.coordinator.ports import AggregatedPart, AggregateJob, UpdateRef
from glora_server.engines.catalogue import contract
from glora_server.engines.resident import NOWHERE, ResidentUploads
from glora_server.engines.states import dense_part, module_part, module_state
from glora_server.engines.tensors import PayloadFile
from glora_wire.errors import GloraError, Reason
from glora_wire.names import dense_key, lora_key

Factors = tuple[Tensor, Tensor]

_CPU_BYTES = 256 << 20
"""Uploads that threads on a CPU have in memory at once; exact computations take up to twelve times that beyond."""
_WORTH_A_THREAD = 512 << 10
"""Uploads of one module; threads with less to compute wait for the interpreter more than they help one another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """An update with its opened files."""

    update: UpdateRef
    file: PayloadFile
    sent: PayloadFile | None
    resident: ResidentUploads

    def read(self, key: str, device: torch.device) -> Tensor:
        """The tensor of the upload, which is not held any longer if it was; raises GloraError PAYLOAD_MALFORMED."""
        held = self.resident.take(self.update.digest, key)
        return self.file.read(key, device) if held is None else held


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    """A module's part to be folded, and the updates that carry it; `position` in the job."""

    position: int
    part: StatePart
    carriers: tuple[_Source, ...]

    @property
    def size(self) -> int:
        """Bytes of the uploads in their files."""
        keys = [lora_key(self.part.name, factor) for factor in ("A", "B")]
        held = [
            source.file.entries[key].spec.nbytes for source in self.carriers for key in keys if source.file.has(key)
        ]
        return sum(held)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Module:
    """A task with its state and uploads on the device."""

    task: _Task
    state: LayerState
    updates: tuple[ClientUpdate, ...]

    @property
    def size(self) -> int:
        """Bytes of the uploads in float32."""
        return 4 * sum(update.b.numel() + update.a.numel() for update in self.updates)


def fold(
    job: AggregateJob,
    device: torch.device,
    resident: ResidentUploads = NOWHERE,
    *,
    threads: int = 1,
    batch_bytes: int | None = None,
) -> tuple[AggregatedPart, ...]:
    """The new parts, in the order of the job; a part that no update carries stays as it is.

    Numbers that `resident` holds are taken from there, others read from their files. On a CPU each module is one
    thread's, `threads` at once where their uploads take no more than 256 MiB together. On a CUDA device modules are
    computed together whose uploads take about `batch_bytes` in float32, by default an eighth of what is free there; a
    CPU does so only where that is given.

    Raises GloraError: PAYLOAD_MALFORMED for a file that is gone, AGGREGATION_FAILED with what the aggregation refuses.
    """
    wanted = contract(job.strategy, round_index=job.round_index)
    sources = _open(job, wanted, resident)
    made: dict[int, AggregatedPart] = {}
    tasks: list[_Task] = []
    for position, part in enumerate(job.parts):
        if part.kind is TensorKind.DENSE:
            made[position] = _fold_dense(part, sources, device)
        elif carriers := tuple(source for source in sources if _carries(source, part.name, wanted.upload)):
            tasks.append(_Task(position=position, part=part, carriers=carriers))
        else:
            made[position] = AggregatedPart(part=part, diagnostics_json="{}")
    if device.type == "cuda" or batch_bytes is not None:
        made |= _in_batches(tasks, job, device, _room(device) if batch_bytes is None else batch_bytes)
    else:
        made |= _in_threads(tasks, job, device, threads)
    return tuple(made[position] for position in range(len(job.parts)))


def _in_batches(
    tasks: Sequence[_Task], job: AggregateJob, device: torch.device, limit: int
) -> dict[int, AggregatedPart]:
    """The new parts by their position, as many modules together as come to `limit` bytes."""
    made: dict[int, AggregatedPart] = {}
    batch: list[_Module] = []
    for task in tasks:
        batch.append(_load(task, job, device))
        if sum(module.size for module in batch) >= limit:
            made |= _fold_modules(batch, job)
            batch = []
    return made | _fold_modules(batch, job)


def _in_threads(
    tasks: Sequence[_Task], job: AggregateJob, device: torch.device, threads: int
) -> dict[int, AggregatedPart]:
    """The same, one module a thread: factors are too narrow to share the work of one module among threads."""
    made: dict[int, AggregatedPart] = {}
    largest = max((task.size for task in tasks), default=0)
    together = min(threads, len(tasks), _CPU_BYTES // max(1, largest)) if largest >= _WORTH_A_THREAD else 1

    def one(task: _Task) -> dict[int, AggregatedPart]:
        return _fold_modules([_load(task, job, device)], job)

    if together <= 1:
        for task in tasks:
            made |= one(task)
        return made
    with ThreadPoolExecutor(together, "fold", _start_thread, (torch.is_grad_enabled(),)) as pool:
        try:
            for found in pool.map(one, tasks):
                made |= found
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return made


def _start_thread(gradients: bool) -> None:
    """What is kept per thread: whether gradients are recorded, and among how many threads a product is shared."""
    torch.set_grad_enabled(gradients)
    torch.get_num_threads()  # asked for it, torch tells OpenMP; oneDNN asks nobody else, and would take all cores


def _room(device: torch.device) -> int:
    """See `fold`: a batch takes about four times its uploads in float32, and half of the rest stays free."""
    free, _ = torch.cuda.mem_get_info(device)
    return free // 8


def _open(job: AggregateJob, wanted: ClientContract, resident: ResidentUploads) -> tuple[_Source, ...]:
    keys: set[str] = set()
    for part in job.parts:
        if part.kind is TensorKind.DENSE:
            keys.add(dense_key(part.name))
        else:
            keys |= {lora_key(part.name, "A"), lora_key(part.name, "B")}
    # Devices of one rank were sent the same file.
    sent: dict[Path, PayloadFile] = {}
    sources = []
    for update in job.updates:
        path = update.sent_path if wanted.needs_sent else None
        if path is not None and path not in sent:
            sent[path] = PayloadFile.open(path, keys)
        sources.append(
            _Source(
                update=update,
                file=PayloadFile.open(update.path, keys),
                sent=None if path is None else sent[path],
                resident=resident,
            )
        )
    return tuple(sources)


def _fold_dense(part: StatePart, sources: Sequence[_Source], device: torch.device) -> AggregatedPart:
    key = dense_key(part.name)
    carriers = [source for source in sources if source.file.has(key)]
    if not carriers:
        return AggregatedPart(part=part, diagnostics_json="{}")
    try:
        mean = dense_average(
            [source.read(key, device).to(torch.float32) for source in carriers],
            [source.update.weight for source in carriers],
        )
    except AggregationError as error:
        raise _failed(part, carriers, error) from error
    return AggregatedPart(part=dense_part(part.name, mean), diagnostics_json="{}")


def _load(task: _Task, job: AggregateJob, device: torch.device) -> _Module:
    return _Module(
        task=task,
        state=module_state(task.part, strategy=job.strategy.name, device=device),
        updates=tuple(_client_updates(task.part.name, task.carriers, device)),
    )


def _fold_modules(modules: Sequence[_Module], job: AggregateJob) -> dict[int, AggregatedPart]:
    """The new parts by their position."""
    try:
        results = _aggregated(modules, job)
    except AggregationError as error:
        if len(modules) > 1:  # one by one, so that the error can name its part
            return {position: made for module in modules for position, made in _fold_modules([module], job).items()}
        raise _failed(modules[0].task.part, modules[0].task.carriers, error) from error
    return {
        module.task.position: AggregatedPart(
            part=module_part(module.task.part.name, result.state),
            diagnostics_json=_as_json(result.diagnostics, module.task.carriers),
        )
        for module, result in zip(modules, results, strict=True)
    }


def _aggregated(modules: Sequence[_Module], job: AggregateJob) -> tuple[AggregationResult, ...]:
    return aggregate_many(
        job.strategy.name,
        [module.state for module in modules],
        [module.updates for module in modules],
        rank=job.rank,
        round_index=job.round_index,
        options=job.strategy.options,
        batched=len(modules) > 1,
    )


def _carries(source: _Source, module: str, upload: UploadSet) -> bool:
    """Whether the update has the module; raises GloraError when it lacks a factor that was to be uploaded."""
    present = {factor: source.file.has(lora_key(module, factor)) for factor in ("A", "B")}
    wanted = ("A", "B") if upload is UploadSet.BOTH else (upload.value.upper(),)
    if any(present.values()) and not all(present[factor] for factor in wanted):
        raise GloraError(
            Reason.TENSOR_NAMES_WRONG,
            f"The update of device {source.update.device_id} has no factor "
            f"{' or '.join(factor for factor in wanted if not present[factor])} of {module!r}.",
            device=source.update.device_id,
            module=module,
        )
    return any(present.values())


def _client_updates(module: str, carriers: Sequence[_Source], device: torch.device) -> list[ClientUpdate]:
    sent: dict[Path, Factors] = {}
    updates = []
    for source in carriers:
        if source.sent is not None and source.sent.path not in sent:
            sent[source.sent.path] = _factors(source.sent, module, device)
        b, a = _uploaded(source, module, device)
        updates.append(
            ClientUpdate(
                b,
                a,
                _scale(source.update, module),
                source.update.weight,
                sent=None if source.sent is None else sent[source.sent.path],
                sent_scale=source.update.sent_scale,
            )
        )
    return updates


def _uploaded(source: _Source, module: str, device: torch.device) -> Factors:
    """The factors of the update; one that was not uploaded has rank 0, which is how ClientUpdate says absent."""
    file, keys = source.file, (lora_key(module, "B"), lora_key(module, "A"))
    b, a = (source.read(key, device) if file.has(key) else None for key in keys)
    if b is not None and a is not None:
        return b, a
    if source.sent is None:
        raise GloraError(
            Reason.INTERNAL,
            f"The update of device {source.update.device_id} has one factor of {module!r}, and there is no record of "
            "the adapter that it was sent.",
            device=source.update.device_id,
            module=module,
        )
    # The sent adapter tells the width that the absent factor would have.
    if b is not None:
        return b, b.new_zeros((0, source.sent.entries[keys[1]].spec.shape[1]))
    assert a is not None  # noqa: S101 - _carries saw one of them
    return a.new_zeros((source.sent.entries[keys[0]].spec.shape[0], 0)), a


def _factors(file: PayloadFile, module: str, device: torch.device) -> Factors:
    keys = lora_key(module, "B"), lora_key(module, "A")
    for key in keys:
        if not file.has(key):
            raise GloraError(
                Reason.TENSOR_NAMES_WRONG, f"The adapter {file.path.name} has no tensor {key!r}.", name=key
            )
    return file.read(keys[0], device), file.read(keys[1], device)


def _scale(update: UpdateRef, module: str) -> float:
    if module not in update.scales:
        raise GloraError(
            Reason.SCALE_WRONG,
            f"There is no LoRA scale for module {module!r} in the update of device {update.device_id}.",
            device=update.device_id,
            module=module,
        )
    return update.scales[module]


def _failed(part: StatePart, carriers: Sequence[_Source], error: AggregationError) -> GloraError:
    devices = ", ".join(f"{position} = {source.update.device_id}" for position, source in enumerate(carriers))
    return GloraError(
        Reason.AGGREGATION_FAILED,
        f"{part.name} could not be aggregated: {error} (Updates: {devices}.)",
        part=part.name,
        cause=error.reason,
    )


def _as_json(diagnostics: Diagnostics, carriers: Sequence[_Source]) -> str:
    values = _shallow(diagnostics)
    values["angles"] = None if diagnostics.angles is None else _shallow(diagnostics.angles)
    values["clients"] = [
        {"device_id": source.update.device_id, **_shallow(client)}
        for source, client in zip(carriers, diagnostics.clients, strict=True)
    ]
    try:
        return _dumped(values)
    except ValueError:  # NaN or an infinity, seldom enough that nobody looks for them first
        return _dumped(finite_only(values))


def _shallow(record: Diagnostics | ClientDiagnostics | PrincipalAngles) -> dict[str, object]:
    """The record's fields by name; `asdict` copies every number, which took a tenth of a fast fold."""
    return {field.name: getattr(record, field.name) for field in fields(record)}


def _dumped(values: object) -> str:
    return json.dumps(values, allow_nan=False, separators=(",", ":"))


def finite_only(value: object) -> object:
    """The same with null in place of NaN and infinities, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite_only(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_only(item) for item in value]
    return value
