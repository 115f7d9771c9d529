"""Names of tensors in a payload: those that PEFT writes into adapter_model.safetensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from glora_wire.adapter_config import ModuleScale, TaskType, adapter_config_json, scales_from_config
from glora_wire.errors import GloraError, Reason

__all__ = [
    "DenseKey",
    "Factor",
    "LoraKey",
    "ModuleScale",
    "TaskType",
    "adapter_config_json",
    "dense_key",
    "lora_key",
    "scales_from_config",
    "split_key",
]

Factor = Literal["A", "B"]

_PREFIX: Final = "base_model.model."
_SUFFIX_A: Final = ".lora_A.weight"
_SUFFIX_B: Final = ".lora_B.weight"


@dataclass(frozen=True, slots=True)
class LoraKey:
    """One factor of an adapted module: A (r x in) or B (out x r)."""

    module: str
    factor: Factor


@dataclass(frozen=True, slots=True)
class DenseKey:
    """A tensor that is trained as a whole, such as the weight of a classification head."""

    name: str


def lora_key(module: str, factor: Factor) -> str:
    """Name of a factor in the payload; `module` as in `model.named_modules()` of the base model."""
    return f"{_PREFIX}{module}.lora_{factor}.weight"


def dense_key(name: str) -> str:
    """Name of a dense tensor in the payload; `name` as in the base model's state dict ("classifier.weight")."""
    return f"{_PREFIX}{name}"


def split_key(key: str) -> LoraKey | DenseKey:
    """What a name in a payload stands for; raises GloraError TENSOR_NAMES_WRONG when it is not PEFT's."""
    if not key.startswith(_PREFIX) or key == _PREFIX:
        raise GloraError(
            Reason.TENSOR_NAMES_WRONG,
            f"The tensor name {key[:200]!r} does not start with {_PREFIX!r}; save the adapter with PEFT.",
            name=key[:200],
        )
    name = key[len(_PREFIX) :]
    if name.endswith(_SUFFIX_A) and name != _SUFFIX_A:
        return LoraKey(name[: -len(_SUFFIX_A)], "A")
    if name.endswith(_SUFFIX_B) and name != _SUFFIX_B:
        return LoraKey(name[: -len(_SUFFIX_B)], "B")
    return DenseKey(name)
