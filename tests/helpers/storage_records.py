"""Records for tests of the store: every maker gives a valid record, and what a test is about is passed by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar, TypeVarTuple

from glora_server.coordinator.model import (
    Device,
    DeviceState,
    Measurement,
    MetricPhase,
    Profile,
    Readout,
    Run,
    StatePart,
    TensorData,
    TensorKind,
    TokenRecord,
    Upload,
    Version,
)
from glora_server.coordinator.ports import UnitOfWork
from glora_server.rounds.assignment import Assignment, AssignmentKind
from glora_server.rounds.ids import AssignmentId, DeviceId, RoundId, RunId, TokenId, VersionId
from glora_server.rounds.policy import RoundPolicy, Sampling, TooFew
from glora_server.rounds.round import Round
from glora_server.rounds.run import RunPhase
from glora_wire.digests import Digest, digest_bytes
from glora_wire.manifest import DenseTensor, Manifest, ModuleShape, ZerosInit

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

NOW = 1_800_000_000.25


def token(name: str = "t", **changes: Any) -> TokenRecord:
    plain = TokenRecord(
        id=TokenId(name),
        secret_sha256="00" * 32,
        description="for the lab",
        created_at=NOW,
        expires_at=NOW + 60,
        max_uses=3,
        max_rank=16,
        tags=("lab", "größe"),
    )
    return replace(plain, **changes)


def device(name: str = "pi", **changes: Any) -> Device:
    plain = Device(
        id=DeviceId(f"id-{name}"),
        name=name,
        state=DeviceState.APPROVED,
        declared_rank=16,
        granted_rank=8,
        tags=("lab",),
        token_id=None,
        key_sha256=f"key-{name}",
        certificate_pem="-----BEGIN CERTIFICATE-----",
        certificate_serial="1f",
        certificate_expires_at=NOW + 1e6,
        created_at=NOW,
        profile=Profile(platform="linux", accelerators=("H200", "CPU"), max_rank=16, training_rows=120),
    )
    return replace(plain, **changes)


def manifest() -> Manifest:
    return Manifest(
        task="sequence_classification",
        base_model_name="tiny",
        base_model_fingerprint="ab" * 32,
        weight_files={},
        tokenizer_fingerprint="",
        labels=("no", "yes"),
        modules=(ModuleShape("encoder.layer.0.query", 4, 6),),
        dense=(DenseTensor("classifier.weight", (2, 4), ZerosInit()),),
        target_modules=("query",),
    )


def run(name: str = "first", **changes: Any) -> Run:
    plain = Run(
        id=RunId(f"id-{name}"),
        name=name,
        phase=RunPhase.ACTIVE,
        spec_json='{"name": "first"}',
        manifest=manifest(),
        version_id=None,
        created_at=NOW,
    )
    return replace(plain, **changes)


def version(number: int = 0, **changes: Any) -> Version:
    plain = Version(
        id=VersionId(f"v{number}"),
        run_id=RunId("id-first"),
        number=number,
        round_id=None,
        parent_id=None,
        strategy="glora",
        published=False,
        created_at=NOW + number,
    )
    return replace(plain, **changes)


def part(name: str = "encoder.layer.0.query", size: int = 4) -> StatePart:
    tensors = {
        "u": TensorData(
            dtype="float32", shape=(size, 1), data=bytes(range(256)) * (size * 4 // 256) or b"\x00\xff" * 8
        ),
        "a": TensorData(dtype="float64", shape=(0, 6), data=b""),
    }
    return StatePart(name=name, kind=TensorKind.MODULE, tensors=tensors)


def round_(number: int = 1, **changes: Any) -> Round:
    plain = Round(
        id=RoundId(f"r{number}"),
        run_id=RunId("id-first"),
        number=number,
        version_id=VersionId("v0"),
        policy=RoundPolicy(rounds=7, too_few=TooFew.WAIT, sampling=Sampling.RANK, tags=("lab",), over_selection=0.5),
        created_at=NOW + number,
    )
    return replace(plain, **changes)


def assignment(name: str = "a1", **changes: Any) -> Assignment:
    plain = Assignment(
        id=AssignmentId(name),
        run_id=RunId("id-first"),
        round_id=RoundId("r1"),
        device_id=DeviceId("id-pi"),
        kind=AssignmentKind.TRAIN,
        rank=8,
        version_id=VersionId("v0"),
        offered_at=NOW,
        deadline_at=NOW + 3600,
    )
    return replace(plain, **changes)


def evaluation(name: str = "e1", **changes: Any) -> Assignment:
    plain = assignment(name, round_id=None, kind=AssignmentKind.EVALUATE, ranks=(1, 2, 8))
    return replace(plain, **changes)


def digest(text: str) -> Digest:
    return digest_bytes(text.encode())


def upload(name: str = "a1", **changes: Any) -> Upload:
    plain = Upload(
        assignment_id=AssignmentId(name),
        round_id=RoundId("r1"),
        device_id=DeviceId("id-pi"),
        version_id=VersionId("v0"),
        digest=digest(name),
        adapter_config_json="{}",
        training_rows=120,
        completed_steps=50,
        stopped_early=False,
        training_loss=0.25,
        training_seconds=12.5,
        received_at=NOW,
    )
    return replace(plain, **changes)


def readout(version_id: str = "v0", rank: int = 4, **changes: Any) -> Readout:
    plain = Readout(
        version_id=VersionId(version_id),
        rank=rank,
        dtype="float32",
        digest=digest(f"{version_id}-{rank}"),
        created_at=NOW,
    )
    return replace(plain, **changes)


def measurement(name: str = "a1", **changes: Any) -> Measurement:
    plain = Measurement(
        assignment_id=AssignmentId(name),
        run_id=RunId("id-first"),
        device_id=DeviceId("id-pi"),
        version_id=VersionId("v0"),
        version_number=0,
        phase=MetricPhase.BEFORE,
        rank=8,
        loss=0.5,
        accuracy=0.75,
        rows=40,
        seconds=1.5,
        measured_at=NOW,
    )
    return replace(plain, **changes)


def stage(uow: UnitOfWork) -> None:
    """What rounds refer to: two devices, a run, its version 0."""
    uow.devices.add(device("pi"))
    uow.devices.add(device("nano"))
    uow.runs.add(run())
    uow.versions.add(version())
    uow.versions.publish(VersionId("v0"), "{}")


def stage_round(uow: UnitOfWork) -> None:
    """The same, and round 1 with assignment a1."""
    stage(uow)
    uow.rounds.add(round_(assignments=(assignment(),)))


def bound(work: Callable[[UnitOfWork, *Ts], T], *arguments: *Ts) -> Callable[[UnitOfWork], T]:
    """The work with its arguments, for loops (a plain closure would see the last values of the loop)."""
    return lambda uow: work(uow, *arguments)


def together(*works: Callable[[UnitOfWork], object]) -> Callable[[UnitOfWork], None]:
    """All of the works in one transaction, in their order."""

    def work(uow: UnitOfWork) -> None:
        for one in works:
            one(uow)

    return work
