"""Many devices written by hand that take part in a run for as long as it lasts: real rpc, no training.

What they send is what they were given, moved a little, so that a server and a handful of threads make a federation
that goes on in the background of a test. Each can be told to misbehave.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Final

import grpc
import numpy as np
import safetensors.numpy
from hand_device import HandDevice, Tensors, packed

from glora.v1 import coordinator_pb2, types_pb2
from glora_wire.errors import GloraError
from glora_wire.manifest import Manifest, ModuleShape

STEPS: Final = 20
_SECONDS: Final = 30.0
Phase = types_pb2.EvaluationPhase


class Manner(StrEnum):
    """How a device behaves."""

    HONEST = "honest"
    DECLINES = "declines"
    DIVERGES = "diverges"
    """Its updates hold numbers that are not finite."""
    HANGS = "hangs"
    """It takes the work and is never heard of again until the round is over."""


def fleet_manifest(layers: int = 4, width: int = 48) -> Manifest:
    """The manifest of an encoder that nobody has to load."""
    names = [f"bert.encoder.layer.{i}.attention.self" for i in range(layers)]
    modules = tuple(ModuleShape(f"{name}.{part}", width, width) for name in names for part in ("query", "value"))
    return Manifest(
        task="sequence_classification",
        base_model_name="tiny-encoder",
        base_model_fingerprint="ab" * 32,
        weight_files={},
        tokenizer_fingerprint="",
        labels=("negative", "positive"),
        modules=modules,
        dense=(),
        target_modules=("query", "value"),
    )


@dataclass(eq=False)
class FleetDevice:
    """One device at work in a thread of its own."""

    hand: HandDevice
    manner: Manner
    seconds: float
    """How long it trains."""
    stop: threading.Event
    problems: list[str] = field(default_factory=list)
    done: int = 0

    def work(self) -> None:
        """Ask, train, send, until told to stop; what goes wrong on the way is part of a server's life."""
        while not self.stop.is_set():
            try:
                answer = self.hand.ask().result()
                if answer.HasField("assignment"):
                    self._take(answer.assignment)
                elif not self.stop.is_set():
                    self.stop.wait(0.2)
            except (grpc.RpcError, GloraError) as error:
                self.problems.append(str(error))
                self.stop.wait(0.5)
            except ValueError:
                # What grpc says when it is asked over a channel that was closed.
                if not self.stop.is_set():
                    raise

    def _take(self, assignment: types_pb2.Assignment) -> None:
        if self.manner is Manner.DECLINES:
            refusal = coordinator_pb2.Refusal(reason="OUT_OF_MEMORY", message="3.1 GB are free and 3.8 GB are needed.")
            self._report(assignment, declined=refusal)
            self.stop.wait(1.0)
            return
        self.hand.accept(assignment)
        payload, config = self.hand.pull(assignment)
        if self.manner is Manner.HANGS:
            while not self.stop.wait(0.3) and not self._report(assignment, progress=self._progress("training", 3)):
                pass
            return
        quality = self._measure(assignment, Phase.EVALUATION_PHASE_BEFORE)
        for step in range(1, STEPS + 1):
            if self.stop.wait(self.seconds / STEPS):
                return
            if self._report(assignment, progress=self._progress("training", step, 2.0 - quality - step / STEPS / 4)):
                return
        self.hand.push(assignment, self._update(payload), config, rows=100 + 20 * self.hand.rank)
        self.done += 1

    def _update(self, payload: bytes) -> bytes:
        generator = np.random.default_rng(abs(hash(self.hand.name)) % 2**32 + self.done)
        tensors: Tensors = {}
        for name, values in safetensors.numpy.load(payload).items():
            # A common direction with noise around it: devices agree, but not wholly.
            common = np.random.default_rng(7).standard_normal(values.shape)
            moved = values + 0.02 * common + 0.01 * generator.standard_normal(values.shape)
            tensors[name] = moved.astype(values.dtype)
        if self.manner is Manner.DIVERGES:
            tensors[next(iter(tensors))][0, 0] = float("nan")
        return packed(tensors)

    def _measure(self, assignment: types_pb2.Assignment, phase: Phase.ValueType) -> float:
        accuracy = 0.5 + 0.4 * (1 - math.exp(-assignment.version_number / 4)) - 0.05 / self.hand.rank
        found = types_pb2.Evaluation(
            phase=phase,
            rank=self.hand.rank,
            loss=1.6 - accuracy,
            accuracy=accuracy,
            rows=100,
            seconds=0.1,
        )
        request = coordinator_pb2.ReportMetricsRequest(assignment=assignment.name, evaluations=[found])
        self.hand.stub.ReportMetrics(request, timeout=_SECONDS)
        return accuracy

    def _progress(self, phase: str, done: int, loss: float = 1.0) -> coordinator_pb2.Progress:
        number = coordinator_pb2.DevicePhase.Value(f"DEVICE_PHASE_{phase.upper()}")
        return coordinator_pb2.Progress(phase=number, done=done, total=STEPS, loss=loss)

    def _report(self, assignment: types_pb2.Assignment, **report: object) -> bool:
        """Whether the work was cancelled."""
        request = coordinator_pb2.ReportProgressRequest(assignment=assignment.name, **report)  # type: ignore[arg-type]  # one of the reports
        return self.hand.stub.ReportProgress(request, timeout=_SECONDS).cancelled


@contextlib.contextmanager
def fleet(
    state_dirs: Mapping[str, Path],
    *,
    manners: Mapping[str, Manner] = {},
    seconds: float = 2.0,
    fingerprint: str = "ab" * 32,
) -> Iterator[Sequence[FleetDevice]]:
    """These joined devices at work while the context is open."""
    stop = threading.Event()
    devices = [
        FleetDevice(
            hand=HandDevice(folder, fingerprint),
            manner=manners.get(name, Manner.HONEST),
            seconds=seconds * (1 + 0.15 * place),
            stop=stop,
        )
        for place, (name, folder) in enumerate(state_dirs.items())
    ]
    threads = [threading.Thread(target=device.work, name=device.hand.name, daemon=True) for device in devices]
    for thread in threads:
        thread.start()
    try:
        yield devices
    finally:
        stop.set()
        for device in devices:
            device.hand.close()
        deadline = time.monotonic() + 10
        for thread in threads:
            thread.join(max(0.1, deadline - time.monotonic()))
