"""Records of a federation that never was: every number is drawn from a seed, so that pages look alike each time."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np

from glora_server.coordinator.history import module_figures
from glora_server.coordinator.model import (
    Device,
    DeviceState,
    Measurement,
    MetricPhase,
    Profile,
    StatePart,
    TensorData,
    TensorKind,
)
from glora_server.coordinator.run_spec import RunSpec
from glora_server.coordinator.views_history import Contribution, ModuleFigures
from glora_server.rounds.assignment import Assignment, AssignmentKind, AssignmentPhase
from glora_server.rounds.ids import AssignmentId, DeviceId, RoundId, RunId, VersionId
from glora_wire.errors import Reason
from glora_wire.manifest import Manifest, ModuleShape

LAYERS = 12
SIZE = 64
MAX_RANK = 16
RANKS = (1, 2, 4, 8, 16)
LABELS = ("world", "sports", "business", "science")
FINGERPRINT = "5e" * 32
_KINDS = (
    ("pi", "Linux-6.6-aarch64", 4, 8 * 2**30, (), 8),
    ("jetson", "Linux-5.15-tegra-aarch64", 8, 16 * 2**30, ("Orin",), 16),
    ("laptop", "macOS-15-arm64", 10, 32 * 2**30, ("Apple M3",), 16),
    ("phone", "Linux-5.10-android-aarch64", 8, 6 * 2**30, (), 4),
)
_SITES = ("berlin", "lisbon", "osaka", "quito")
_REJECTIONS = (
    (Reason.NORM_TOO_LARGE, "The update's norm is 41.7; this run allows 25 at most."),
    (Reason.NON_FINITE, "layer.3.value holds NaN in lora_B; the training diverged: lower the learning rate."),
)


def manifest() -> Manifest:
    """Query and value of twelve layers."""
    modules = tuple(
        ModuleShape(f"encoder.layer.{layer}.attention.self.{part}", SIZE, SIZE)
        for layer in range(LAYERS)
        for part in ("query", "value")
    )
    return Manifest(
        task="sequence_classification",
        base_model_name="bert-base-uncased",
        base_model_fingerprint=FINGERPRINT,
        weight_files={},
        tokenizer_fingerprint="",
        labels=LABELS,
        modules=modules,
        dense=(),
        target_modules=("query", "value"),
    )


def spec(name: str, rounds: int, *, quorum: int = 3) -> RunSpec:
    """A run of so many rounds."""
    document = {
        "name": name,
        "model": {"path": "bert-base-uncased", "labels": LABELS},
        "lora": {"max_rank": MAX_RANK},
        "policy": {"rounds": rounds, "quorum": quorum, "deadline_seconds": 86400.0, "gather_seconds": 3600.0},
    }
    return RunSpec.from_json(json.dumps(document))


def device(place: int, *, at: float) -> Device:
    """Device number `place`: one in fifty waits for approval, one in eighty is suspended."""
    draw = random.Random(f"device {place}")
    kind, platform, cpus, memory, accelerators, rank = _KINDS[place % len(_KINDS)]
    state = DeviceState.APPROVED
    if place % 50 == 49:
        state = DeviceState.PENDING
    elif place % 80 == 79:
        state = DeviceState.SUSPENDED
    rows = draw.randint(80, 2400)
    return Device(
        id=DeviceId(f"dsyn{place:07d}"),
        name=f"{kind}-{place:04d}",
        state=state,
        declared_rank=rank,
        granted_rank=rank,
        tags=(_SITES[place // 4 % len(_SITES)], "gpu" if accelerators else "cpu"),
        token_id=None,
        key_sha256=f"{place:064x}",
        certificate_pem="-----BEGIN CERTIFICATE-----\n" + "A" * 1400 + "\n-----END CERTIFICATE-----\n",
        certificate_serial=f"{place:x}",
        certificate_expires_at=at + (5 if place % 97 == 0 else 200) * 86400,
        created_at=at - 90 * 86400 + place,
        last_seen_at=None if state is DeviceState.PENDING else at - draw.expovariate(1 / 5000),
        profile=Profile(
            software_version="0.1.0",
            platform=platform,
            cpu_count=cpus,
            memory_bytes=memory,
            accelerators=accelerators,
            max_rank=rank,
            trains=True,
            evaluates=place % 10 == 0,
            fingerprint=FINGERPRINT,
            task="sequence_classification",
            training_rows=rows,
            evaluation_rows=rows // 5,
        ),
    )


def ended_assignment(
    device_: Device, *, run_id: RunId, round_id: RoundId, version_id: VersionId, number: int, place: int, at: float
) -> Assignment:
    """What a device did in a round that is over."""
    draw = random.Random(place * 7919 + number)
    accepted = at + draw.uniform(0.2, 2.0)
    delivered = accepted + draw.uniform(1.0, 8.0)
    uploading = delivered + draw.gammavariate(9.0, 7.0)
    received = uploading + draw.uniform(1.0, 12.0)
    whole = Assignment(
        id=AssignmentId(f"{round_id}{place:05d}"),
        run_id=run_id,
        round_id=round_id,
        device_id=device_.id,
        kind=AssignmentKind.TRAIN,
        rank=device_.granted_rank,
        version_id=version_id,
        phase=AssignmentPhase.ACCEPTED_UPDATE,
        offered_at=at,
        accepted_at=accepted,
        delivered_at=delivered,
        upload_started_at=uploading,
        received_at=received,
        closed_at=received + draw.uniform(0.05, 0.4),
        deadline_at=at + 600.0,
        training_rows=device_.profile.training_rows,
        bytes_down=device_.granted_rank * 2 * LAYERS * 2 * SIZE * 4,
        bytes_up=device_.granted_rank * 2 * LAYERS * 2 * SIZE * 4,
    )
    luck = draw.random()
    if luck < 0.02:
        reason, message = _REJECTIONS[place % 2]
        return replace(whole, phase=AssignmentPhase.REJECTED, reason=reason, message=message)
    if luck < 0.05:
        return replace(
            whole,
            phase=AssignmentPhase.EXPIRED,
            reason=Reason.DEADLINE_PASSED,
            message="The deadline of the round passed.",
            upload_started_at=None,
            received_at=None,
            closed_at=at + 600.0,
            bytes_up=0,
        )
    if luck < 0.06:
        return replace(
            whole,
            phase=AssignmentPhase.FAILED,
            reason=Reason.OUT_OF_MEMORY,
            message="The device ran out of memory at batch size 16; lower training.batch_size.",
            upload_started_at=None,
            received_at=None,
            closed_at=delivered + 5.0,
            bytes_up=0,
        )
    return whole


def contribution(assignment: Assignment, version_id: VersionId, number: int, share: float) -> Contribution:
    """How far the device agreed: devices whose number ends with 13 look away from the consensus."""
    draw = random.Random(f"{assignment.id} agrees")
    away = assignment.device_id.endswith("13")
    capture = draw.gauss(0.55 if away else 0.93, 0.02)
    return Contribution(
        version_id=version_id,
        run_id=assignment.run_id,
        number=number,
        device_id=assignment.device_id,
        at=assignment.closed_at or assignment.offered_at,
        share=share,
        rows=assignment.training_rows,
        update_norm=draw.gammavariate(20.0, 0.05),
        capture=min(1.0, capture),
        cosine=min(1.0, draw.gauss(0.12 if away else 0.61, 0.04)),
        deviation=None,
        outlier=False,
    )


def figures(number: int) -> tuple[ModuleFigures, ...]:
    """Votes gather in fewer directions round by round; devices agree more and then, nearer to the end, less."""
    return tuple(
        module_figures(
            module.name,
            {
                "eigenvalues": [math.exp(-j * (0.15 + 0.5 * (1 - math.exp(-number / 150)) * (0.4 + place / 24)))
                                for j in range(MAX_RANK)],
                "captured_energy": 0.99 - 0.12 * math.exp(-number / 80) - 0.001 * (place % 5),
                "truncation_error": 0.1 + 0.25 * math.exp(-number / 80),
                "mean_norm": 0.4 + 1.6 * math.exp(-number / 200),
                "clients": [{"share": 1.0, "change_cosine": _agreement(number, place)}],
            },
        )
        for place, module in enumerate(manifest().modules)
    )  # fmt: skip


def _agreement(number: int, place: int) -> float:
    rise, fall = 1 - math.exp(-(number + 2) / 12), math.exp(-number / 140)
    return (0.3 + 0.45 * rise * fall) * (0.72 + 0.28 * math.sin(0.35 * place + number / 40) ** 2)


def summary(number: int) -> dict[str, float]:
    """Means over the modules, as `summarise` gives them."""
    return {
        "captured_energy": 0.985 - 0.12 * math.exp(-number / 80),
        "truncation_error": 0.1 + 0.25 * math.exp(-number / 80),
        "mean_norm": 0.4 + 1.6 * math.exp(-number / 200),
        "eigengap": 0.02 + 0.1 * (1 - math.exp(-number / 100)),
    }


def diagnostics(number: int, module: str, made: Sequence[Contribution]) -> str:
    """What aggregation would have told of one module."""
    clients = [
        {
            "device_id": item.device_id,
            "rank": 8,
            "share": item.share,
            "votes": 8,
            "update_norm": item.update_norm,
            "change_norm": item.update_norm,
            "cosine": item.cosine,
            "change_cosine": item.cosine,
            "capture": item.capture,
        }
        for item in made
    ]
    sigma = [round(2.0 * math.exp(-0.2 * j), 4) for j in range(MAX_RANK)]
    return json.dumps(summary(number) | {"eigenvalues": sigma, "sigma": sigma, "module": module, "clients": clients})


def measurements(
    assignment: Assignment, *, version_number: int, ranks: Sequence[int], phase: MetricPhase, at: float
) -> list[Measurement]:
    """The model gets better with every round and rank, and not equally well everywhere."""
    draw = random.Random(f"{assignment.device_id} measures {version_number}")
    own = draw.gauss(0.0, 0.03)
    found = []
    for rank in ranks:
        learned = (1 - math.exp(-version_number / 60)) * (0.55 + 0.07 * math.log2(rank))
        accuracy = min(0.995, max(0.02, 0.25 + 0.72 * learned / 0.83 + own))
        found.append(
            Measurement(
                assignment_id=assignment.id,
                run_id=assignment.run_id,
                device_id=assignment.device_id,
                version_id=assignment.version_id,
                version_number=version_number,
                phase=phase,
                rank=rank,
                loss=max(0.02, 1.45 * (1 - accuracy) + draw.gauss(0.0, 0.02)),
                accuracy=accuracy,
                rows=max(1, assignment.training_rows // 5),
                seconds=draw.uniform(1.0, 6.0),
                measured_at=at,
            )
        )
    return found


@cache
def parts() -> tuple[StatePart, ...]:
    """A state that can be exported: orthonormal u and a, falling sigma."""
    draw = np.random.default_rng(5)
    return tuple(
        StatePart(name=module.name, kind=TensorKind.MODULE, tensors=_tensors(draw)) for module in manifest().modules
    )


def _tensors(draw: np.random.Generator) -> dict[str, TensorData]:
    u = np.linalg.qr(draw.standard_normal((SIZE, MAX_RANK)))[0].astype("<f4")
    a = np.linalg.qr(draw.standard_normal((SIZE, MAX_RANK)))[0].T.astype("<f4")
    sigma = np.exp(-0.2 * np.arange(MAX_RANK)).astype("<f4")
    return {
        name: TensorData(dtype="float32", shape=array.shape, data=np.ascontiguousarray(array).tobytes())
        for name, array in (("u", u), ("a", a), ("sigma", sigma))
    }
