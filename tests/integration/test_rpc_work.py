"""Long polls: WaitForWork as coordinator.proto says."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import grpc
import grpc.aio
import pytest
from rpc_world import SETTINGS, World, eventually, refused, running_world

from glora.v1 import coordinator_pb2, coordinator_pb2_grpc, types_pb2
from glora_server.coordinator.messages import (
    AdapterOffer,
    NoticeRecord,
    WorkAnswer,
    WorkOffer,
)
from glora_server.coordinator.model import DeviceState, Profile, Run, Version
from glora_server.coordinator.ports import StrategyInfo
from glora_server.coordinator.run_spec import RunSpec
from glora_server.rounds.assignment import Assignment, AssignmentKind
from glora_server.rounds.ids import AssignmentId, DeviceId, RoundId, RunId, VersionId
from glora_server.rounds.run import RunPhase
from glora_wire.errors import Reason
from glora_wire.manifest import Manifest, ModuleShape, fingerprint_of

SPEC = RunSpec.from_json(
    '{"name": "trec", "model": {"path": "m"}, "lora": {"max_rank": 16, "scale": 2.5, "dropout": 0.1},'
    '"training": {"steps": 7, "learning_rate": 0.003, "extra": {"note": "hi"}},'
    '"wire": {"dtype": "bfloat16", "hash": "sha256"}, "evaluation": {"before": false}}'
)
WEIGHTS = {"model.safetensors": "cd" * 32}
MANIFEST = Manifest(
    task="sequence_classification",
    base_model_name="m",
    base_model_fingerprint=fingerprint_of(WEIGHTS),
    weight_files=WEIGHTS,
    tokenizer_fingerprint="ef" * 32,
    labels=("yes", "no"),
    modules=(ModuleShape("layer.0.query", 8, 8),),
    dense=(),
    target_modules=("query",),
)


def work_offer(kind: AssignmentKind = AssignmentKind.TRAIN) -> WorkOffer:
    run_id, version_id = RunId("r1"), VersionId("v1")
    return WorkOffer(
        assignment=Assignment(
            id=AssignmentId("a1"),
            run_id=run_id,
            round_id=RoundId("o1"),
            device_id=DeviceId("d1"),
            kind=kind,
            rank=4,
            version_id=version_id,
            offered_at=1.0,
            deadline_at=2.0,
        ),
        run=Run(
            id=run_id,
            name="trec",
            phase=RunPhase.ACTIVE,
            spec_json=SPEC.to_json(),
            manifest=MANIFEST,
            version_id=version_id,
            created_at=0.0,
        ),
        spec=SPEC,
        round_number=3,
        version=Version(
            id=version_id,
            run_id=run_id,
            number=2,
            round_id=None,
            parent_id=None,
            strategy="glora",
            published=True,
            created_at=0.0,
        ),
        adapters=(AdapterOffer(key="train", use="train", rank=4), AdapterOffer(key="tail", use="frozen", rank=16)),
        strategy=StrategyInfo(
            name="glora", summary="", train_mask="both", init="readout", upload_set="a", mixed_ranks=True
        ),
        max_upload_bytes=12345,
        seed=2**63,
        deadline_at=1700000000.25,
    )


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with running_world(tmp_path / "authority") as running:
        yield running


@pytest.fixture
async def stub(world: World) -> AsyncIterator[coordinator_pb2_grpc.CoordinatorServiceAsyncStub]:
    async with world.channel() as channel:
        yield coordinator_pb2_grpc.CoordinatorServiceStub(channel)


async def test_offer_arrives_with_everything_that_the_device_needs(
    world: World, stub: coordinator_pb2_grpc.CoordinatorServiceAsyncStub
) -> None:
    notice = NoticeRecord(run_name="other", reason=Reason.TASK_MISMATCH, message="It wants causal_lm.")
    world.devices.answers.put_nowait(WorkAnswer(offer=work_offer(), notices=(notice,)))
    answer = await stub.WaitForWork(coordinator_pb2.WaitForWorkRequest(), timeout=60)
    assert [(n.run_name, n.reason) for n in answer.notices] == [("other", "TASK_MISMATCH")]
    got = answer.assignment
    assert (got.name, got.run, got.run_name, got.version) == ("assignments/a1", "runs/r1", "trec", "versions/v1")
    assert (got.round_number, got.version_number, got.kind) == (3, 2, types_pb2.ASSIGNMENT_KIND_TRAIN)
    assert [(a.key, a.use, a.rank) for a in got.adapters] == [
        ("train", types_pb2.ADAPTER_USE_TRAIN, 4),
        ("tail", types_pb2.ADAPTER_USE_FROZEN, 16),
    ]
    assert Manifest.from_json(got.manifest_json) == MANIFEST
    assert got.deadline.ToNanoseconds() == 1_700_000_000_250_000_000
    assert abs(got.sent_at.ToNanoseconds() / 1e9 - time.time()) < 60
    assert (got.max_upload_bytes, got.max_chunk_bytes) == (12345, 1024 * 1024)
    assert got.hash_algorithm == types_pb2.HASH_ALGORITHM_SHA256
    plan = got.plan
    assert (plan.task, plan.rank, plan.scale, plan.lora_dropout) == ("sequence_classification", 4, 2.5, 0.1)
    assert (plan.steps, plan.batch_size, plan.learning_rate, plan.seed) == (7, 16, 0.003, 2**63)
    assert (plan.optimizer, plan.schedule, dict(plan.extra)) == ("adamw", "constant", {"note": "hi"})
    assert plan.wire_dtype == types_pb2.TENSOR_DTYPE_BFLOAT16
    assert plan.train_mask == types_pb2.TRAIN_MASK_BOTH
    assert plan.init == types_pb2.INIT_SOURCE_READOUT
    assert plan.upload_set == types_pb2.UPLOAD_SET_A
    assert plan.reset_optimizer
    assert plan.allow_early_stop
    assert not plan.evaluate_before
    assert plan.evaluate_after


async def test_every_field_of_the_plan_is_set_from_the_run(
    world: World, stub: coordinator_pb2_grpc.CoordinatorServiceAsyncStub
) -> None:
    """A field that is added to the proto and forgotten here would reach devices as zero."""
    world.devices.answers.put_nowait(WorkAnswer(offer=work_offer()))
    answer = await stub.WaitForWork(coordinator_pb2.WaitForWorkRequest(), timeout=60)
    unset = {field.name for field in types_pb2.TrainingPlan.DESCRIPTOR.fields} - {
        field.name for field, _ in answer.assignment.plan.ListFields()
    }
    assert unset == {"weight_decay", "warmup_ratio", "mixed_precision", "evaluate_before"}, "all zero in this run"


async def test_nothing_comes_with_reasons_and_a_pause(
    world: World, stub: coordinator_pb2_grpc.CoordinatorServiceAsyncStub
) -> None:
    world.devices.answers.put_nowait(WorkAnswer(offer=None, retry_after=1.5))
    answer = await stub.WaitForWork(coordinator_pb2.WaitForWorkRequest(), timeout=60)
    assert answer.WhichOneof("outcome") == "nothing"
    assert answer.nothing.retry_after.ToMilliseconds() == 1500


async def test_profile_is_passed_on_and_cut_to_size(
    world: World, stub: coordinator_pb2_grpc.CoordinatorServiceAsyncStub
) -> None:
    profile = types_pb2.CapabilityProfile(
        software_version="1",
        platform="x" * 5000,
        cpu_count=2,
        memory_bytes=2**34,
        accelerators=["gpu"] * 50,
        max_rank=8,
        roles=[types_pb2.ROLE_EVALUATE],
        base_model_fingerprint="ab",
        task="causal_lm",
        training_rows=5,
        evaluation_rows=6,
        run_name="r",
    )
    world.devices.answers.put_nowait(WorkAnswer(offer=None))
    await stub.WaitForWork(coordinator_pb2.WaitForWorkRequest(profile=profile), timeout=60)
    [(_, device_id, got, timeout)] = world.devices.called("wait")
    assert device_id == "d1"
    assert got == Profile(
        software_version="1",
        platform="x" * 256,
        cpu_count=2,
        memory_bytes=2**34,
        accelerators=("gpu",) * 16,
        max_rank=8,
        trains=False,
        evaluates=True,
        fingerprint="ab",
        task="causal_lm",
        training_rows=5,
        evaluation_rows=6,
        run_name="r",
    )
    assert isinstance(timeout, float)
    assert SETTINGS.poll_min_seconds <= timeout <= SETTINGS.poll_max_seconds


async def test_poll_is_answered_before_the_deadline_of_the_caller(
    world: World, stub: coordinator_pb2_grpc.CoordinatorServiceAsyncStub
) -> None:
    world.devices.answers.put_nowait(WorkAnswer(offer=None))
    asked = time.monotonic()
    await stub.WaitForWork(coordinator_pb2.WaitForWorkRequest(), timeout=18)
    took = time.monotonic() - asked
    world.devices.answers.put_nowait(WorkAnswer(offer=None))
    await stub.WaitForWork(coordinator_pb2.WaitForWorkRequest())
    bounded, free = (call[3] for call in world.devices.called("wait"))
    assert isinstance(bounded, float)
    assert isinstance(free, float)
    assert 16.0 - took < bounded <= 17.0
    assert free >= SETTINGS.poll_min_seconds


async def test_device_that_is_revoked_while_it_waits_gets_no_work(
    world: World, stub: coordinator_pb2_grpc.CoordinatorServiceAsyncStub
) -> None:
    call = stub.WaitForWork(coordinator_pb2.WaitForWorkRequest(), timeout=60)
    await eventually(lambda: world.devices.polls == 1)
    world.devices.set_state("d1", DeviceState.REVOKED)
    world.devices.answers.put_nowait(WorkAnswer(offer=work_offer()))
    with refused(Reason.DEVICE_REVOKED, grpc.StatusCode.PERMISSION_DENIED):
        await call


async def test_poll_ends_when_the_device_goes_away(
    world: World, stub: coordinator_pb2_grpc.CoordinatorServiceAsyncStub
) -> None:
    call = stub.WaitForWork(coordinator_pb2.WaitForWorkRequest())
    await eventually(lambda: world.devices.polls == 1)
    call.cancel()
    await eventually(lambda: world.devices.lost_polls == 1)
    await eventually(lambda: world.observer.finished == [("WaitForWork", "CANCELLED")])


async def test_poll_ends_when_the_connection_breaks(world: World) -> None:
    channel = world.channel()
    waiting = asyncio.ensure_future(
        coordinator_pb2_grpc.CoordinatorServiceStub(channel).WaitForWork(coordinator_pb2.WaitForWorkRequest())
    )
    await eventually(lambda: world.devices.polls == 1)
    await channel.close()
    await eventually(lambda: world.devices.lost_polls == 1)
    with pytest.raises((grpc.aio.AioRpcError, asyncio.CancelledError)):
        await waiting


async def test_polls_end_at_once_when_the_server_stops(tmp_path: Path) -> None:
    settings = replace(SETTINGS, grace_seconds=600.0)
    async with running_world(tmp_path, settings) as world, world.channel() as channel:
        stub = coordinator_pb2_grpc.CoordinatorServiceStub(channel)
        call = stub.WaitForWork(coordinator_pb2.WaitForWorkRequest(), timeout=600)
        await eventually(lambda: world.devices.polls == 1)
        await asyncio.wait_for(world.servers.stop(), 60)
        with refused(Reason.SHUTTING_DOWN, grpc.StatusCode.UNAVAILABLE) as errors:
            await call
        assert errors[0].retry_after == 2.0
        assert world.devices.polls == 0
