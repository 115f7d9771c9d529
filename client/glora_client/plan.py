"""What a device is asked to do in one round, as plain values that cross from the agent to the training process."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Final

from glora.v1 import types_pb2
from glora_wire.errors import GloraError, Reason
from glora_wire.tensors import TensorDtype


class Task(StrEnum):
    """Kinds of model that can be trained."""

    SEQUENCE_CLASSIFICATION = "sequence_classification"
    CAUSAL_LM = "causal_lm"


class FactorSet(StrEnum):
    """Which of the two LoRA factors are meant, for training or for sending."""

    BOTH = "both"
    A = "A"
    B = "B"


class AdapterUse(StrEnum):
    """What a delivered adapter is for."""

    TRAIN = "train"
    FROZEN = "frozen"
    MERGE = "merge"
    EVALUATE = "evaluate"


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalPlan:
    """How to train: `types.proto: TrainingPlan` checked and made plain. `steps` 0 means `epochs` passes."""

    task: Task
    rank: int
    scale: float
    dropout: float = 0.0
    steps: int = 0
    epochs: float = 1.0
    batch_size: int = 16
    max_length: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    optimizer: str = "adamw"
    warmup_ratio: float = 0.0
    schedule: str = "constant"
    seed: int = 0
    mixed_precision: bool = False
    wire_dtype: TensorDtype = TensorDtype.FLOAT32
    train_mask: FactorSet = FactorSet.BOTH
    upload_set: FactorSet = FactorSet.BOTH
    allow_early_stop: bool = True
    evaluate_before: bool = False
    evaluate_after: bool = False
    extra: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        """The plan as JSON values; `from_json` reads them back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, object]) -> LocalPlan:
        """The plan that `to_json` wrote; raises GloraError CONFIG_INVALID for values that no plan can have."""
        values = dict(document)
        try:
            values["task"] = Task(str(values["task"]))
            values["wire_dtype"] = TensorDtype(str(values["wire_dtype"]))
            values["train_mask"] = FactorSet(str(values["train_mask"]))
            values["upload_set"] = FactorSet(str(values["upload_set"]))
            return _checked(cls(**values))  # type: ignore[arg-type]  # the values were written by to_json
        except (KeyError, TypeError, ValueError) as error:
            raise GloraError(Reason.CONFIG_INVALID, f"The training plan cannot be read: {error}.") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliveredAdapter:
    """A payload file as it was pulled, what it is for, its rank and its adapter_config.json."""

    path: Path
    config_json: str
    use: AdapterUse
    rank: int


_MASKS: Final = {
    types_pb2.TRAIN_MASK_UNSPECIFIED: FactorSet.BOTH,
    types_pb2.TRAIN_MASK_BOTH: FactorSet.BOTH,
    types_pb2.TRAIN_MASK_A: FactorSet.A,
    types_pb2.TRAIN_MASK_B: FactorSet.B,
}
_UPLOADS: Final = {
    types_pb2.UPLOAD_SET_UNSPECIFIED: FactorSet.BOTH,
    types_pb2.UPLOAD_SET_BOTH: FactorSet.BOTH,
    types_pb2.UPLOAD_SET_A: FactorSet.A,
    types_pb2.UPLOAD_SET_B: FactorSet.B,
}
_INITS: Final = (
    types_pb2.INIT_SOURCE_UNSPECIFIED,
    types_pb2.INIT_SOURCE_READOUT,
    types_pb2.INIT_SOURCE_FRESH,
)
_USES: Final = {
    types_pb2.ADAPTER_USE_TRAIN: AdapterUse.TRAIN,
    types_pb2.ADAPTER_USE_FROZEN: AdapterUse.FROZEN,
    types_pb2.ADAPTER_USE_MERGE: AdapterUse.MERGE,
    types_pb2.ADAPTER_USE_EVALUATE: AdapterUse.EVALUATE,
}


def plan_from_proto(message: types_pb2.TrainingPlan) -> LocalPlan:
    """The plan in a message; raises GloraError CONFIG_INVALID for what this version of the client cannot do."""
    if message.train_mask not in _MASKS or message.upload_set not in _UPLOADS or message.init not in _INITS:
        raise _unsupported("a train mask, upload set or initialisation that this version of the client does not know")
    try:
        task = Task(message.task)
    except ValueError:
        raise _unsupported(f"the task {message.task!r}") from None
    return _checked(
        LocalPlan(
            task=task,
            rank=message.rank,
            scale=message.scale,
            dropout=message.lora_dropout,
            steps=message.steps,
            epochs=message.epochs,
            batch_size=message.batch_size,
            max_length=message.max_length,
            learning_rate=message.learning_rate,
            weight_decay=message.weight_decay,
            max_grad_norm=message.max_grad_norm,
            optimizer=message.optimizer or "adamw",
            warmup_ratio=message.warmup_ratio,
            schedule=message.schedule or "constant",
            seed=message.seed,
            mixed_precision=message.mixed_precision,
            wire_dtype=TensorDtype.from_proto(message.wire_dtype),
            train_mask=_MASKS[message.train_mask],
            upload_set=_UPLOADS[message.upload_set],
            allow_early_stop=message.allow_early_stop,
            evaluate_before=message.evaluate_before,
            evaluate_after=message.evaluate_after,
            extra=dict(message.extra),
        )
    )


def use_from_proto(number: types_pb2.AdapterUse.ValueType) -> AdapterUse:
    """What an adapter is for; raises GloraError CONFIG_INVALID when this version of the client does not know it."""
    try:
        return _USES[number]
    except KeyError:
        raise _unsupported(f"adapter use number {number}") from None


def _checked(plan: LocalPlan) -> LocalPlan:
    if plan.batch_size < 1 or plan.max_length < 1 or plan.learning_rate < 0:
        raise _unsupported("a batch size, length or learning rate that cannot be used")
    if plan.steps == 0 and plan.epochs <= 0:
        raise _unsupported("neither steps nor epochs")
    if plan.optimizer not in {"adamw", "sgd"}:
        raise _unsupported(f"the optimizer {plan.optimizer!r} (known: adamw, sgd)")
    if plan.schedule not in {"constant", "linear"}:
        raise _unsupported(f"the schedule {plan.schedule!r} (known: constant, linear)")
    return plan


def _unsupported(what: str) -> GloraError:
    return GloraError(
        Reason.CONFIG_INVALID, f"The run asks for {what}; install a newer glora on this device or change the run."
    )
