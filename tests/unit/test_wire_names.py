"""Tensor names and configurations against a real PEFT model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from glora_wire.errors import GloraError, Reason
from glora_wire.manifest import DenseTensor, Manifest, ModuleShape, ZerosInit, adapter_specs
from glora_wire.names import (
    DenseKey,
    LoraKey,
    adapter_config_json,
    dense_key,
    lora_key,
    scales_from_config,
    split_key,
)
from glora_wire.payload import TensorDtype, check_specs, read_header

if TYPE_CHECKING:
    import peft

# PEFT still reads the old name of a transformers property.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

MODULES = [f"bert.encoder.layer.{layer}.attention.self.{name}" for layer in range(2) for name in ("query", "value")]


def config_text(rank: int = 3, scale: float = 2.0) -> str:
    return adapter_config_json(
        rank=rank,
        scale=scale,
        target_modules=MODULES,
        task_type="SEQ_CLS",
        base_model_name="tiny",
        modules_to_save=["classifier"],
        dropout=0.1,
    )


def peft_model(folder: Path, text: str) -> peft.PeftModel:
    """A tiny BERT with the adapter that the configuration describes."""
    import peft
    import transformers

    (folder / "adapter_config.json").write_text(text)
    config = transformers.AutoConfig.for_model(
        "bert",
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=16,
        num_labels=3,
    )
    base = transformers.AutoModelForSequenceClassification.from_config(config)  # type: ignore[no-untyped-call]  # untyped in transformers
    lora = peft.PeftConfig.from_pretrained(str(folder))
    lora.inference_mode = False
    lora.base_model_name_or_path = None  # PEFT warns when it cannot confirm the name
    return peft.PeftModelForSequenceClassification(base, lora)


def test_keys_round_trip() -> None:
    assert lora_key("a.q", "A") == "base_model.model.a.q.lora_A.weight"
    assert split_key(lora_key("a.q", "A")) == LoraKey("a.q", "A")
    assert split_key(lora_key("a.q", "B")) == LoraKey("a.q", "B")
    assert split_key(dense_key("classifier.weight")) == DenseKey("classifier.weight")
    assert split_key("base_model.model.e.lora_embedding_A") == DenseKey("e.lora_embedding_A")


@pytest.mark.parametrize("key", ["", "classifier.weight", "base_model.model.", "x.base_model.model.a"])
def test_foreign_keys_are_refused(key: str) -> None:
    with pytest.raises(GloraError) as caught:
        split_key(key)
    assert caught.value.reason is Reason.TENSOR_NAMES_WRONG


def test_peft_saves_exactly_the_tensors_that_a_manifest_plans(tmp_path: Path) -> None:
    model = peft_model(tmp_path, config_text(rank=3))
    model.save_pretrained(str(tmp_path / "saved"))
    header = read_header(tmp_path / "saved" / "adapter_model.safetensors")
    manifest = Manifest(
        task="sequence_classification",
        base_model_name="tiny",
        base_model_fingerprint="0" * 64,
        weight_files={},
        tokenizer_fingerprint="",
        labels=("a", "b", "c"),
        modules=tuple(ModuleShape(name, 8, 8) for name in MODULES),
        dense=(
            DenseTensor("classifier.weight", (3, 8), ZerosInit()),
            DenseTensor("classifier.bias", (3,), ZerosInit()),
        ),
        target_modules=("query", "value"),
    )
    check_specs(header, adapter_specs(manifest, 3, TensorDtype.FLOAT32))


def test_our_configuration_gives_peft_the_planned_scale_and_modules(tmp_path: Path) -> None:
    text = config_text(rank=3, scale=0.5)
    model = peft_model(tmp_path, text)
    scalings = {
        name.removeprefix("base_model.model."): module.scaling["default"]
        for name, module in model.named_modules()
        if hasattr(module, "scaling") and isinstance(module.scaling, dict) and "default" in module.scaling
    }
    assert scalings == dict.fromkeys(MODULES, 0.5)
    ours = scales_from_config(text, MODULES)
    assert {name: scale.scale for name, scale in ours.items()} == scalings
    assert json.loads(text)["lora_alpha"] == 1.5
    assert model.peft_config["default"].to_dict()["lora_dropout"] == 0.1


def test_what_peft_saves_is_a_configuration_that_we_read(tmp_path: Path) -> None:
    import peft

    document = json.loads(config_text(rank=3))
    document |= {"rank_pattern": {"layer.1.attention.self.query": 5}, "alpha_pattern": {".*value": 12}}
    model = peft_model(tmp_path, json.dumps(document))
    model.save_pretrained(str(tmp_path / "saved"))
    ours = scales_from_config((tmp_path / "saved" / "adapter_config.json").read_text(), MODULES)
    for name in MODULES:
        layer = model.get_submodule(f"base_model.model.{name}")
        assert isinstance(layer, peft.tuners.lora.LoraLayer)
        assert (ours[name].rank, ours[name].scale) == (layer.r["default"], layer.scaling["default"])
    assert {scale.rank for scale in ours.values()} == {3, 5}
    assert len({scale.scale for scale in ours.values()}) == 3
