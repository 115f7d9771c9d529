"""Scales from adapter_config.json: what PEFT would do, and what no server should run."""

from __future__ import annotations

import json
import math

import pytest

from glora_wire.adapter_config import MAX_CONFIG_BYTES
from glora_wire.errors import GloraError, Reason
from glora_wire.names import ModuleScale, adapter_config_json, scales_from_config

LONG = ["x." * 127 + "y"] * 80
MODULES = [f"model.layers.{index}.self_attn.{name}" for index in (0, 1, 10, 11) for name in ("q_proj", "v_proj")]


def config(**options: object) -> str:
    return json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 16, **options})


def refused(text: str) -> str:
    with pytest.raises(GloraError) as caught:
        scales_from_config(text, MODULES)
    assert caught.value.reason is Reason.CONFIG_INVALID
    assert len(caught.value.message) < 500
    return caught.value.message


def test_plain_and_rank_stabilised() -> None:
    assert scales_from_config(config(), MODULES) == dict.fromkeys(MODULES, ModuleScale(rank=8, alpha=16.0, scale=2.0))
    stabilised = scales_from_config(config(use_rslora=True), MODULES[:1])
    assert stabilised[MODULES[0]].scale == pytest.approx(16 / math.sqrt(8))


def test_what_we_write_we_read() -> None:
    text = adapter_config_json(
        rank=6,
        scale=0.25,
        target_modules=MODULES,
        task_type="CAUSAL_LM",
        base_model_name="m",
        modules_to_save=[],
    )
    assert text == adapter_config_json(
        rank=6,
        scale=0.25,
        target_modules=MODULES,
        task_type="CAUSAL_LM",
        base_model_name="m",
        modules_to_save=[],
    )
    assert json.loads(text)["peft_type"] == "LORA"
    assert json.loads(text)["modules_to_save"] is None
    assert {scale.scale for scale in scales_from_config(text, MODULES).values()} == {0.25}


PATTERNS = [
    "q_proj",
    "proj",
    "layers.1.self_attn.q_proj",
    "1.self_attn.q_proj",
    "^model.layers.0.self_attn.q_proj",
    r"model\.layers\.\d+\.self_attn\.v_proj",
    r"layers\.[01]\.self_attn\.(q|v)_proj",
    ".*q_proj",
    "self_attn.q.proj",
    "layers.1.*",
    r"(?:layers.1.self_attn.q_proj|layers.0.self_attn.v_proj)",
    "nothing",
]


@pytest.mark.parametrize("option", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_match_as_in_peft(pattern: str, option: str) -> None:
    from peft.utils.other import get_pattern_key

    scales = scales_from_config(config(**{option: {pattern: 4, "v_proj": 2}}), MODULES)
    for name in MODULES:
        expected = {pattern: 4, "v_proj": 2}.get(get_pattern_key([pattern, "v_proj"], name))
        rank, alpha = (expected or 8, 16) if option == "rank_pattern" else (8, expected or 16)
        assert scales[name] == ModuleScale(rank=rank, alpha=alpha, scale=alpha / rank)


def test_null_patterns_are_none() -> None:
    assert len(scales_from_config(config(rank_pattern=None, alpha_pattern={}, use_rslora=None), MODULES)) == 8


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"peft_type": "GLORA"}, "GLORA"),
        ({"peft_type": None}, "peft_type"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"bias": "lora_only"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"layer_replication": [[0, 4]]}, "layer_replication"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"r": 0}, "whole number"),
        ({"r": True}, "whole number"),
        ({"r": 8.0}, "whole number"),
        ({"r": "8"}, "whole number"),
        ({"r": 10**9}, "whole number"),
        ({"lora_alpha": -1}, "positive"),
        ({"lora_alpha": 0}, "positive"),
        ({"lora_alpha": float("nan")}, "positive"),
        ({"lora_alpha": float("inf")}, "positive"),
        ({"lora_alpha": 10**400}, "positive"),
        ({"lora_alpha": 1e11}, "scale"),
        ({"lora_alpha": None}, "positive"),
        ({"use_rslora": "yes"}, "use_rslora"),
        ({"use_rslora": 1}, "use_rslora"),
        ({"rank_pattern": ["q"]}, "not an object"),
        ({"rank_pattern": {"q": 0}}, "whole number"),
        ({"alpha_pattern": {"q": "x"}}, "positive"),
        ({"rank_pattern": {"(q": 1}}, "regular expression"),
        ({"rank_pattern": {"": 1}}, "pattern"),
        ({"rank_pattern": {"(a+)+": 1}}, "simple"),
        ({"rank_pattern": {"(a|a)(a|a)(a|a)": 1}}, "simple"),
        ({"rank_pattern": {".*.*.*": 1}}, "simple"),
        ({"rank_pattern": {"(?=a)": 1}}, "simple"),
        ({"rank_pattern": {"a{1,99}": 1}}, "simple"),
        ({"rank_pattern": {r"(a)\1": 1}}, "simple"),
        ({"rank_pattern": {"q|" * 200: 1}}, "simple"),
    ],
)
def test_refused_options(options: dict[str, object], why: str) -> None:
    assert why in refused(config(**options))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "3",
        '{"peft_type": "LORA", "r": 8, "r": 4, "lora_alpha": 8}',
        "{" * 100_000,
        "[" * 200_000,
        '{"a": "' + "x" * MAX_CONFIG_BYTES + '"}',
        '{"a": "' + "ä" * (MAX_CONFIG_BYTES // 2) + '"}',
        '{"r": ' + "9" * 5000 + "}",
    ],
)
def test_refused_texts(text: str) -> None:
    refused(text)


def test_patterns_are_counted_before_they_are_run() -> None:
    patterns = json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 8, "rank_pattern": dict.fromkeys("abcd", 1)})
    with pytest.raises(GloraError, match="too many"):
        scales_from_config(patterns, ["module"] * 1_000_001)


def test_patterns_that_would_take_long_are_not_run() -> None:
    slow = {".*.*" + "q" * index: 1 for index in range(60)}
    with pytest.raises(GloraError, match="too long to match"):
        scales_from_config(config(rank_pattern=slow), LONG)
    assert len(scales_from_config(config(rank_pattern=slow), MODULES)) == len(MODULES)


def test_many_literal_patterns_are_normal() -> None:
    names = [f"model.layers.{index}.self_attn.q_proj" for index in range(300)]
    ranks = {name: 1 + index % 7 for index, name in enumerate(names)}
    scales = scales_from_config(config(rank_pattern=ranks), names)
    assert {name: scale.rank for name, scale in scales.items()} == ranks


@pytest.mark.parametrize("pattern", [r"\w*\w*b", ".*.*b", r"(\w*|a)(\w*|b)x", "a?a*b"])
def test_the_worst_patterns_that_are_taken_do_not_hang(pattern: str) -> None:
    # PEFT's own prefix adds a third repetition; an exponential one would not end within a lifetime here.
    name = "a." * 127 + "c"
    assert scales_from_config(config(rank_pattern={pattern: 1}), [name])[name].rank == 8
