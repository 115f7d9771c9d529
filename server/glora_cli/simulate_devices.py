"""The devices' side of a simulation: one base model that stays in memory, and every device's adapters on it in turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from glora_cli.simulate_data import Corpus
from glora_client.adapter import AdaptedModel
from glora_client.base_model import load_base_model
from glora_client.batches import Batch, Batches, ClassificationEncoder, RoundControl
from glora_client.data import ClassificationRow
from glora_client.plan import DeliveredAdapter, FactorSet, LocalPlan, Task
from glora_client.training import FitReport, evaluate, fit, run_fit
from glora_server.aggregation import TrainMask
from glora_server.coordinator.run_spec import RunSpec
from glora_wire.errors import GloraError, Reason
from glora_wire.manifest import Manifest

_MASKS = {TrainMask.BOTH: FactorSet.BOTH, TrainMask.A: FactorSet.A, TrainMask.B: FactorSet.B}


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Mean loss (nats) and share of right predictions on the held-out rows."""

    loss: float
    accuracy: float


class RememberedRows:
    """Batches of rows that are always asked for in the same way, tokenised once."""

    def __init__(self, encoder: ClassificationEncoder) -> None:
        self._encoder = encoder
        self._batches: dict[tuple[int, ...], Batch] = {}

    def __len__(self) -> int:
        return len(self._encoder)

    def __call__(self, indices: Sequence[int]) -> Batch:
        """The batch of these rows."""
        key = tuple(indices)
        if key not in self._batches:
            self._batches[key] = self._encoder(indices)
        return self._batches[key]


class Bench:
    """The base model with room for adapters, and the held-out rows; shared by all devices of a process."""

    def __init__(self, model: Path, manifest: Manifest, corpus: Corpus, *, max_length: int, batch_size: int) -> None:
        self._base = load_base_model(model, manifest)
        self._adapted = AdaptedModel(self._base.model, manifest)
        self._batch_size = batch_size
        self._max_length = max_length
        self._held_out = RememberedRows(self._encoder(corpus.held_out))

    def train(
        self,
        rows: Sequence[ClassificationRow],
        adapters: Sequence[DeliveredAdapter],
        spec: RunSpec,
        *,
        rank: int,
        mask: TrainMask,
        seed: int,
        out: Path,
    ) -> FitReport:
        """Train as a device of the client does and write its update to `out`.

        Raises GloraError TRAINING_DIVERGED among others.
        """
        plan = _plan(spec, rank=rank, mask=mask, seed=seed)
        self._adapted.attach(adapters, dtype=plan.wire_dtype)
        batches = Batches(
            self._encoder(rows),
            batch_size=plan.batch_size,
            steps=plan.steps,
            epochs=plan.epochs,
            seed=seed,
            control=RoundControl(),
        )
        torch.manual_seed(seed)  # dropout draws from the global generator
        self._adapted.set_trainable(plan.train_mask)
        report = run_fit(fit, self._adapted.model, batches, plan)
        self._adapted.write(out, rank=rank, dtype=plan.wire_dtype)
        return report

    def measure(self, adapters: Sequence[DeliveredAdapter], spec: RunSpec) -> Score:
        """How the model with these adapters does on the held-out rows."""
        self._adapted.attach(adapters, dtype=spec.wire.dtype)
        report = evaluate(
            self._adapted.model,
            self._held_out,
            batch_size=self._batch_size,
            control=RoundControl(),
            mixed_precision=spec.training.mixed_precision,
        )
        if report is None:
            raise GloraError(Reason.INTERNAL, "The measurement was stopped although nobody asked for that.")
        return Score(loss=report.loss, accuracy=report.accuracy)

    def _encoder(self, rows: Sequence[ClassificationRow]) -> ClassificationEncoder:
        return ClassificationEncoder(rows, self._base.tokenizer, self._max_length, self._base.device)


def _plan(spec: RunSpec, *, rank: int, mask: TrainMask, seed: int) -> LocalPlan:
    training = spec.training
    return LocalPlan(
        task=Task.SEQUENCE_CLASSIFICATION,
        rank=rank,
        scale=spec.lora.scale,
        dropout=spec.lora.dropout,
        steps=training.steps,
        epochs=training.epochs,
        batch_size=training.batch_size,
        max_length=training.max_length,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        optimizer=training.optimizer,
        warmup_ratio=training.warmup_ratio,
        schedule=training.schedule,
        seed=seed,
        mixed_precision=training.mixed_precision,
        wire_dtype=spec.wire.dtype,
        train_mask=_MASKS[mask],
        extra=training.extra,
    )
