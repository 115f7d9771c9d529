"""Payloads of any shape survive; damaged or invented headers are refused or read as what they say, never worse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glora_wire.errors import GloraError, Reason
from glora_wire.manifest import Manifest, ModuleShape
from glora_wire.names import scales_from_config
from glora_wire.payload import PayloadWriter, TensorDtype, TensorSpec, check_specs, layout, payload_bytes, read_header

printable = st.text(min_size=1, max_size=20).filter(lambda text: text.isprintable() and text != "__metadata__")
specs_lists = st.lists(
    st.builds(
        TensorSpec,
        printable,
        st.sampled_from(TensorDtype),
        st.lists(st.integers(0, 6), max_size=3).map(tuple),
    ),
    max_size=6,
    unique_by=lambda spec: spec.name,
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file for all examples of this module."""
    return tmp_path_factory.mktemp("payloads") / "p.safetensors"


@settings(deadline=None)  # each example waits for the disk
@given(specs=specs_lists, fill=st.binary(min_size=64, max_size=64), order=st.permutations(range(6)))
def test_round_trip(path: Path, specs: list[TensorSpec], fill: bytes, order: list[int]) -> None:
    contents = {spec.name: (fill * (spec.nbytes // 64 + 1))[: spec.nbytes] for spec in specs}
    with PayloadWriter(path, specs) as writer:
        for name, data in contents.items():
            writer.write(name, data)
    header = read_header(path)
    assert header.total_bytes == path.stat().st_size == payload_bytes(specs)
    assert set(header.specs) == set(specs)
    raw = path.read_bytes()
    assert {item.spec.name: raw[item.offset : item.end] for item in header.entries} == contents
    check_specs(header, [specs[index] for index in order if index < len(specs)])


@given(
    specs=specs_lists,
    damage=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=4),
    keep=st.integers(0, 500),
)
def test_damage_is_refused_or_harmless(
    path: Path, specs: list[TensorSpec], damage: list[tuple[int, int]], keep: int
) -> None:
    whole = layout(specs)
    data = bytearray(whole.header + bytes(whole.total_bytes - len(whole.header)))
    for at, value in damage:
        data[at % len(data)] = value
    path.write_bytes(data[: keep if keep % 3 == 0 else len(data)])
    expect_sound_or_refused(path)


@given(document=json_values | st.dictionaries(printable, json_values, max_size=3), tail=st.binary(max_size=16))
def test_any_json_as_a_header(path: Path, document: object, tail: bytes) -> None:
    text = json.dumps(document).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + tail)
    expect_sound_or_refused(path)


T = TypeVar("T")


def attempt(call: Callable[[], T]) -> T | GloraError:
    """What the call returns, or the GloraError that it raises; anything else it raises fails the test."""
    try:
        return call()
    except GloraError as error:
        return error


def expect_sound_or_refused(path: Path) -> None:
    """Whatever is read lies within the file, without holes or overlaps; all else is PAYLOAD_MALFORMED."""
    header = attempt(lambda: read_header(path))
    if isinstance(header, GloraError):
        assert header.reason is Reason.PAYLOAD_MALFORMED
        assert header.message.isprintable()
        return
    size = path.stat().st_size
    data_start = header.entries[0].offset if header.entries else size
    assert data_start + sum(item.spec.nbytes for item in header.entries) == size
    for item in header.entries:
        assert 8 <= item.offset <= item.end <= size


@given(document=json_values)
def test_any_json_as_a_configuration_or_a_manifest(document: object) -> None:
    text = json.dumps(document)
    with pytest.raises(GloraError) as caught:
        scales_from_config(text, ["a"])
    assert caught.value.reason is Reason.CONFIG_INVALID
    with pytest.raises(GloraError) as caught:
        Manifest.from_json(text)
    assert caught.value.reason is Reason.MANIFEST_INVALID
    assert caught.value.message.isprintable()


MANIFEST = Manifest(
    task="causal_lm",
    base_model_name="m",
    base_model_fingerprint="0" * 64,
    weight_files={},
    tokenizer_fingerprint="",
    labels=(),
    modules=(ModuleShape("a", 1, 2),),
    dense=(),
    target_modules=("a",),
)


@given(
    key=st.sampled_from(sorted(json.loads(MANIFEST.to_json()))),
    value=json_values,
    option=st.sampled_from(["r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "use_dora"]),
)
def test_any_value_for_a_key_is_taken_or_refused_with_its_reason(key: str, value: object, option: str) -> None:
    text = json.dumps(json.loads(MANIFEST.to_json()) | {key: value})
    manifest = attempt(lambda: Manifest.from_json(text))
    if isinstance(manifest, GloraError):
        assert manifest.reason is Reason.MANIFEST_INVALID
    else:
        assert Manifest.from_json(manifest.to_json()) == manifest
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8} | {option: value}
    scales = attempt(lambda: scales_from_config(json.dumps(config), ["a"]))
    if isinstance(scales, GloraError):
        assert scales.reason is Reason.CONFIG_INVALID
    else:
        assert scales["a"].scale > 0
