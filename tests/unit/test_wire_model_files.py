"""Which files make a base model, and that their hashes are remembered only as long as they hold."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path

import pytest

from glora_wire.errors import GloraError, Reason
from glora_wire.manifest import fingerprint_folder, fingerprint_of, model_files, tokenizer_fingerprint


def fill(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).write_text(name)


def names(folder: Path) -> list[str]:
    return [path.name for path in model_files(folder)]


def test_a_single_file_wins(tmp_path: Path) -> None:
    fill(tmp_path, "model.safetensors", "other.safetensors", "pytorch_model.bin", "adapter_model.safetensors")
    assert names(tmp_path) == ["model.safetensors"]


def test_shards_of_the_index_and_nothing_else(tmp_path: Path) -> None:
    fill(tmp_path, "model-2.safetensors", "model-1.safetensors", "consolidated.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert names(tmp_path) == ["model-1.safetensors", "model-2.safetensors"]


def test_old_formats_and_bare_folders(tmp_path: Path) -> None:
    assert names(tmp_path) == []
    fill(tmp_path, "optimizer.bin", "training_args.bin", "rng_state.bin", "adapter_model.bin", ".hidden.bin", "x.bin")
    assert names(tmp_path) == ["x.bin"]
    fill(tmp_path, "pytorch_model.bin")
    assert names(tmp_path) == ["pytorch_model.bin"]
    fill(tmp_path, "b.safetensors", "a.safetensors", "adapter_model.safetensors")
    assert names(tmp_path) == ["a.safetensors", "b.safetensors"]


@pytest.mark.parametrize(
    "index",
    [
        "{",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": "../x"}}',
        '{"weight_map": {"a": "gone"}}',
    ],
)
def test_broken_indices(tmp_path: Path, index: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    (tmp_path.parent / "x").write_text("outside")
    with pytest.raises(GloraError) as caught:
        model_files(tmp_path)
    assert caught.value.reason is Reason.BASE_MODEL_MISSING


def test_hashes_and_fingerprint(tmp_path: Path) -> None:
    fill(tmp_path, "model.safetensors")
    sha256 = hashlib.sha256(b"model.safetensors").hexdigest()
    assert fingerprint_folder(tmp_path) == {"model.safetensors": sha256}
    expected = hashlib.sha256(f"{sha256}  model.safetensors\n".encode()).hexdigest()
    assert fingerprint_of({"model.safetensors": sha256}) == expected
    assert fingerprint_of({"a": "1", "b": "2"}) == fingerprint_of({"b": "2", "a": "1"}) != fingerprint_of({"a": "1"})


def test_an_empty_folder_is_said_to_be_one(tmp_path: Path) -> None:
    with pytest.raises(GloraError, match="no weight files") as caught:
        fingerprint_folder(tmp_path)
    assert caught.value.reason is Reason.BASE_MODEL_MISSING


def test_the_cache_is_private_used_and_not_believed_after_a_change(tmp_path: Path) -> None:
    model, cache = tmp_path / "model", tmp_path / "cache.json"
    model.mkdir()
    fill(model, "model.safetensors")
    first = fingerprint_folder(model, cache)
    assert stat.S_IMODE(cache.stat().st_mode) == 0o600
    # A planted hash comes back, so the file was not read again ...
    document = json.loads(cache.read_text())
    cache.write_text(json.dumps(dict.fromkeys(document, "9" * 64)))
    assert fingerprint_folder(model, cache) == {"model.safetensors": "9" * 64}
    # ... until its time or size changes, or the cache is damaged.
    os.utime(model / "model.safetensors", ns=(1, 1))
    assert fingerprint_folder(model, cache) == first
    for damage in ("{", "[1]", json.dumps(dict.fromkeys(json.loads(cache.read_text()), 5))):
        cache.write_text(damage)
        assert fingerprint_folder(model, cache) == first
    assert list(tmp_path.glob(".*")) == []


def test_tokenizers(tmp_path: Path) -> None:
    assert tokenizer_fingerprint(tmp_path) == ""
    fill(tmp_path, "tokenizer.json", "README.md")
    first = tokenizer_fingerprint(tmp_path)
    assert len(first) == 64
    fill(tmp_path, "LICENSE")
    assert tokenizer_fingerprint(tmp_path) == first
    fill(tmp_path, "vocab.txt")
    assert tokenizer_fingerprint(tmp_path) != first
