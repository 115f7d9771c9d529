"""The sections of a run's description, one frozen model each; `run_spec` puts them together."""

from __future__ import annotations

import math
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator
from pydantic_core import PydanticCustomError

from glora_server.validation_text import raise_problems
from glora_wire.digests import HashAlgorithm
from glora_wire.manifest import MAX_LABELS, Task
from glora_wire.tensors import TensorDtype

MAX_RANK: Final = 4096

Scalar = str | float | int | bool
"""What an option of a strategy may be."""


class Section(BaseModel):
    """Frozen, strict (no "3" for 3) and without room for misspelt keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def _scalar(value: object) -> Scalar:
    if isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise PydanticCustomError("option", "must be a finite number, text in quotes, true or false")


_Option = Annotated[Scalar, PlainValidator(_scalar, json_schema_input_type=Scalar)]
_Label = Annotated[str, Field(min_length=1, max_length=1024)]
_ModuleName = Annotated[str, Field(min_length=1, max_length=256)]
_Layer = Annotated[int, Field(ge=0, le=100_000)]
_Rank = Annotated[int, Field(ge=1, le=MAX_RANK)]


class ModelSpec(Section):
    """What is adapted."""

    path: str = Field(
        min_length=1,
        max_length=4096,
        description="Folder or hub name of the base model where `glora run create` runs; devices map it with --model.",
    )
    task: Task = Field(default="sequence_classification", description='"sequence_classification" or "causal_lm".')
    labels: tuple[_Label, ...] = Field(
        default=(),
        max_length=MAX_LABELS,
        description="Class names in the order of their ids; sequence_classification only.",
    )
    label_file: str = Field(
        default="", max_length=4096, description="A text file with one class name a line, instead of `labels`."
    )
    target_modules: tuple[_ModuleName, ...] = Field(
        default=("query", "value"),
        min_length=1,
        max_length=1000,
        description="Last names of the linear modules to adapt.",
    )
    layers: tuple[_Layer, ...] = Field(
        default=(), max_length=10_000, description="Numbers of the layers to adapt, from 0; empty = all."
    )

    def model_post_init(self, _context: object, /) -> None:
        """Check what no single key shows."""
        found: list[tuple[tuple[str, ...], str, object]] = []
        if self.task == "causal_lm" and (self.labels or self.label_file):
            found.append((("labels",), "must be left out for causal_lm, which has no classes", self.labels))
        if self.labels and self.label_file:
            found.append((("label_file",), "must be left out when labels are given", self.label_file))
        if self.labels and len(self.labels) < 2:
            found.append((("labels",), "must name at least 2 classes", self.labels))
        for key in ("labels", "target_modules", "layers"):
            items: tuple[object, ...] = getattr(self, key)
            if len(set(items)) < len(items):
                found.append(((key,), "must not name anything twice", items))
        raise_problems("model", found)


class LoraSpec(Section):
    """The adapter."""

    max_rank: int = Field(
        default=16, ge=1, le=MAX_RANK, description="R: the server's rank, and the largest that a device may be granted."
    )
    scale: float = Field(default=2.0, gt=0, le=1000, description="s = lora_alpha / rank, the same for every device.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="LoRA dropout while training.")
    readout: Literal["balanced", "a_orthonormal"] = Field(
        default="balanced", description='How factors are handed out: "balanced" (equal norms) or "a_orthonormal".'
    )


class StrategySpec(Section):
    """How updates are folded together."""

    name: str = Field(
        default="glora", min_length=1, max_length=64, description="Name of the strategy (glora, fedit, …)."
    )
    options: dict[str, _Option] = Field(
        default_factory=dict,
        max_length=100,
        description="Options of the strategy, such as rule and subspace of glora; the strategy checks them.",
    )


class TrainingSpec(Section):
    """What a device does with the adapter; names as in TrainingPlan of the protocol."""

    steps: int = Field(default=0, ge=0, le=10_000_000, description="Optimizer steps a round; 0 = go by epochs.")
    epochs: float = Field(default=1.0, ge=0, le=10_000, description="Passes over a device's rows when steps is 0.")
    batch_size: int = Field(default=16, ge=1, le=65_536, description="Rows a step.")
    max_length: int = Field(default=128, ge=1, le=1_000_000, description="Tokens a row; longer rows are cut.")
    learning_rate: float = Field(default=1e-3, gt=0, le=10, description="Peak learning rate.")
    weight_decay: float = Field(default=0.0, ge=0, le=10, description="Decoupled weight decay.")
    max_grad_norm: float = Field(default=1.0, ge=0, le=1e6, description="Gradient norm to clip at; 0 = no clipping.")
    optimizer: Literal["adamw", "sgd"] = Field(default="adamw", description='"adamw" or "sgd".')
    warmup_ratio: float = Field(default=0.0, ge=0, le=1, description="Share of the steps with a rising learning rate.")
    schedule: Literal["constant", "linear"] = Field(
        default="constant", description='"constant" or "linear" (down to 0).'
    )
    mixed_precision: bool = Field(default=False, description="bfloat16 autocast where the hardware has it.")
    allow_early_stop: bool = Field(default=True, description="A device that will be late may upload what it has.")
    extra: dict[str, str] = Field(
        default_factory=dict, max_length=100, description="Texts for training functions of your own, by name."
    )

    def model_post_init(self, _context: object, /) -> None:
        """Check what no single key shows."""
        if self.steps == 0 and self.epochs == 0:
            raise_problems("training", [(("epochs",), "must be above 0 when steps is 0: there would be no work", 0)])


class WireSpec(Section):
    """How adapters travel."""

    dtype: TensorDtype = Field(
        default=TensorDtype.FLOAT32, description='Number format on the wire: "float32", "bfloat16" or "float16".'
    )
    hash: HashAlgorithm = Field(default=HashAlgorithm.BLAKE3, description='Digest of a transfer: "blake3" or "sha256".')


class LimitsSpec(Section):
    """What a single device may do to the result."""

    max_update_norm: float = Field(
        default=0.0,
        ge=0,
        le=1e12,
        description="Largest Frobenius norm of a device's ΔW over all modules; 0 = what float32 can hold (1e30).",
    )
    max_training_rows: int = Field(
        default=0, ge=0, le=10**12, description="Rows beyond which a device's weight no longer grows; 0 = no cap."
    )
    max_weight_share: float = Field(default=1.0, gt=0, le=1, description="Largest share of one device in a mean.")
    allow_own_scale: bool = Field(
        default=False, description="Take updates whose adapter_config says another scale than lora.scale."
    )


class EvaluationSpec(Section):
    """What is measured."""

    ranks: tuple[_Rank, ...] = Field(
        default=(),
        max_length=64,
        description="Ranks that evaluators measure; empty = powers of two up to lora.max_rank.",
    )
    before: bool = Field(default=True, description="Devices measure the adapter that they received.")
    after: bool = Field(default=True, description="Devices measure the adapter that they trained.")


class RetentionSpec(Section):
    """What is kept."""

    keep_versions: int = Field(default=5, ge=1, le=1_000_000, description="Newest versions whose tensors are kept.")
    keep_uploads: bool = Field(default=False, description="Keep the updates of devices after they were aggregated.")
