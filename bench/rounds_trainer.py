"""A device's training process without training: the product's own `glora_client.trainer`, its jobs replaced.

    LAUNCHER -m glora_client.trainer …          the agent starts it in the place of Python, see `rounds_glora.py`

What a device sends is at first the adapter that it was sent and small numbers, four fifths of them the same on every
device; later it is that again with a few numbers of each tensor changed, so that a job costs next to nothing. All that
surrounds a job is real: the job as a line of JSON, the events, the file of the update, which the agent hashes, sends.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Final

import numpy as np

from glora_client import trainer
from glora_client.protocol import Event, Finished, Job, Phase, Progressed, Trained
from glora_wire.tensors import TensorDtype

_TILE: Final = 1 << 16
_TOUCHED: Final = 256


class Nothing:
    """A control that nobody listens to: a job is over before it could be cancelled."""

    def cancel(self) -> None: ...

    def set_seconds_left(self, seconds: float | None) -> None: ...


class JobRunner:
    """Takes the place of `glora_client.jobs.JobRunner`, which would load torch and a base model."""

    def __init__(self, *, fit_name: str | None = None, quantization: str = "none") -> None:
        del fit_name, quantization
        self._draw = np.random.default_rng(os.getpid())

    def run(self, job: Job, emit: Callable[[Event], None], controls: trainer.Inbox) -> None:
        controls.begin(job.number, Nothing())
        emit(Progressed(phase=Phase.LOADING))
        begun = time.monotonic()
        self._write(job)
        seconds = time.monotonic() - begun
        emit(Progressed(phase=Phase.TRAINING, done=1, total=1, loss=1.0))
        emit(Trained(rows=100, steps=1, stopped_early=False, loss=1.0, seconds=seconds, rank=job.plan.rank))
        emit(Finished())

    def _write(self, job: Job) -> None:
        """Put the update where the agent looks for it, a second name of a file that stays."""
        assert job.out is not None
        kept = job.out.with_name("kept.safetensors")
        if not kept.exists():
            shutil.copyfile(job.adapters[0].path, kept)
            self._move_all(kept, job.plan.wire_dtype)
        self._touch(kept, job.plan.wire_dtype)
        job.out.unlink(missing_ok=True)
        job.out.hardlink_to(kept)

    def _move_all(self, path: Path, dtype: TensorDtype) -> None:
        common = np.random.default_rng(0).standard_normal(_TILE)
        noise = (0.008 * common + 0.002 * self._draw.standard_normal(_TILE)).astype(np.float32)
        values = _opened(path, dtype)
        for start in range(0, len(values), _TILE):
            part = values[start : start + _TILE]
            if dtype is TensorDtype.FLOAT32:
                part += noise[: len(part)]
            else:
                moved = (part.astype(np.uint32) << 16).view(np.float32) + noise[: len(part)]
                part[:] = moved.view(np.uint32) >> 16
        values.flush()

    def _touch(self, path: Path, dtype: TensorDtype) -> None:
        values = _opened(path, dtype)
        fresh = (0.01 * self._draw.standard_normal(_TOUCHED)).astype(np.float32)
        some = fresh if dtype is TensorDtype.FLOAT32 else (fresh.view(np.uint32) >> 16).astype(np.uint16)
        for start in range(0, len(values) - _TOUCHED, _TILE):
            values[start : start + _TOUCHED] = some
        values.flush()


def _opened(path: Path, dtype: TensorDtype) -> np.memmap:
    """The numbers of a safetensors file, to be changed in place; bfloat16 as whole numbers of 16 bits."""
    with path.open("rb") as file:
        offset = 8 + int.from_bytes(file.read(8), "little")
    return np.memmap(path, np.float32 if dtype is TensorDtype.FLOAT32 else np.uint16, "r+", offset)


def set_threads(threads: int) -> None:
    """Takes the place of `glora_client.jobs.set_threads`."""
    del threads


def launcher(folder: Path) -> Path:
    """An executable in `folder` that stands in for Python where the agent starts its training process."""
    path = folder / "python-without-training"
    path.write_text(f'#!/bin/sh\nexec {json.dumps(sys.executable)} -P {json.dumps(__file__)} "$@"\n', encoding="utf-8")
    path.chmod(0o700)
    return path


def main() -> int:
    stand_in = ModuleType("glora_client.jobs")
    stand_in.__dict__.update(JobRunner=JobRunner, set_threads=set_threads)
    sys.modules["glora_client.jobs"] = stand_in
    return trainer.main(sys.argv[3:])


if __name__ == "__main__":
    raise SystemExit(main())
