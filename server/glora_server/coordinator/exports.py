"""Writes PEFT folders: any published version, any rank up to the server's.

Flavour `peft` gives every module the rank that its state really has (rank_pattern, alpha_pattern); `serving` gives
all modules the same rank and no patterns, which is what vLLM and llama.cpp read rightly.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from glora_server.coordinator.expectations import modules_to_save
from glora_server.coordinator.model import Run, Version
from glora_server.coordinator.ports import Store, UnitOfWork
from glora_server.coordinator.readouts import Readouts
from glora_server.coordinator.run_spec import RunSpec
from glora_server.coordinator.views import ExportRecord
from glora_wire.adapter_config import adapter_config_json
from glora_wire.errors import GloraError, Reason
from glora_wire.tensors import TensorDtype

Flavour = Literal["peft", "serving"]
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
CARD = "README.md"


@dataclass(slots=True, kw_only=True)
class Exporter:
    """Exports; the factors hold the scale, so alpha equals the rank everywhere (s = 1)."""

    store: Store
    readouts: Readouts

    async def export(
        self, run_name: str, *, rank: int, version_number: int | None, flavour: Flavour, folder: Path
    ) -> ExportRecord:
        """Write the adapter into `folder`, which must not hold one; raises RANK_WRONG, VERSION_UNKNOWN, …"""
        run, version = await self.store.read(partial(_find, run_name, version_number))
        spec = RunSpec.from_json(run.spec_json)
        if not 1 <= rank <= spec.lora.max_rank:
            raise GloraError(
                Reason.RANK_WRONG,
                f"Run {run.name} holds rank {spec.lora.max_rank}; an export has rank 1 to {spec.lora.max_rank}.",
                rank=rank,
            )
        if await asyncio.to_thread((folder / WEIGHTS).exists):
            raise GloraError(
                Reason.REQUEST_INVALID, f"{folder} holds an adapter already; name another folder or remove it."
            )
        await asyncio.to_thread(partial(folder.mkdir, parents=True, exist_ok=True))
        ranks = dict.fromkeys((module.name for module in run.manifest.modules), rank)
        if flavour == "peft":
            live = await self.store.read(lambda uow: uow.versions.module_ranks(version.id))
            ranks = {name: max(1, min(rank, live.get(name, 0))) for name in ranks}
        # Not what the strategy hands out: columns of averaged factors are in no order, and the first ones not the best.
        await self.readouts.render(
            run, version, ranks=ranks, scale=1.0, dtype=TensorDtype.FLOAT32, path=folder / WEIGHTS, variant="state"
        )
        config = adapter_config_json(
            rank=rank,
            scale=1.0,
            target_modules=[module.name for module in run.manifest.modules],
            task_type="SEQ_CLS" if run.manifest.task == "sequence_classification" else "CAUSAL_LM",
            base_model_name=run.manifest.base_model_name,
            modules_to_save=modules_to_save(run.manifest),
        )
        await asyncio.to_thread((folder / CONFIG).write_text, _with_ranks(config, ranks, rank))
        await asyncio.to_thread((folder / CARD).write_text, _card(run, version, rank, flavour))
        return ExportRecord(
            folder=folder,
            files=(CARD, CONFIG, WEIGHTS),
            version_number=version.number,
            rank=rank,
            flavour=flavour,
            modules=len(run.manifest.modules),
        )


def _find(run_name: str, number: int | None, uow: UnitOfWork) -> tuple[Run, Version]:
    run = uow.runs.by_name(run_name)
    if number is not None:
        return run, uow.versions.by_number(run.id, number)
    if run.version_id is None:
        raise GloraError(
            Reason.VERSION_UNKNOWN, f"Run {run.name} has no version yet: start it with `glora run start {run.name}`."
        )
    return run, uow.versions.get(run.version_id)


def _with_ranks(config: str, ranks: dict[str, int], rank: int) -> str:
    """The config with rank and alpha of every module that has another rank than `rank`; s stays 1 everywhere."""
    document = json.loads(config)
    pattern = {name: own for name, own in ranks.items() if own != rank}
    document["rank_pattern"] = pattern
    document["alpha_pattern"] = dict(pattern)
    return json.dumps(document, indent=2, sort_keys=True)


def _card(run: Run, version: Version, rank: int, flavour: str) -> str:
    base = run.manifest.base_model_name
    task = run.manifest.task
    auto = "AutoModelForSequenceClassification" if task == "sequence_classification" else "AutoModelForCausalLM"
    extra = f", num_labels={len(run.manifest.labels)}" if run.manifest.labels else ""
    labels = "".join(f"| {number} | {label} |\n" for number, label in enumerate(run.manifest.labels))
    table = f"\n| id | label |\n|---|---|\n{labels}" if labels else ""
    return f"""---
library_name: peft
base_model: {base}
tags: [lora, federated, glora]
---

# {run.name}: version {version.number}, rank {rank} ({flavour})

A LoRA adapter that was trained on many devices and folded together by glora (strategy {version.strategy}).
Base model fingerprint: `{run.manifest.base_model_fingerprint}`.

```python
from peft import PeftModel
from transformers import {auto}
model = PeftModel.from_pretrained({auto}.from_pretrained({base!r}{extra}), "THIS FOLDER")
```
{table}"""
