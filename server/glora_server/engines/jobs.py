"""What the worker does with each job: files and records in, files and records out; the mathematics is `aggregation`.

Every function takes the torch device to work on, keeps at most one part in memory at a time, and raises GloraError.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, get_args

import torch
from torch import Tensor

from glora_server.aggregation import (
    LayerState,
    ReadoutStyle,
    all_finite,
    delta_norm,
    empty_state,
    frozen_factors,
    readout,
)
from glora_server.coordinator.model import StatePart, TensorKind
from glora_server.coordinator.ports import CheckJob, CheckResult, InitialiseJob, RenderJob
from glora_server.engines.resident import NOWHERE, ResidentUploads
from glora_server.engines.states import VALUE, dense_part, module_part, module_state
from glora_server.engines.tensors import PayloadFile, from_record, header_of, to_bytes, wire_dtype
from glora_wire.errors import GloraError, Reason, Refusal
from glora_wire.names import Factor, LoraKey, dense_key, lora_key, split_key
from glora_wire.payload import PayloadHeader, TensorEntry, check_specs

_STYLES: Final[tuple[ReadoutStyle, ...]] = get_args(ReadoutStyle)
_FACTORS: Final[tuple[Factor, Factor]] = ("A", "B")
_LARGEST_NORM: Final = 1e30
"""What is far above it no float32 state could hold, and the round would fail for all devices."""


def initialise(job: InitialiseJob, device: torch.device) -> tuple[StatePart, ...]:
    """Parts of version 0: zero states, then dense tensors of standard deviation σ drawn from (seed, name)."""
    modules = [
        module_part(name, empty_state(out, in_, strategy=job.strategy.name, device=device))
        for name, out, in_ in job.modules
    ]
    dense = [dense_part(name, _drawn(job.seed, name, shape, deviation)) for name, shape, deviation in job.dense]
    return (*modules, *dense)


def render(job: RenderJob, device: torch.device) -> None:
    """Write what the job cuts from every part at its place in the file, whose header and size stay as they are.

    Raises GloraError: INTERNAL when the header has no fitting place, NON_FINITE when a number does not fit the
    header's number format, PAYLOAD_MALFORMED when the file is not a payload.
    """
    header = header_of(job.path)
    entries = header.by_name()
    with job.path.open("r+b") as file:
        for part in job.parts:
            for key, tensor in _rendered(part, job, header, device).items():
                entry = _place(entries, key, tensor)
                file.seek(entry.offset)
                file.write(_on_the_wire(tensor, entry))


def check(job: CheckJob, device: torch.device, resident: ResidentUploads = NOWHERE) -> CheckResult:
    """The verdict on an update's numbers; a file that cannot be used is a refusal as well.

    ‖ΔW‖_F per module and in total come from QR cores; ΔW is never formed. Of an update that is half a pair the other
    half is the one that was sent; without that only its numbers are looked at. What a good update holds stays in
    `resident`.
    """
    norms: dict[str, float] = {}
    try:
        update = _Update.open(job, device, resident)
        for module in update.modules():
            norms[module] = _module_norm(update, module, job.scales)
        for spec in job.expected:
            key = split_key(spec.name)
            if not (isinstance(key, LoraKey) and key.module in norms):
                update.finite(spec.name)
        total = math.hypot(*norms.values())
        refusal = _too_large(norms, total, job.max_norm)
        result = CheckResult(refusal=refusal, norm=total, module_norms=norms)
    except GloraError as error:
        result = CheckResult(refusal=error.as_refusal(), norm=None, module_norms={})
    if result.refusal is not None:
        resident.drop(job.digest)
    return result


def _drawn(seed: int, name: str, shape: tuple[int, ...], deviation: float) -> Tensor:
    if deviation == 0:
        return torch.zeros(shape, dtype=torch.float32)
    digest = hashlib.blake2b(f"{seed}\x1f{name}".encode(), digest_size=8, person=b"glora-dense").digest()
    # Drawn on the CPU whatever the device, so that every replica starts with the same tensor.
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    return torch.randn(shape, generator=generator, dtype=torch.float32) * deviation


def _rendered(part: StatePart, job: RenderJob, header: PayloadHeader, device: torch.device) -> Mapping[str, Tensor]:
    if part.kind is TensorKind.DENSE:
        key = dense_key(part.name)
        record = part.tensors.get(VALUE)
        if record is not None:
            return {key: from_record(record, device)}
        if any(spec.name == key for spec in header.specs):
            raise GloraError(Reason.INTERNAL, f"The dense tensor {part.name!r} has no value to write.", name=part.name)
        return {}
    state = module_state(part, strategy=job.strategy.name, device=device)
    b, a = _cut(state, part.name, job)
    return {lora_key(part.name, "A"): a, lora_key(part.name, "B"): b}


def _cut(state: LayerState, module: str, job: RenderJob) -> tuple[Tensor, Tensor]:
    """The factors that the job's variant asks for."""
    if job.variant in {"tail", "state"}:
        return frozen_factors(state, first=job.first, rank=job.rank, scale=job.scale)
    if job.variant == "fresh":
        state = empty_state(
            state.u.shape[0], state.a.shape[1], strategy=state.strategy, dtype=state.u.dtype, device=state.u.device
        )
    return readout(
        state,
        job.rank,
        job.scale,
        seed=job.seed,
        module=module,
        version=job.version_number,
        style=_style(job.style),
    )


def _style(name: str) -> ReadoutStyle:
    for style in _STYLES:
        if style == name:
            return style
    raise GloraError(Reason.SPEC_INVALID, f"There is no readout {name!r}; use one of {', '.join(_STYLES)}.")


def _place(entries: Mapping[str, TensorEntry], key: str, tensor: Tensor) -> TensorEntry:
    entry = entries.get(key)
    if entry is None or entry.spec.shape != tuple(tensor.shape):
        planned = "none" if entry is None else str(entry.spec.shape)
        raise GloraError(
            Reason.INTERNAL,
            f"The adapter's header plans {planned} for {key!r} and the state gives {tuple(tensor.shape)}.",
            name=key,
        )
    return entry


def _on_the_wire(tensor: Tensor, entry: TensorEntry) -> bytearray:
    rounded = tensor.to(wire_dtype(entry.spec.dtype))
    if not all_finite(rounded):
        raise GloraError(
            Reason.NON_FINITE,
            f"Tensor {entry.spec.name!r} has numbers that {entry.spec.dtype.value} cannot hold; "
            "choose bfloat16 or float32 as the wire dtype of the run.",
            name=entry.spec.name,
        )
    return to_bytes(rounded, rounded.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Update:
    """The update, and after it what was sent where the job says so: a tensor is the one of the first that has it."""

    job: CheckJob
    files: tuple[PayloadFile, ...]
    device: torch.device
    resident: ResidentUploads

    @classmethod
    def open(cls, job: CheckJob, device: torch.device, resident: ResidentUploads) -> _Update:
        header = header_of(job.path)
        check_specs(header, job.expected)
        files = [PayloadFile(path=job.path, entries=header.by_name())]
        if job.sent_path is not None:
            files.append(PayloadFile(path=job.sent_path, entries=header_of(job.sent_path).by_name()))
        return cls(job=job, files=tuple(files), device=device, resident=resident)

    def modules(self) -> Sequence[str]:
        """Modules of the update of which both factors are known, so that there is a ΔW to measure."""
        keys = (split_key(spec.name) for spec in self.job.expected)
        modules = dict.fromkeys(key.module for key in keys if isinstance(key, LoraKey))
        return [module for module in modules if all(self._holder(lora_key(module, factor)) for factor in _FACTORS)]

    def finite(self, key: str) -> Tensor:
        """The tensor; raises GloraError NON_FINITE."""
        file = self._holder(key) or self.files[0]
        tensor = file.read(key, self.device)
        _check_finite(key, tensor)
        if file is self.files[0]:
            self.resident.keep(self.job.digest, key, tensor)
        return tensor

    def _holder(self, key: str) -> PayloadFile | None:
        return next((file for file in self.files if file.has(key)), None)


def _module_norm(update: _Update, module: str, scales: Mapping[str, float]) -> float:
    if not math.isfinite(scales.get(module, math.nan)):
        raise GloraError(Reason.SCALE_WRONG, f"Module {module!r} has no finite LoRA scale.", module=module)
    b, a = (update.finite(lora_key(module, factor)) for factor in ("B", "A"))
    return delta_norm(b, a, scales[module])


def _check_finite(key: str, tensor: Tensor) -> None:
    if not all_finite(tensor):
        bad = int((~torch.isfinite(tensor)).sum())
        raise GloraError(
            Reason.NON_FINITE,
            f"Tensor {key!r} has {bad} of {tensor.numel()} numbers that are NaN or infinite; "
            "training diverged, so lower the learning rate.",
            name=key,
            count=bad,
        )


def _too_large(norms: Mapping[str, float], total: float, limit: float) -> Refusal | None:
    """What speaks against an update of that norm; `limit` of the run, 0 for none."""
    allowed, who = (limit, "the run allows") if limit > 0 else (_LARGEST_NORM, "no run can take more than")
    if total <= allowed:
        return None
    largest = max(norms, key=lambda module: norms[module])
    return Refusal(
        reason=Reason.NORM_TOO_LARGE,
        message=f"The update has Frobenius norm {total:.6g} and {who} {allowed:.6g}; "
        f"the largest part is {norms[largest]:.6g} in {largest!r}.",
    )
