"""What a run's adapters look like on the wire, and whether an update's header agrees."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Final

from glora_server.coordinator.run_spec import RunSpec
from glora_wire.adapter_config import adapter_config_json, scales_from_config
from glora_wire.errors import GloraError, Reason
from glora_wire.manifest import Manifest, adapter_specs
from glora_wire.names import LoraKey, split_key
from glora_wire.payload import payload_bytes
from glora_wire.payload_check import check_specs
from glora_wire.payload_reader import read_header
from glora_wire.tensors import TensorDtype, TensorSpec

_HEADER_SLACK_BYTES: Final = 64 * 1024
_HEADER_SLACK_PER_TENSOR: Final = 256
_HEADS: Final = frozenset({"classifier", "score"})
"""Names that PEFT itself saves whole for sequence classification."""


# Remembered: a run has one manifest and a few ranks, and every device of every round is asked about them.


@lru_cache(maxsize=64)
def upload_specs(manifest: Manifest, rank: int, dtype: TensorDtype, upload_set: str = "both") -> tuple[TensorSpec, ...]:
    """The tensors of an update: the dense ones and the factors of `upload_set` ("both", "a" or "b")."""
    specs = adapter_specs(manifest, rank, dtype)
    return tuple(spec for spec in specs if _is_uploaded(spec.name, upload_set))


def _is_uploaded(name: str, upload_set: str) -> bool:
    key = split_key(name)
    return not isinstance(key, LoraKey) or upload_set in {"both", key.factor.lower()}


@lru_cache(maxsize=64)
def max_upload_bytes(manifest: Manifest, rank: int, dtype: TensorDtype, upload_set: str = "both") -> int:
    """The largest file that can hold an update; other writers than ours may spend more on the header."""
    specs = upload_specs(manifest, rank, dtype, upload_set)
    return payload_bytes(specs) + _HEADER_SLACK_BYTES + _HEADER_SLACK_PER_TENSOR * len(specs)


def modules_to_save(manifest: Manifest) -> tuple[str, ...]:
    """PEFT's modules_to_save for the dense tensors of the manifest."""
    names: dict[str, None] = {}
    for dense in manifest.dense:
        top = dense.name.split(".", 1)[0]
        names[top if top in _HEADS else dense.name.rpartition(".")[0]] = None
    return tuple(names)


def config_json(manifest: Manifest, *, rank: int, scale: float, dropout: float = 0.0) -> str:
    """adapter_config.json of an adapter of the run."""
    return adapter_config_json(
        rank=rank,
        scale=scale,
        target_modules=[module.name for module in manifest.modules],
        task_type="SEQ_CLS" if manifest.task == "sequence_classification" else "CAUSAL_LM",
        base_model_name=manifest.base_model_name,
        modules_to_save=modules_to_save(manifest),
        dropout=dropout,
    )


def check_scales(text: str, manifest: Manifest, spec: RunSpec, rank: int) -> Mapping[str, float]:
    """The scale of every module by the device's adapter_config; raises CONFIG_INVALID, RANK_WRONG or SCALE_WRONG."""
    scales = scales_from_config(text, [module.name for module in manifest.modules])
    for module, found in scales.items():
        if found.rank != rank:
            raise GloraError(
                Reason.RANK_WRONG,
                f"The update's adapter_config says rank {found.rank} for {module}; {rank} was granted.",
                module=module,
                rank=found.rank,
                granted=rank,
            )
        if not spec.limits.allow_own_scale and abs(found.scale - spec.lora.scale) > 1e-6 * spec.lora.scale:
            raise GloraError(
                Reason.SCALE_WRONG,
                f"The scale of {module} was {found.scale:g} in training, the run has {spec.lora.scale:g}; "
                f"use lora_alpha = {spec.lora.scale * rank:g}, or allow it with limits.allow_own_scale.",
                module=module,
                scale=found.scale,
            )
    return {module: found.scale for module, found in scales.items()}


def check_file(path: Path, manifest: Manifest, rank: int, dtype: TensorDtype, upload_set: str = "both") -> None:
    """Check that the file's header announces exactly the planned tensors; raises with the reason that fits."""
    check_specs(read_header(path), upload_specs(manifest, rank, dtype, upload_set))


def uploaded_rank(text: str, manifest: Manifest, granted: int, *, may_shrink: bool) -> int:
    """The rank of an update by its adapter_config: what was granted, or less where devices may shrink it.

    A rank that is not allowed is left to `check_scales` to refuse. Raises CONFIG_INVALID.
    """
    if not may_shrink:
        return granted
    found = scales_from_config(text, [module.name for module in manifest.modules])
    return min(granted, min((item.rank for item in found.values()), default=granted))
