"""What the device says about itself, and which LoRA rank it can afford. No torch here."""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Final

from glora.v1 import types_pb2

MAX_AUTO_RANK: Final = 64
_PROCESS_BYTES: Final = 600 * 1024**2
"""What torch, transformers and peft take before any model."""


def profile(
    *, rank: int, fingerprint: str = "", training_rows: int = 0, evaluation_rows: int = 0, run_name: str = ""
) -> types_pb2.CapabilityProfile:
    """The device's profile; roles follow from the data that it has."""
    roles = []
    if training_rows:
        roles.append(types_pb2.ROLE_TRAIN)
    if evaluation_rows:
        roles.append(types_pb2.ROLE_EVALUATE)
    return types_pb2.CapabilityProfile(
        software_version=_version(),
        platform=f"{platform.system()} {platform.machine()} Python {platform.python_version()}",
        cpu_count=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_bytes=total_memory(),
        accelerators=accelerators(),
        max_rank=rank,
        roles=roles,
        base_model_fingerprint=fingerprint,
        training_rows=training_rows,
        evaluation_rows=evaluation_rows,
        run_name=run_name,
    )


def total_memory() -> int:
    """Bytes of main memory; 0 where nobody can tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return 0


def free_memory() -> int:
    """Bytes of main memory that a new process could take; 0 where nobody can tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 0)


def accelerators() -> list[str]:
    """Names of NVIDIA devices that the kernel driver knows."""
    names = []
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key == "Model":
                names.append(value.strip())
    return names


def advise_rank(model: Path) -> int:
    """The largest power of two, from 1 to 64, whose training fits the memory that is free now.

    With w bytes of weight files, kept as float32 at w' ≤ 2w, an adapter of rank r costs about 16 r (d + n) bytes per
    module (factor, gradient, two Adam moments, float32). For the usual targets (all linear modules of width d with
    12 d² weights a layer) that is r/(2d) of the weights' own size; d is `hidden_size` of config.json. Activations are
    taken as another half of the weights. So:  free ≥ 600 MiB + 2w · (1.5 + 4 r / (2 d)).
    """
    weights = sum(path.stat().st_size for path in model.glob("*.safetensors")) or sum(
        path.stat().st_size for path in model.glob("*.bin")
    )
    width = _hidden_size(model)
    room = free_memory() - _PROCESS_BYTES - 3.0 * weights
    if room <= 0:
        return 1
    rank = 1
    while rank < MAX_AUTO_RANK and 2.0 * weights * 4.0 * (2 * rank) / (2.0 * width) <= room:
        rank *= 2
    return rank


def _hidden_size(model: Path) -> int:
    try:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 1024
    width = config.get("hidden_size") or config.get("n_embd") or config.get("d_model") or 1024
    return int(width) if isinstance(width, int) and width > 0 else 1024


def _version() -> str:
    try:
        return metadata.version("glora")
    except metadata.PackageNotFoundError:
        return "unknown"
