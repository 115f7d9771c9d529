"""Fingerprints of a base model and its tokenizer: which files count, and their hashes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from glora_wire.digests import HashAlgorithm, digest_file
from glora_wire.errors import GloraError, Reason

# In the order in which transformers looks for them.
_FAMILIES: Final = (
    ("model.safetensors", "model.safetensors.index.json", "*.safetensors"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", "*.bin"),
)
_NOT_WEIGHTS: Final = re.compile(r"(adapter_|optimizer|scheduler|scaler|rng_state|training_args|\.)", re.IGNORECASE)
_MAX_INDEX_BYTES: Final = 64 * 1024 * 1024
_TOKENIZER_FILES: Final = (
    "added_tokens.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


def model_files(folder: Path) -> list[Path]:
    """Weight files of the model in `folder`, sorted by name; empty when there are none.

    The single file or the shards of the index that transformers would load; else every *.safetensors, else every *.bin,
    never an adapter's or an optimizer's. Raises GloraError BASE_MODEL_MISSING when the index is broken or names a file
    that is not there.
    """
    for single, index, pattern in _FAMILIES:
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            return _shards(folder / index)
        found = [path for path in folder.glob(pattern) if path.is_file() and not _NOT_WEIGHTS.match(path.name)]
        if found:
            return sorted(found)
    return []


def fingerprint_of(weight_files: Mapping[str, str]) -> str:
    """Fingerprint of a base model from its weight files, {file name: SHA-256 in hex}: hex SHA-256 over the sorted lines
    "<hash>  <name>"."""
    lines = "".join(f"{sha256}  {name}\n" for name, sha256 in sorted(weight_files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def fingerprint_folder(folder: Path, cache: Path | None = None) -> dict[str, str]:
    """SHA-256 (hex) of each weight file in `folder`, by file name.

    `cache` is a JSON file (written with mode 0600) that remembers hashes by path, size and modification time, because
    hashing a large model takes minutes. Raises GloraError BASE_MODEL_MISSING when there is no weight file, and OSError.
    """
    files = model_files(folder)
    if not files:
        raise GloraError(
            Reason.BASE_MODEL_MISSING,
            f"There are no weight files in {folder}; name a folder with model.safetensors, its shards, or "
            "pytorch_model.bin.",
            folder=folder,
        )
    known = _read_cache(cache) if cache is not None else {}
    hashes: dict[str, str] = {}
    seen: dict[str, str] = {}
    for path in files:
        status = path.stat()
        key = f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}"
        hashes[path.name] = seen[key] = known.get(key) or digest_file(path, HashAlgorithm.SHA256).hex
    if cache is not None and not seen.items() <= known.items():
        _write_cache(cache, known | seen)
    return hashes


def tokenizer_fingerprint(folder: Path) -> str:
    """Fingerprint of the tokenizer files that exist in `folder`; empty when there are none; raises OSError."""
    hashes = {
        name: digest_file(folder / name, HashAlgorithm.SHA256).hex
        for name in _TOKENIZER_FILES
        if (folder / name).is_file()
    }
    return fingerprint_of(hashes) if hashes else ""


def _shards(index: Path) -> list[Path]:
    try:
        if index.stat().st_size > _MAX_INDEX_BYTES:
            raise ValueError("it is too large")
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = {str(name) for name in weight_map.values()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _broken(index, f"cannot be read ({type(error).__name__}: {error})") from error
    for name in sorted(names):
        if name != Path(name).name or not (index.parent / name).is_file():
            raise _broken(index, f"names the file {name[:200]!r}, which is not in the folder")
    if not names:
        raise _broken(index, "names no file")
    return sorted(index.parent / name for name in names)


def _broken(index: Path, what: str) -> GloraError:
    return GloraError(Reason.BASE_MODEL_MISSING, f"The index {index} {what}; download the model again.", index=index)


def _read_cache(cache: Path) -> dict[str, str]:
    """What the cache remembers; nothing when it is not there or not ours, for then everything is hashed again."""
    try:
        document = json.loads(cache.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    if not isinstance(document, dict):
        return {}
    return {key: value for key, value in document.items() if isinstance(value, str) and len(value) == 64}


def _write_cache(cache: Path, known: Mapping[str, str]) -> None:
    descriptor, name = tempfile.mkstemp(prefix=f".{cache.name}.", dir=cache.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(dict(known), file, indent=1, sort_keys=True)
        temporary.replace(cache)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
