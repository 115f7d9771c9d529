"""Runs one job in the training process: load, attach, evaluate, train, write, evaluate."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from glora_client.adapter import AdaptedModel
from glora_client.base_model import BaseModel, Quantization, load_base_model
from glora_client.batches import Batches, ClassificationEncoder, Encoder, InstructionEncoder, RoundControl
from glora_client.data import classification_rows, instruction_rows
from glora_client.plan import AdapterUse, Task
from glora_client.protocol import Evaluated, Event, Failed, Finished, Job, JobKind, Measured, Phase, Progressed, Trained
from glora_client.training import Fit, FitReport, evaluate, load_fit, run_fit
from glora_wire.errors import GloraError, Reason
from glora_wire.manifest import Manifest

_SCALE_TOLERANCE = 1e-6

Emit = Callable[[Event], None]


class Controls(Protocol):
    """Who is told which control the running job listens to."""

    def begin(self, number: int, control: RoundControl) -> None:
        """Job `number` runs under `control` from now on."""
        ...


def set_threads(threads: int) -> None:
    """Use this many torch threads; 0 leaves torch's own choice."""
    if threads > 0:
        torch.set_num_threads(threads)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """A job together with what it is done with."""

    job: Job
    manifest: Manifest
    base: BaseModel
    adapted: AdaptedModel
    control: RoundControl
    emit: Emit

    def encoder(self, source: str) -> Encoder:
        """The rows of `source`, ready to be batched."""
        length, tokenizer, device = self.job.plan.max_length, self.base.tokenizer, self.base.device
        if self.job.plan.task is Task.CAUSAL_LM:
            return InstructionEncoder(instruction_rows(source), tokenizer, length, device)
        return ClassificationEncoder(classification_rows(source, self.manifest.labels), tokenizer, length, device)


class JobRunner:
    """Keeps the base model between jobs and runs them one after the other."""

    def __init__(self, *, fit_name: str | None = None, quantization: str = "none") -> None:
        self._fit_name = fit_name
        self._quantization = quantization
        self._loaded: tuple[tuple[str, str], BaseModel, AdaptedModel] | None = None

    def run(self, job: Job, emit: Emit, controls: Controls) -> None:
        """Do the job and emit its events, the last one `Finished`, or `Failed` when it was cancelled.

        Raises GloraError for everything that has a reason.
        """
        control = RoundControl(job.seconds_left)
        controls.begin(job.number, control)
        manifest = Manifest.from_json(job.manifest_json)
        emit(Progressed(phase=Phase.LOADING))
        base, adapted = self._load(job, manifest)
        work = _Work(job=job, manifest=manifest, base=base, adapted=adapted, control=control, emit=emit)
        if job.kind is JobKind.TRAIN:
            _train(work, load_fit(self._fit_name))
        else:
            _evaluate(work)
        if control.cancelled:
            emit(Failed(reason=Reason.ROUND_CLOSED.value, message="The work was cancelled.", cancelled=True))
        else:
            emit(Finished())

    def _load(self, job: Job, manifest: Manifest) -> tuple[BaseModel, AdaptedModel]:
        key = (job.model, manifest.digest)
        if self._loaded is None or self._loaded[0] != key:
            # The old model must be gone before the new one comes: two may not fit.
            self._loaded = None
            base = load_base_model(Path(job.model), manifest, Quantization(self._quantization))
            self._loaded = (key, base, AdaptedModel(base.model, manifest))
        return self._loaded[1], self._loaded[2]


def _train(work: _Work, function: Fit) -> None:
    job, plan, control = work.job, work.job.plan, work.control
    if job.data is None or job.out is None:
        raise GloraError(Reason.NO_TRAINING_DATA, "This device was started without --data and cannot train.")
    rows = work.encoder(job.data)
    held_out = None if job.evaluation_data is None else work.encoder(job.evaluation_data)
    work.adapted.attach(job.adapters, dtype=plan.wire_dtype)
    if abs(work.adapted.scale() - plan.scale) > _SCALE_TOLERANCE * plan.scale:
        scale = work.adapted.scale()
        raise GloraError(Reason.SCALE_WRONG, f"The adapter has the scale {scale}, but the plan says {plan.scale}.")
    if held_out is not None and plan.evaluate_before:
        _measure(work, held_out, Measured.BEFORE, plan.rank)
    started = time.monotonic()
    report, planned = _fit(work, rows, function)
    if control.cancelled:
        return
    rank = report.rank or plan.rank
    if rank < plan.rank:
        work.adapted.shrink(rank)
    work.adapted.write(job.out, rank=rank, dtype=plan.wire_dtype, upload_set=plan.upload_set)
    work.emit(
        Trained(
            rows=len(rows),
            steps=report.steps,
            stopped_early=report.steps < planned,
            loss=report.loss,
            seconds=time.monotonic() - started,
            rank=rank,
        )
    )
    if held_out is not None and plan.evaluate_after:
        # The update is on its way by now: the deadline was for it, not for what follows.
        control.set_seconds_left(None)
        _measure(work, held_out, Measured.AFTER, rank)


def _fit(work: _Work, rows: Encoder, function: Fit) -> tuple[FitReport, int]:
    """Report of the training function and the number of steps that were planned."""
    plan, seed = work.job.plan, _seed(work.job)
    batches = Batches(
        rows,
        batch_size=plan.batch_size,
        steps=plan.steps,
        epochs=plan.epochs,
        seed=seed,
        control=work.control,
        progress=_throttled(work.emit),
    )
    # Dropout draws from the global generator.
    torch.manual_seed(seed)
    work.adapted.set_trainable(plan.train_mask)
    return run_fit(function, work.adapted.model, batches, plan), len(batches)


def _evaluate(work: _Work) -> None:
    job = work.job
    if job.evaluation_data is None:
        raise GloraError(Reason.NO_TRAINING_DATA, "This device was started without --eval-data and cannot evaluate.")
    held_out = work.encoder(job.evaluation_data)
    others = [adapter for adapter in job.adapters if adapter.use is not AdapterUse.EVALUATE]
    for adapter in job.adapters:
        if adapter.use is AdapterUse.EVALUATE and not work.control.cancelled:
            work.adapted.attach([adapter, *others], dtype=job.plan.wire_dtype)
            _measure(work, held_out, Measured.VERSION, adapter.rank)


def _measure(work: _Work, held_out: Encoder, measured: Measured, rank: int) -> None:
    """Emit an evaluation, unless the time was over before its end."""
    plan = work.job.plan
    work.emit(Progressed(phase=Phase.EVALUATING))
    # No gradients are kept, so larger batches than in training cost no more memory.
    report = evaluate(
        work.adapted.model,
        held_out,
        batch_size=2 * plan.batch_size,
        control=work.control,
        mixed_precision=plan.mixed_precision,
    )
    if report is not None:
        work.emit(Evaluated(measured=measured, rank=rank, **dataclasses.asdict(report)))


def _seed(job: Job) -> int:
    """A seed (63 bits) of its own for every device and round, the same when the round is repeated."""
    text = f"{job.plan.seed}:{job.device}:{job.round_number}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def _throttled(emit: Emit) -> Callable[[int, int, float], None]:
    """Progress at most five times a second; the agent passes on less."""
    last = 0.0

    def progress(done: int, total: int, loss: float) -> None:
        nonlocal last
        now = time.monotonic()
        if done == total or now - last >= 0.2:
            last = now
            emit(Progressed(phase=Phase.TRAINING, done=done, total=total, loss=loss))

    return progress
