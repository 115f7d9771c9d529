"""Where the manifest of a new run comes from: a file, or the base model on this machine."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from glora_server.coordinator.run_spec import RunSpec
from glora_wire.errors import GloraError, Reason
from glora_wire.manifest import Manifest

_BUILDER: Final = "glora_client.manifest_builder"


def read_manifest(path: Path) -> Manifest:
    """The manifest in a file; raises MANIFEST_INVALID naming the file."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise GloraError(Reason.MANIFEST_INVALID, f"The manifest {path} cannot be read: {error}.") from None
    try:
        return Manifest.from_json(text)
    except GloraError as error:
        raise GloraError(error.reason, f"{path}: {error.message}") from None


def build_manifest(spec: RunSpec) -> Manifest:
    """The manifest of the base model that `spec` names, made in a process of its own (torch stays out of this one).

    Raises SPEC_INVALID where glora[client] is not installed, and whatever the builder says about the model.
    """
    if any(importlib.util.find_spec(package) is None for package in ("glora_client", "torch", "transformers")):
        raise GloraError(
            Reason.SPEC_INVALID,
            "Reading the base model needs torch and transformers: pip install 'glora[client]'. Or make the manifest on "
            f"a machine that has them (python -m {_BUILDER} --help) and give it with --manifest FILE.",
        )
    with tempfile.TemporaryDirectory(prefix="glora-manifest-") as folder:
        target = Path(folder) / "manifest.json"
        done = subprocess.run(_command(spec, target), capture_output=True, text=True, check=False)  # noqa: S603
        if done.returncode != 0:
            raise _told_by(done)
        return read_manifest(target)


def _command(spec: RunSpec, target: Path) -> list[str]:
    model = spec.model
    command = [sys.executable, "-m", _BUILDER, "--model", model.path, "--task", model.task, "--out", str(target)]
    command += [part for name in model.target_modules for part in ("--target", name)]
    command += [part for label in model.labels for part in ("--label", label)]
    return command + [part for layer in model.layers for part in ("--layer", str(layer))]


def _told_by(done: subprocess.CompletedProcess[str]) -> GloraError:
    """The error that the builder printed as its last line, or what it wrote to stderr."""
    try:
        told = json.loads(done.stdout.strip().splitlines()[-1])
        return GloraError(Reason(told["reason"]), str(told["message"]))
    except (IndexError, ValueError, KeyError, TypeError):
        said = done.stderr.strip().splitlines()
        return GloraError(
            Reason.BASE_MODEL_MISSING,
            f"The base model could not be read: {said[-1] if said else 'no reason was given'}.",
        )
