"""Small adapters on disk and the jobs over them, for tests of the engines; every number from a seed."""

import time
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from glora_server.coordinator.model import StatePart
from glora_server.coordinator.ports import AggregateJob, CheckJob, InitialiseJob, RenderJob, StrategyChoice, UpdateRef
from glora_server.rounds.ids import DeviceId
from glora_wire.names import dense_key, lora_key
from glora_wire.payload import TensorDtype, TensorSpec, layout

GLORA = StrategyChoice(name="glora", options={})
SCALE = 2.0
SHAPES: Mapping[str, tuple[int, int]] = {"enc.0.query": (24, 16), "enc.0.value": (12, 20)}
"""Modules with (out, in) features."""
HEAD = "classifier.weight"
HEAD_SHAPE = (3, 24)
CPU = torch.device("cpu")


def specs(rank: int, dtype: TensorDtype = TensorDtype.FLOAT32) -> tuple[TensorSpec, ...]:
    """Tensors of an adapter of that rank."""
    found = []
    for module, (out, in_) in SHAPES.items():
        found.append(TensorSpec(lora_key(module, "A"), dtype, (rank, in_)))
        found.append(TensorSpec(lora_key(module, "B"), dtype, (out, rank)))
    return (*found, TensorSpec(dense_key(HEAD), dtype, HEAD_SHAPE))


def header_only(path: Path, rank: int, dtype: TensorDtype = TensorDtype.FLOAT32) -> Path:
    """A file of the final size with the header of an adapter, as the coordinator makes it for rendering."""
    plan = layout(specs(rank, dtype))
    path.write_bytes(plan.header.ljust(plan.total_bytes, b"\0"))
    return path


def initial(rank: int, strategy: StrategyChoice = GLORA) -> InitialiseJob:
    """Version 0 of the small model."""
    return InitialiseJob(
        strategy=strategy,
        modules=tuple((module, out, in_) for module, (out, in_) in SHAPES.items()),
        dense=((HEAD, HEAD_SHAPE, 0.02),),
        rank=rank,
        seed=7,
    )


def rendering(
    path: Path, parts: tuple[StatePart, ...], rank: int, *, version: int = 1, style: str = "balanced"
) -> RenderJob:
    """Render these parts into the file."""
    return RenderJob(
        path=path, strategy=GLORA, parts=parts, rank=rank, scale=SCALE, seed=7, version_number=version, style=style
    )


def trained(sent: Path, path: Path, seed: int, *, dtype: torch.dtype = torch.float32) -> Path:
    """What a device makes of the adapter that it was sent: every tensor moved a little."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        key: (value.float() + 0.1 * torch.randn(value.shape, generator=generator)).to(dtype)
        for key, value in load_file(sent).items()
    }
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def update_of(
    path: Path, sent: Path | None, weight: float, *, scale: float = SCALE, digest: str | None = None
) -> UpdateRef:
    """An accepted update; the device is named like the file."""
    return UpdateRef(
        device_id=DeviceId(path.stem),
        path=path,
        scales=dict.fromkeys(SHAPES, scale),
        weight=weight,
        sent_path=sent,
        sent_scale=SCALE,
        digest=digest,
    )


def check_of(update: UpdateRef, rank: int, *, max_norm: float = 0.0) -> CheckJob:
    """The judgement of that update."""
    return CheckJob(
        path=update.path, scales=update.scales, expected=specs(rank), max_norm=max_norm, digest=update.digest
    )


def folding(
    parts: tuple[StatePart, ...], updates: tuple[UpdateRef, ...], *, rank: int = 8, strategy: StrategyChoice = GLORA
) -> AggregateJob:
    """Fold these updates into these parts."""
    return AggregateJob(strategy=strategy, parts=parts, updates=updates, rank=rank, round_index=1, wire_dtype="float32")


def factors(path: Path, module: str) -> tuple[Tensor, Tensor]:
    """(B, A) of a module, read by safetensors itself."""
    tensors = load_file(path)
    return tensors[lora_key(module, "B")], tensors[lora_key(module, "A")]


def until_gone(pid: int) -> None:
    """Return once the process has ended, a minute at most."""
    deadline = time.monotonic() + 60
    while _lives(Path(f"/proc/{pid}")):
        assert time.monotonic() < deadline, f"process {pid} still runs"
        time.sleep(0.01)


def _lives(process: Path) -> bool:
    """Whether any thread is left: the first one is a zombie already while the others still end."""
    try:
        return " Z " not in (process / "stat").read_text() or len(list((process / "task").iterdir())) > 1
    except (FileNotFoundError, ProcessLookupError):
        return False
