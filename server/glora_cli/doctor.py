"""What `glora doctor` looks at on any machine: packages, clock, GPU, base model."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from glora_wire.errors import GloraError
from glora_wire.model_files import model_files

OLDEST_PYTHON: Final = (3, 11)
RELEASED: Final = 1_763_000_000.0
"""A clock before this version was made is wrong (Unix seconds)."""
_REQUIREMENT: Final = re.compile(
    r"""^(?P<name>[A-Za-z0-9._-]+)(\[[^]]*\])?(?P<range>[^;]*)(;.*extra == ['"](?P<extra>[^'"]+)['"])?"""
)
_BOUND: Final = re.compile(r"(>=|<|==)\s*([0-9][0-9a-zA-Z.]*)")


class Level(StrEnum):
    """How bad it is."""

    OK = "ok"
    NOTE = "note"
    """Worth knowing, nothing to do on most machines."""
    BROKEN = "broken"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that was looked at; `advice` says what to do when it is not right."""

    name: str
    level: Level
    message: str
    advice: str = ""


def ok(name: str, message: str) -> Check:
    """It is right."""
    return Check(name=name, level=Level.OK, message=message)


def note(name: str, message: str, advice: str = "") -> Check:
    """It is worth knowing."""
    return Check(name=name, level=Level.NOTE, message=message, advice=advice)


def broken(name: str, message: str, advice: str) -> Check:
    """It must be mended."""
    return Check(name=name, level=Level.BROKEN, message=message, advice=advice)


def check_python() -> Check:
    """Whether this Python is new enough."""
    found = platform.python_version()
    if sys.version_info < OLDEST_PYTHON:
        return broken("python", f"{found} is too old", "install Python 3.11 or newer and make a new environment")
    return ok("python", found)


def check_clock(now: float | None = None) -> Check:
    """Whether the clock can be right; certificates and tokens depend on it."""
    moment = time.time() if now is None else now
    text = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(moment))
    if moment < RELEASED:
        return broken("clock", f"it says {text}, which is in the past", "set the clock (timedatectl set-ntp true)")
    return ok("clock", text)


def check_packages(extra: str, requirements: Iterable[str] | None = None) -> Iterator[Check]:
    """One check for an extra of glora: whether every package it needs is there in a fitting version."""
    wanted = importlib.metadata.requires("glora") or [] if requirements is None else requirements
    missing, wrong, fitting = [], [], 0
    for text in wanted:
        found = _REQUIREMENT.match(text)
        if found is None or (found["extra"] or "") != extra:
            continue
        name, bounds = found["name"], found["range"]
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
            continue
        if fits(version, bounds):
            fitting += 1
        else:
            wrong.append(f"{name} {version} (wanted {bounds.strip()})")
    label = f"packages for {extra or 'glora'}"
    target = f"glora[{extra}]" if extra else "glora"
    if wrong:
        yield broken(label, f"of another version: {', '.join(wrong)}", f"pip install -U '{target}'")
    if missing:
        sentence = f"not installed: {', '.join(missing)}"
        yield note(label, sentence, f"where they are needed: pip install '{target}'")
    if not wrong and not missing:
        yield ok(label, f"{fitting} packages, all fitting")


def fits(version: str, bounds: str) -> bool:
    """Whether a version lies within bounds such as ">=2.4,<3"."""
    have = _numbers(version)
    for sign, bound in _BOUND.findall(bounds):
        limit = _numbers(bound)
        right = {">=": have >= limit, "<": have < limit, "==": have == limit}[sign]
        if not right:
            return False
    return True


def check_gpu(wanted: str = "auto") -> Check:
    """What numerics and training would run on; `wanted` is worker.device."""
    try:
        import torch
    except ImportError:
        return note("gpu", "torch is not installed, so nothing can be computed here", "pip install 'glora[server]'")
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return ok("gpu", f"torch {torch.__version__} sees {', '.join(names)}")
    if wanted.startswith("cuda"):
        advice = 'set worker.device = "auto" or "cpu", or install the driver and a CUDA build of torch'
        return broken("gpu", f"worker.device is {wanted}, but torch {torch.__version__} sees no CUDA device", advice)
    return note("gpu", f"torch {torch.__version__} sees no CUDA device; everything runs on the CPU")


def check_model(model: str) -> Check:
    """Whether the base model can be read on this machine."""
    folder = Path(model).expanduser()
    advice = "give the folder that holds config.json and the *.safetensors files"
    if not folder.is_dir():
        return broken("base model", f"there is no folder {folder}", f"{advice}, or download the model first")
    if not (folder / "config.json").is_file():
        return broken("base model", f"{folder} has no config.json", advice)
    try:
        files = model_files(folder)
    except GloraError as error:
        return broken("base model", error.message, "download the model again")
    if not files:
        return broken("base model", f"{folder} has no weight files", advice)
    total = sum(path.stat().st_size for path in files)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json")):
        return broken("base model", f"{folder} has no tokenizer", "download the tokenizer's files too")
    return ok("base model", f"{folder}: {len(files)} weight files, {total / 2**20:.0f} MiB")


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, trailing zeros dropped: 2.13.0+cpu is (2, 13)."""
    found = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(part) for part in found[0].split(".")] if found else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
