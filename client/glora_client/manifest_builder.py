"""Makes a run's manifest from its base model; needs transformers, but loads no weights.

    python -m glora_client.manifest_builder --model PATH_OR_NAME --task sequence_classification \\
        --target query --target value --label negative --label positive --out manifest.json
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
import warnings
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from glora_client.model_path import resolve_model
from glora_client.plan import Task
from glora_wire.errors import GloraError, Reason
from glora_wire.manifest import (
    DenseInit,
    DenseTensor,
    Manifest,
    ModuleShape,
    NormalInit,
    ZerosInit,
    fingerprint_folder,
    fingerprint_of,
    tokenizer_fingerprint,
)


def build_manifest(
    model: str,
    *,
    task: Task,
    target_modules: Sequence[str],
    labels: Sequence[str] = (),
    layers: Collection[int] | None = None,
) -> Manifest:
    """The manifest of a run that adapts `target_modules` of the base model `model` (a folder or a hub name).

    A target is a short name ("query"), the end of a full name ("attention.self.query") or a regular expression for
    the whole name; `layers` keeps only modules of these layer numbers. Heads that the checkpoint lacks become dense
    tensors. Raises GloraError BASE_MODEL_MISSING or SPEC_INVALID.
    """
    if task is Task.SEQUENCE_CLASSIFICATION and len(labels) < 2:
        raise GloraError(Reason.SPEC_INVALID, "Sequence classification needs at least two labels; name them all.")
    folder = resolve_model(model)
    skeleton, std = _skeleton(folder, task, len(labels))
    files = fingerprint_folder(folder)
    head = _head(skeleton, _checkpoint_names(folder)) if task is Task.SEQUENCE_CLASSIFICATION else ()
    return Manifest(
        task=task.value,
        base_model_name=model,
        base_model_fingerprint=fingerprint_of(files),
        weight_files=files,
        tokenizer_fingerprint=tokenizer_fingerprint(folder),
        labels=tuple(labels),
        modules=_modules(skeleton, target_modules, layers),
        dense=tuple(DenseTensor(name, shape, _init(name, shape, std)) for name, shape in head),
        target_modules=tuple(target_modules),
    )


def _skeleton(folder: Path, task: Task, labels: int) -> tuple[nn.Module, float]:
    """The model without weights, and the standard deviation that its family starts new weights with."""
    transformers: Any = importlib.import_module("transformers")
    transformers.logging.set_verbosity_error()
    causal = task is Task.CAUSAL_LM
    factory = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForSequenceClassification
    options = {} if causal else {"num_labels": labels}
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.filterwarnings("ignore", category=FutureWarning)
            config = transformers.AutoConfig.from_pretrained(str(folder), **options)
            model = factory.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise GloraError(
            Reason.BASE_MODEL_MISSING, f"transformers cannot make a model for {task} from {folder} ({error})."
        ) from error
    return model, float(getattr(config, "initializer_range", None) or 0.02)


def _linear(model: nn.Module) -> Iterator[ModuleShape]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            yield ModuleShape(name, module.out_features, module.in_features)
        elif isinstance(module, Conv1D):
            rows, columns = module.weight.shape
            yield ModuleShape(name, columns, rows)


def _modules(model: nn.Module, targets: Sequence[str], layers: Collection[int] | None) -> tuple[ModuleShape, ...]:
    linear = list(_linear(model))
    chosen = {
        target: [shape for shape in linear if _matches(shape.name, target) and _in_layers(shape.name, layers)]
        for target in targets
    }
    empty = [target for target, shapes in chosen.items() if not shapes]
    if empty or not chosen:
        ends = sorted({shape.name.rpartition(".")[2] for shape in linear})
        raise GloraError(
            Reason.SPEC_INVALID,
            f"No linear module of the model matches {', '.join(map(repr, empty)) or 'an empty list of targets'}"
            + (f" in the layers {sorted(layers)}" if layers else "")
            + f". Modules that exist end in: {', '.join(ends[:20])}.",
        )
    names = {shape.name for shapes in chosen.values() for shape in shapes}
    return tuple(shape for shape in linear if shape.name in names)


def _matches(name: str, target: str) -> bool:
    if name == target or name.endswith(f".{target}"):
        return True
    try:
        return re.fullmatch(target, name) is not None
    except re.error as error:
        raise GloraError(
            Reason.SPEC_INVALID, f"The target {target!r} is neither a module's name nor a regular expression ({error})."
        ) from error


def _in_layers(name: str, layers: Collection[int] | None) -> bool:
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    return layers is None or (bool(numbers) and numbers[0] in layers)


def _checkpoint_names(folder: Path) -> set[str]:
    """Names of the tensors in the safetensors files of the folder, from their headers."""
    names: set[str] = set()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            names |= json.loads(file.read(length)).keys() - {"__metadata__"}
    if not names:
        raise GloraError(
            Reason.BASE_MODEL_MISSING,
            f"{folder} has no .safetensors file; save the base model with save_pretrained() to get one.",
        )
    return names


def _head(model: nn.Module, present: Collection[str]) -> list[tuple[str, tuple[int, ...]]]:
    """Parameters outside the base model that the checkpoint lacks, and a pooler that it lacks, in the model's order.

    Inside the base model, names in old checkpoints differ from today's, so absence of a name there says nothing.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    return [
        (name, tuple(parameter.shape))
        for name, parameter in model.named_parameters()
        if name not in present
        and name.removeprefix(prefix) not in present
        and (not name.startswith(prefix) or name.startswith(f"{prefix}pooler."))
    ]


def _init(name: str, shape: tuple[int, ...], std: float) -> DenseInit:
    return ZerosInit() if name.endswith("bias") or len(shape) < 2 else NormalInit(std)


def _main(arguments: Sequence[str]) -> int:
    """Writes the manifest; prints {"reason", "message"} and returns 2 when that fails."""
    parser = argparse.ArgumentParser(description="Make a run's manifest from its base model.")
    parser.add_argument("--model", required=True)
    parser.add_argument("--task", required=True, choices=[task.value for task in Task])
    parser.add_argument("--target", action="append", required=True)
    parser.add_argument("--label", action="append", default=[])
    parser.add_argument("--layer", action="append", type=int)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    try:
        manifest = build_manifest(
            options.model,
            task=Task(options.task),
            target_modules=options.target,
            labels=options.label,
            layers=options.layer,
        )
    except GloraError as error:
        sys.stdout.write(json.dumps({"reason": error.reason.value, "message": error.message}) + "\n")
        return 2
    options.out.write_text(manifest.to_json(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(_main(sys.argv[1:]))
