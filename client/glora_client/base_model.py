"""Loads the base model and its tokenizer with transformers, quietly and for the manifest's task and labels."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, cast

import torch
from torch import nn

from glora_client.batches import Tokenizer
from glora_wire.errors import GloraError, Reason
from glora_wire.manifest import Manifest


class Quantization(StrEnum):
    """How the base model's own weights are kept in memory; the adapter is never quantised."""

    NONE = "none"
    INT8 = "int8"
    NF4 = "nf4"


@dataclass(frozen=True, slots=True)
class BaseModel:
    """The loaded model on its device, in eval mode, and its tokenizer with a padding token."""

    model: nn.Module
    tokenizer: Tokenizer
    device: torch.device


_CLASSIFICATION: Final = "sequence_classification"


def load_base_model(path: Path, manifest: Manifest, quantization: Quantization = Quantization.NONE) -> BaseModel:
    """The base model in `path` for the manifest's task, on CUDA where torch sees one.

    Raises GloraError BASE_MODEL_MISSING or CONFIG_INVALID; memory errors of torch pass through.
    """
    # Its annotations describe the lazy stand-ins, not what the factories return.
    transformers: Any = importlib.import_module("transformers")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options = _options(quantization, manifest, device)
    factory = transformers.AutoModelForCausalLM
    if manifest.task == _CLASSIFICATION:
        factory = transformers.AutoModelForSequenceClassification
        names = dict(enumerate(manifest.labels))
        options |= {"num_labels": len(names), "id2label": names, "label2id": {name: i for i, name in names.items()}}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(path))
            model, report = factory.from_pretrained(str(path), output_loading_info=True, **options)
    except (OSError, ValueError, KeyError) as error:
        raise GloraError(
            Reason.BASE_MODEL_MISSING,
            f"transformers cannot load the base model in {path} for {manifest.task} ({error}).",
            path=path,
        ) from error
    _check_complete(path, model, report, manifest)
    if quantization is Quantization.NONE:
        model.to(device)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.use_cache = False
    return BaseModel(model=cast("nn.Module", model.eval()), tokenizer=cast("Tokenizer", tokenizer), device=device)


def _options(quantization: Quantization, manifest: Manifest, device: torch.device) -> dict[str, object]:
    if quantization is Quantization.NONE:
        return {"dtype": torch.float32}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise GloraError(
            Reason.CONFIG_INVALID,
            f"--quantization {quantization} needs bitsandbytes; pip install bitsandbytes, or leave the option out.",
        )
    transformers: Any = importlib.import_module("transformers")
    heads = sorted({tensor.name.rpartition(".")[0] for tensor in manifest.dense})
    settings = transformers.BitsAndBytesConfig(
        load_in_8bit=quantization is Quantization.INT8,
        load_in_4bit=quantization is Quantization.NF4,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        # Trained tensors must stay whole; lm_head is what transformers leaves out by default.
        llm_int8_skip_modules=[*heads, "lm_head"],
    )
    return {"quantization_config": settings, "device_map": {"": str(device)}}


def _check_complete(path: Path, model: nn.Module, report: dict[str, object], manifest: Manifest) -> None:
    """Refuse a model with random weights that no run would ever send: it would train on noise."""
    missing = report["missing_keys"]
    sent = {tensor.name for tensor in manifest.dense}
    names = {name for name, _ in model.named_parameters()}
    random = sorted(name for name in cast("set[str]", missing) if name in names and name not in sent)
    if random:
        raise GloraError(
            Reason.BASE_MODEL_MISMATCH,
            f"The weights in {path} lack {len(random)} tensors that the run does not train ({', '.join(random[:3])}); "
            "start the client with the run's base model.",
            path=path,
        )
