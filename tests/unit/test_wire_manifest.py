"""The manifest: canonical, strict, and the source of every tensor that a plan names."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import Any

import pytest

from glora_wire.errors import GloraError, Reason
from glora_wire.manifest import (
    BaseInit,
    DenseTensor,
    Manifest,
    ModuleShape,
    NormalInit,
    ZerosInit,
    adapter_specs,
    fingerprint_of,
)
from glora_wire.payload import MAX_HEADER_BYTES, TensorDtype, TensorSpec, layout

FILES = {"model-00001-of-00002.safetensors": "a" * 64, "model-00002-of-00002.safetensors": "b" * 64}
MANIFEST = Manifest(
    task="sequence_classification",
    base_model_name="tiny/bert",
    base_model_fingerprint=fingerprint_of(FILES),
    weight_files=FILES,
    tokenizer_fingerprint="c" * 64,
    labels=("gut", "böse"),
    modules=(ModuleShape("bert.layer.0.query", 6, 10), ModuleShape("bert.layer.1.query", 6, 10)),
    dense=(
        DenseTensor("classifier.weight", (2, 6), NormalInit(0.02)),
        DenseTensor("classifier.bias", (2,), ZerosInit()),
        DenseTensor("pooler.dense.bias", (6,), BaseInit()),
    ),
    target_modules=("query",),
)


def edited(path: str, value: object) -> str:
    """The JSON of MANIFEST with the value at the dotted path replaced (None removes nothing: it writes null)."""
    document: Any = json.loads(MANIFEST.to_json())
    node = document
    *parents, last = [int(part) if part.isdigit() else part for part in path.split("/")]
    for part in parents:
        node = node[part]
    node[last] = value
    return json.dumps(document)


def refused(text: str) -> str:
    with pytest.raises(GloraError) as caught:
        Manifest.from_json(text)
    assert caught.value.reason is Reason.MANIFEST_INVALID
    return caught.value.message


def test_round_trip_is_canonical() -> None:
    text = MANIFEST.to_json()
    assert Manifest.from_json(text) == MANIFEST
    assert Manifest.from_json(json.dumps(json.loads(text), indent=3)).to_json() == text
    assert "böse" in text
    assert MANIFEST.digest == hashlib.sha256(text.encode()).hexdigest()
    assert replace(MANIFEST, labels=("gut", "schlecht")).digest != MANIFEST.digest
    reordered = dict(reversed(list(FILES.items())))
    assert replace(MANIFEST, weight_files=reordered).digest == MANIFEST.digest
    whole = Manifest.from_json(edited("dense/0/init/std", 1))
    assert whole.digest == Manifest.from_json(edited("dense/0/init/std", 1.0)).digest


def test_causal_lm_has_no_labels() -> None:
    causal = replace(MANIFEST, task="causal_lm", labels=(), dense=())
    assert Manifest.from_json(causal.to_json()) == causal
    with pytest.raises(GloraError, match="labels must be empty"):
        replace(causal, labels=("a", "b"))


def test_a_fingerprint_alone_is_enough_when_no_files_are_named() -> None:
    by_hand = replace(MANIFEST, weight_files={}, base_model_fingerprint="1" * 64, tokenizer_fingerprint="")
    assert Manifest.from_json(by_hand.to_json()) == by_hand


@pytest.mark.parametrize(
    ("path", "value", "why"),
    [
        ("format", 2, "format must be 1"),
        ("format", True, "format must be a whole number"),
        ("task", "translation", "task must be"),
        ("task", 3, "task must be a text"),
        ("surplus", 3, "unknown key 'surplus'"),
        ("line\nbreak", 3, "unknown key"),
        ("base_model_name", "", "base_model_name"),
        ("base_model_name", "a\u0000b", "base_model_name"),
        ("base_model_fingerprint", "A" * 64, "base_model_fingerprint"),
        ("base_model_fingerprint", "1" * 64, "does not follow"),
        ("tokenizer_fingerprint", "zz", "tokenizer_fingerprint"),
        ("weight_files", [], "weight_files must be an object"),
        ("weight_files/x", "1", "weight_files.x"),
        ("weight_files/x\ud800", 1, "weight_files."),
        ("labels", "ab", "labels must be a list"),
        ("labels", ["a"], "two classes"),
        ("labels", ["a", "a"], "'a' twice"),
        ("labels/1", 5, "labels[1] must be a text"),
        ("labels/1", "\ud800", "labels[1]"),
        ("labels", [str(index) for index in range(10_001)], "10001"),
        ("modules", [], "modules"),
        ("modules", [None] * 20_001, "20001"),
        ("modules/1/name", "bert.layer.0.query", "twice"),
        ("modules/1/name", "a..b", "modules[1].name"),
        ("modules/1/name", "a" * 257, "modules[1].name"),
        ("modules/1/in_features", 0, "modules[1].in_features"),
        ("modules/1/in_features", 1_000_001, "modules[1].in_features"),
        ("modules/1/out_features", -4, "modules[1].out_features"),
        ("modules/1/out_features", 4.0, "modules[1].out_features must be a whole number"),
        ("modules/1/out_features", True, "modules[1].out_features must be a whole number"),
        ("modules/1/rank", 4, "modules[1] has the unknown key"),
        ("modules/1", {"name": "x"}, "modules[1] lacks the key"),
        ("modules/1", 7, "modules[1] must be an object"),
        ("dense/1/name", "classifier.weight", "twice"),
        ("dense/1/name", "bert.layer.0.query.weight", "adapted module"),
        ("dense/1/name", "x.lora_A.weight", "adapted module"),
        ("dense/1/shape", [2, 0], "dense[1].shape[1]"),
        ("dense/1/shape", [1] * 9, "at most 8"),
        ("dense/1/shape", [10**6, 10**6], "elements"),
        ("dense/1/shape/0", "2", "dense[1].shape[0]"),
        ("dense/1/init", "zeros", "dense[1].init must be an object"),
        ("dense/1/init", {}, "dense[1].init must have the kind"),
        ("dense/1/init", {"kind": "ones"}, "dense[1].init must have the kind"),
        ("dense/1/init", {"kind": "zeros", "std": 1}, "unknown key 'std'"),
        ("dense/1/init", {"kind": "base", "std": 1}, "unknown key 'std'"),
        ("dense/0/init", {"kind": "normal"}, "lacks the key 'std'"),
        ("dense/0/init/std", 0, "dense[0].init.std"),
        ("dense/0/init/std", -0.5, "dense[0].init.std"),
        ("dense/0/init/std", "x", "dense[0].init.std must be a number"),
        ("dense/0/init/std", True, "dense[0].init.std must be a number"),
        ("dense/0/init/std", 10**400, "dense[0].init.std is too large"),
        ("target_modules", ["q", "q"], "twice"),
    ],
)
def test_refusals_name_the_key(path: str, value: object, why: str) -> None:
    message = refused(edited(path, value))
    assert why in message
    assert message.isprintable()


@pytest.mark.parametrize("key", sorted(json.loads(MANIFEST.to_json())))
def test_every_key_is_needed(key: str) -> None:
    document = json.loads(MANIFEST.to_json())
    del document[key]
    assert f"lacks the key '{key}'" in refused(json.dumps(document))


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{", "[" * 100_000, '{"task": NaN}', '{"task": 1, "task": 2}', " " * (16 * 2**20 + 1)]
)
def test_texts_that_are_no_manifest(text: str) -> None:
    refused(text)


def test_a_manifest_that_no_payload_could_carry_is_refused() -> None:
    def wide(count: int) -> Manifest:
        return replace(
            MANIFEST, modules=tuple(ModuleShape("m" * 240 + str(index), 10**6, 10**6) for index in range(count))
        )

    most = 4 * 2**20 // (2 * (245 + 128))
    specs = adapter_specs(wide(most), 65_536, TensorDtype.BFLOAT16)
    assert 0.9 * MAX_HEADER_BYTES < len(layout(specs).header) <= MAX_HEADER_BYTES
    with pytest.raises(GloraError, match="payload header"):
        wide(most + 100)


def test_specs_follow_the_manifest() -> None:
    f32 = TensorDtype.FLOAT32
    factors = [
        TensorSpec(f"base_model.model.bert.layer.{layer}.query.lora_{factor}.weight", f32, shape)
        for layer in (0, 1)
        for factor, shape in (("A", (8, 10)), ("B", (6, 8)))
    ]
    dense = [
        TensorSpec("base_model.model.classifier.weight", f32, (2, 6)),
        TensorSpec("base_model.model.classifier.bias", f32, (2,)),
        TensorSpec("base_model.model.pooler.dense.bias", f32, (6,)),
    ]
    assert adapter_specs(MANIFEST, 8, f32) == (*factors, *dense)
    assert adapter_specs(MANIFEST, 8, f32, base_dense=False) == (*factors, *dense[:2])
    assert adapter_specs(MANIFEST, 8, f32, with_dense=False) == tuple(factors)
