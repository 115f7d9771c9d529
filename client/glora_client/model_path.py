"""Where the base model lies: a folder on this device, or a name on the hub that is fetched once."""

from __future__ import annotations

import importlib
from pathlib import Path

from glora_wire.errors import GloraError, Reason

_WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def resolve_model(model: str) -> Path:
    """Folder with the base model's files; a hub name is downloaded into the hub's own cache the first time.

    Raises GloraError BASE_MODEL_MISSING saying what to do.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise _missing(f"{folder} has no config.json, so it is not a model folder; give the folder that has one.")
        return folder.resolve()
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise _missing(f"The model folder {model} does not exist.")
    return _from_hub(model)


def _from_hub(name: str) -> Path:
    try:
        hub = importlib.import_module("huggingface_hub")
        errors = importlib.import_module("huggingface_hub.errors")
    except ImportError as error:
        raise _missing(f"{model_hint(name)} Fetching it needs huggingface_hub; pip install 'glora[client]'.") from error
    try:
        return Path(hub.snapshot_download(name, allow_patterns=_WANTED))
    except errors.LocalEntryNotFoundError as error:
        raise _missing(
            f"{model_hint(name)} It is not in the hub's cache either, and the hub cannot be reached (or HF_HUB_OFFLINE "
            "is set); download it where there is a network and give the folder."
        ) from error
    except (OSError, ValueError, errors.HfHubHTTPError) as error:
        raise _missing(f"{model_hint(name)} The hub did not deliver it ({error}).") from error


def model_hint(name: str) -> str:
    """First half of the sentences about a model that is no folder."""
    return f"There is no folder {name!r}, so it was taken for a name on the hub."


def _missing(message: str) -> GloraError:
    return GloraError(Reason.BASE_MODEL_MISSING, message)
