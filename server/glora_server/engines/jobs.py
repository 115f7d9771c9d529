"""What the worker does with each job: files and records in, files and records out; the mathematics is `aggregation`.

Every function takes the torch device to work on, keeps at most one part in memory at a time, and raises GloraError.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Final, get_args

import torch
from torch import Tensor

from glora_server.aggregation import ReadoutStyle, delta_norm, empty_state, readout
from glora_server.coordinator.model import StatePart, TensorKind
from glora_server.coordinator.ports import CheckJob, CheckResult, InitialiseJob, RenderJob
from glora_server.engines.states import VALUE, dense_part, module_part, module_state
from glora_server.engines.tensors import PayloadFile, from_record, header_of, to_bytes, wire_dtype
from glora_wire.errors import GloraError, Reason, Refusal
from glora_wire.names import LoraKey, dense_key, lora_key, split_key
from glora_wire.payload import PayloadHeader, TensorEntry, check_specs

_STYLES: Final[tuple[ReadoutStyle, ...]] = get_args(ReadoutStyle)


def initialise(job: InitialiseJob, device: torch.device) -> tuple[StatePart, ...]:
    """Parts of version 0: zero states, then dense tensors of standard deviation σ drawn from (seed, name)."""
    modules = [
        module_part(name, empty_state(out, in_, strategy=job.strategy.name, device=device))
        for name, out, in_ in job.modules
    ]
    dense = [dense_part(name, _drawn(job.seed, name, shape, deviation)) for name, shape, deviation in job.dense]
    return (*modules, *dense)


def render(job: RenderJob, device: torch.device) -> None:
    """Write the readout of every part of the job at its place in the file, whose header and size stay as they are.

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


def check(job: CheckJob, device: torch.device) -> CheckResult:
    """The verdict on an update's numbers; a file that cannot be used is a refusal as well.

    ‖ΔW‖_F per module and in total come from QR cores; ΔW is never formed.
    """
    norms: dict[str, float] = {}
    try:
        file = _expected_file(job)
        for module in _modules(job):
            norms[module] = _module_norm(file, module, job.scales, device)
        for spec in job.expected:
            key = split_key(spec.name)
            if not (isinstance(key, LoraKey) and key.module in norms):
                _finite(file, spec.name, device)
    except GloraError as error:
        return CheckResult(refusal=error.as_refusal(), norm=None, module_norms={})
    total = math.hypot(*norms.values())
    return CheckResult(refusal=_too_large(norms, total, job.max_norm), norm=total, module_norms=norms)


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
    b, a = readout(
        state,
        job.rank,
        job.scale,
        seed=job.seed,
        module=part.name,
        version=job.version_number,
        style=_style(job.style),
    )
    return {lora_key(part.name, "A"): a, lora_key(part.name, "B"): b}


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
    if not bool(torch.isfinite(rounded).all()):
        raise GloraError(
            Reason.NON_FINITE,
            f"Tensor {entry.spec.name!r} has numbers that {entry.spec.dtype.value} cannot hold; "
            "choose bfloat16 or float32 as the wire dtype of the run.",
            name=entry.spec.name,
        )
    return to_bytes(rounded, rounded.dtype)


def _expected_file(job: CheckJob) -> PayloadFile:
    header = header_of(job.path)
    check_specs(header, job.expected)
    return PayloadFile(path=job.path, entries=header.by_name())


def _modules(job: CheckJob) -> Sequence[str]:
    """Modules with both factors; a strategy that uploads only one has no ΔW to measure."""
    factors: dict[str, set[str]] = {}
    for spec in job.expected:
        key = split_key(spec.name)
        if isinstance(key, LoraKey):
            factors.setdefault(key.module, set()).add(key.factor)
    return [module for module, found in factors.items() if found == {"A", "B"}]


def _module_norm(file: PayloadFile, module: str, scales: Mapping[str, float], device: torch.device) -> float:
    if not math.isfinite(scales.get(module, math.nan)):
        raise GloraError(Reason.SCALE_WRONG, f"Module {module!r} has no finite LoRA scale.", module=module)
    b = _finite(file, lora_key(module, "B"), device)
    a = _finite(file, lora_key(module, "A"), device)
    return delta_norm(b, a, scales[module])


def _finite(file: PayloadFile, key: str, device: torch.device) -> Tensor:
    tensor = file.read(key, device)
    finite = torch.isfinite(tensor)
    if not bool(finite.all()):
        bad = int((~finite).sum())
        raise GloraError(
            Reason.NON_FINITE,
            f"Tensor {key!r} has {bad} of {tensor.numel()} numbers that are NaN or infinite; "
            "training diverged, so lower the learning rate.",
            name=key,
            count=bad,
        )
    return tensor


def _too_large(norms: Mapping[str, float], total: float, limit: float) -> Refusal | None:
    if limit <= 0 or total <= limit:
        return None
    largest = max(norms, key=lambda module: norms[module])
    return Refusal(
        reason=Reason.NORM_TOO_LARGE,
        message=f"The update has Frobenius norm {total:.6g} and the run allows {limit:.6g}; "
        f"the largest part is {norms[largest]:.6g} in {largest!r}.",
    )
