"""A numerics engine in a few lines of numpy that keeps the port's contract: tiny tensors, real files, no worker.

State of a module: u (out, k), a (k, in), sigma (k,), with ΔW = u a; the readout of rank r is the best one of that
rank. An aggregate is the weighted mean of s B A, cut to the server's rank. Dense tensors are averaged.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from glora_server.coordinator.model import StatePart, TensorData, TensorKind
from glora_server.coordinator.ports import (
    AggregatedPart,
    AggregateJob,
    CheckJob,
    CheckResult,
    InitialiseJob,
    NumericsEngine,
    RenderJob,
    StrategyChoice,
    StrategyInfo,
    UpdateRef,
    WorkerLostError,
)
from glora_wire.errors import GloraError, Reason, Refusal
from glora_wire.names import dense_key, lora_key
from glora_wire.payload import read_header

Array = NDArray[np.float32]


_GLORA = StrategyInfo(
    name="glora",
    summary="mean",
    train_mask="both",
    init="readout",
    upload_set="both",
    mixed_ranks=True,
    needs_sent=True,
)


class Crash(BaseException):
    """The process ends here, as far as a test is concerned: no handler of ordinary errors sees it."""


class Fuse:
    """Ends the process, and lets the test wait for that."""

    def __init__(self) -> None:
        self.blown = asyncio.Event()

    def blow(self, where: str) -> NoReturn:
        """End the process."""
        self.blown.set()
        raise Crash(where)


def read_tensors(path: Path) -> dict[str, Array]:
    """Every float32 tensor of a payload."""
    data = path.read_bytes()
    return {
        entry.spec.name: np.frombuffer(data[entry.offset : entry.end], np.float32).reshape(entry.spec.shape)
        for entry in read_header(path).entries
    }


class TinyNumerics(NumericsEngine):
    """Counts its jobs; can lose its worker, or end the process, at the next jobs of a kind."""

    def __init__(self) -> None:
        self.fuse = Fuse()
        self.jobs: Counter[str] = Counter()
        self.losses: Counter[str] = Counter()
        """How many of the next jobs of each kind lose the worker."""
        self.crash_at: dict[str, int] = {}
        """The number (from 1) of the job of a kind that ends the process."""
        self.parts: list[tuple[str, ...]] = []
        """Names of the parts of every aggregation that was finished."""

    def _begin(self, kind: str) -> None:
        self.jobs[kind] += 1
        if self.crash_at.get(kind) == self.jobs[kind]:
            self.fuse.blow(kind)
        if self.losses[kind] > 0:
            self.losses[kind] -= 1
            raise WorkerLostError(kind)

    async def initialise(self, job: InitialiseJob) -> tuple[StatePart, ...]:
        self._begin("initialise")
        modules = [_module(name, np.zeros((out, into), np.float32), job.rank) for name, out, into in job.modules]
        dense = [_dense(name, np.full(shape, std, np.float32)) for name, shape, std in job.dense]
        return (*modules, *dense)

    async def render(self, job: RenderJob) -> None:
        self._begin("render")
        entries = read_header(job.path).by_name()
        with job.path.open("r+b") as file:
            for part in job.parts:
                for name, values in _rendered(part, job.rank, job.scale).items():
                    entry = entries[name]
                    assert values.shape == entry.spec.shape
                    file.seek(entry.offset)
                    file.write(values.astype(np.float32).tobytes())

    async def check(self, job: CheckJob) -> CheckResult:
        self._begin("check")
        tensors = read_tensors(job.path)
        assert {spec.name for spec in job.expected} == set(tensors), "the header was to be checked before"
        if not all(np.isfinite(values).all() for values in tensors.values()):
            refusal = Refusal(reason=Reason.NON_FINITE, message="The update holds NaN or infinity.")
            return CheckResult(refusal=refusal, norm=None, module_norms={})
        norms = {name: float(np.linalg.norm(_delta(tensors, name, scale))) for name, scale in job.scales.items()}
        norm = float(np.sqrt(sum(value**2 for value in norms.values())))
        large = Refusal(reason=Reason.NORM_TOO_LARGE, message=f"The update's norm is {norm:g}.")
        return CheckResult(refusal=large if 0 < job.max_norm < norm else None, norm=norm, module_norms=norms)

    async def aggregate(self, job: AggregateJob) -> tuple[AggregatedPart, ...]:
        self._begin("aggregate")
        if not job.updates:
            raise GloraError(Reason.AGGREGATION_FAILED, "There are no updates to aggregate.")
        assert abs(sum(update.weight for update in job.updates) - 1.0) < 1e-9
        assert all(update.sent_path is not None and update.sent_path.exists() for update in job.updates)
        self.parts.append(tuple(part.name for part in job.parts))
        return tuple(_aggregated(part, job.updates, job.rank) for part in job.parts)

    async def strategies(self) -> tuple[StrategyInfo, ...]:
        self._begin("strategies")
        return (_GLORA,)

    async def describe(self, choice: StrategyChoice, *, round_index: int) -> StrategyInfo:
        self._begin("describe")
        assert choice.name == _GLORA.name
        assert round_index >= 0
        return _GLORA

    async def check_strategy(self, choice: StrategyChoice, *, min_rank: int, max_rank: int) -> Refusal | None:
        self._begin("check_strategy")
        assert 1 <= min_rank <= max_rank
        if choice.name != "glora":
            return Refusal(reason=Reason.STRATEGY_UNKNOWN, message=f"There is no strategy {choice.name!r}.")
        return None


def _record(values: Array) -> TensorData:
    return TensorData(dtype="float32", shape=values.shape, data=values.astype("<f4").tobytes())


def tensor(part: StatePart, name: str) -> Array:
    """A tensor of a stored part."""
    record = part.tensors[name]
    return np.frombuffer(record.data, "<f4").reshape(record.shape)


def _module(name: str, delta: Array, rank: int) -> StatePart:
    u, sigma, a = (values.astype(np.float32) for values in np.linalg.svd(delta, full_matrices=False))
    live = min(rank, int((sigma > 1e-6).sum()))
    tensors = {"u": u[:, :live] * sigma[:live], "a": a[:live], "sigma": sigma[:live]}
    return StatePart(name=name, kind=TensorKind.MODULE, tensors={key: _record(v) for key, v in tensors.items()})


def _dense(name: str, values: Array) -> StatePart:
    return StatePart(name=name, kind=TensorKind.DENSE, tensors={"value": _record(values)})


def _rendered(part: StatePart, rank: int, scale: float) -> dict[str, Array]:
    if part.kind is TensorKind.DENSE:
        return {dense_key(part.name): tensor(part, "value")}
    u, a = tensor(part, "u"), tensor(part, "a")
    live = min(rank, u.shape[1])
    b_out: Array = np.zeros((u.shape[0], rank), np.float32)
    a_out = np.zeros((rank, a.shape[1]), np.float32)
    b_out[:, :live] = u[:, :live] / scale
    a_out[:live] = a[:live]
    return {lora_key(part.name, "A"): a_out, lora_key(part.name, "B"): b_out}


def _delta(tensors: dict[str, Array], module: str, scale: float) -> Array:
    product: Array = (scale * tensors[lora_key(module, "B")] @ tensors[lora_key(module, "A")]).astype(np.float32)
    return product


def _aggregated(part: StatePart, updates: tuple[UpdateRef, ...], rank: int) -> AggregatedPart:
    files = [(update, read_tensors(update.path)) for update in updates]
    if part.kind is TensorKind.DENSE:
        mean = sum(update.weight * tensors[dense_key(part.name)] for update, tensors in files)
        return AggregatedPart(part=_dense(part.name, np.asarray(mean, np.float32)), diagnostics_json="")
    delta = sum(update.weight * _delta(tensors, part.name, update.scales[part.name]) for update, tensors in files)
    made = _module(part.name, np.asarray(delta, np.float32), rank)
    return AggregatedPart(part=made, diagnostics_json=f'{{"captured_energy": 1.0, "devices": {len(files)}}}')
