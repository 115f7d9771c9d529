"""Long polls, reports, health, reflection, starting and stopping of the gRPC edge."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import grpc
import grpc.aio
import pytest
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]  # no py.typed
from grpc_reflection.v1alpha import (  # type: ignore[import-untyped]  # no py.typed
    reflection_pb2,
    reflection_pb2_grpc,
)
from rpc_fakes import SETTINGS, World, eventually, new_key_and_request, refused, running_world

from glora.v1 import coordinator_pb2, coordinator_pb2_grpc, enrolment_pb2, enrolment_pb2_grpc, types_pb2
from glora_server.coordinator.messages import (
    AdapterOffer,
    EvaluationRecord,
    NoticeRecord,
    ProgressAnswer,
    WorkAnswer,
    WorkOffer,
)
from glora_server.coordinator.model import DeviceState, MetricPhase, Profile, Run, Version
from glora_server.coordinator.ports import StrategyInfo
from glora_server.coordinator.run_spec import RunSpec
from glora_server.rounds.assignment import Assignment, AssignmentKind
from glora_server.rounds.ids import AssignmentId, DeviceId, RoundId, RunId, VersionId
from glora_server.rounds.run import RunPhase
from glora_server.rpc.server import GrpcServers
from glora_server.rpc.services import RpcSettings, UseCases
from glora_server.security.authority import FileAuthority
from glora_server.security.rate import RateLimiter
from glora_wire.errors import GloraError, Reason, Refusal
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
    answer = await stub.WaitForWork(coordinator_pb2.WaitForWorkRequest(), timeout=5)
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
    answer = await stub.WaitForWork(coordinator_pb2.WaitForWorkRequest(), timeout=5)
    unset = {field.name for field in types_pb2.TrainingPlan.DESCRIPTOR.fields} - {
        field.name for field, _ in answer.assignment.plan.ListFields()
    }
    assert unset == {"weight_decay", "warmup_ratio", "mixed_precision", "evaluate_before"}, "all zero in this run"


async def test_nothing_comes_with_reasons_and_a_pause(
    world: World, stub: coordinator_pb2_grpc.CoordinatorServiceAsyncStub
) -> None:
    world.devices.answers.put_nowait(WorkAnswer(offer=None, retry_after=1.5))
    answer = await stub.WaitForWork(coordinator_pb2.WaitForWorkRequest(), timeout=5)
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
    await stub.WaitForWork(coordinator_pb2.WaitForWorkRequest(), timeout=10)
    world.devices.answers.put_nowait(WorkAnswer(offer=None))
    await stub.WaitForWork(coordinator_pb2.WaitForWorkRequest())
    bounded, free = (call[3] for call in world.devices.called("wait"))
    assert isinstance(bounded, float)
    assert isinstance(free, float)
    assert 8.0 < bounded <= 9.0
    assert free >= SETTINGS.poll_min_seconds


async def test_device_that_is_revoked_while_it_waits_gets_no_work(
    world: World, stub: coordinator_pb2_grpc.CoordinatorServiceAsyncStub
) -> None:
    call = stub.WaitForWork(coordinator_pb2.WaitForWorkRequest(), timeout=10)
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
    settings = replace(SETTINGS, grace_seconds=20.0)
    async with running_world(tmp_path, settings) as world, world.channel() as channel:
        stub = coordinator_pb2_grpc.CoordinatorServiceStub(channel)
        call = stub.WaitForWork(coordinator_pb2.WaitForWorkRequest(), timeout=30)
        await eventually(lambda: world.devices.polls == 1)
        await asyncio.wait_for(world.servers.stop(), 5)
        with refused(Reason.SHUTTING_DOWN, grpc.StatusCode.UNAVAILABLE) as errors:
            await call
        assert errors[0].retry_after == 2.0
        assert world.devices.polls == 0


def report(**fields: object) -> coordinator_pb2.ReportProgressRequest:
    return coordinator_pb2.ReportProgressRequest(assignment="assignments/a1", **fields)  # type: ignore[arg-type]


async def test_reports_reach_the_use_case(world: World, stub: coordinator_pb2_grpc.CoordinatorServiceAsyncStub) -> None:
    training = coordinator_pb2.Progress(phase=coordinator_pb2.DEVICE_PHASE_TRAINING, done=3, total=10, loss=0.5)
    would_not = coordinator_pb2.Refusal(reason="BASE_MODEL_MISSING", message="no model", permanent=True)
    could_not = coordinator_pb2.Refusal(reason="FLUX_TOO_LOW", message="from the future")
    for message in (report(progress=training), report(declined=would_not), report(failed=could_not)):
        await stub.ReportProgress(message, timeout=5)
    missing = Refusal(reason=Reason.BASE_MODEL_MISSING, message="no model")
    unknown = Refusal(reason=Reason.TRAINING_FAILED, message="FLUX_TOO_LOW: from the future")
    assert world.devices.calls == [
        ("progress", "d1", "a1", "training", 3, 10, 0.5),
        ("declined", "d1", "a1", missing, True),
        ("failed", "d1", "a1", unknown, False),
    ]


async def test_cancelled_work_is_told(world: World, stub: coordinator_pb2_grpc.CoordinatorServiceAsyncStub) -> None:
    world.devices.progress_answer = ProgressAnswer(cancelled=True, reason="ROUND_CLOSED", deadline_at=7.0)
    answer = await stub.ReportProgress(report(accepted=coordinator_pb2.Accepted()), timeout=5)
    assert (answer.cancelled, answer.reason, answer.deadline.seconds) == (True, "ROUND_CLOSED", 7)


@pytest.mark.parametrize(
    "message",
    [
        coordinator_pb2.ReportProgressRequest(),
        coordinator_pb2.ReportProgressRequest(accepted=coordinator_pb2.Accepted()),
        report(),
        report(progress=coordinator_pb2.Progress()),
        report(progress=coordinator_pb2.Progress(phase=coordinator_pb2.DEVICE_PHASE_TRAINING, loss=float("nan"))),
        report(progress=coordinator_pb2.Progress(phase=coordinator_pb2.DEVICE_PHASE_TRAINING, done=2**60)),
        report(failed=coordinator_pb2.Refusal()),
    ],
)
async def test_reports_that_say_nothing_are_refused(
    world: World,
    stub: coordinator_pb2_grpc.CoordinatorServiceAsyncStub,
    message: coordinator_pb2.ReportProgressRequest,
) -> None:
    with refused(Reason.REQUEST_INVALID, grpc.StatusCode.INVALID_ARGUMENT) as errors:
        await stub.ReportProgress(message, timeout=5)
    assert errors[0].details["field"] in errors[0].message or errors[0].details["field"] in ("report", "reason")
    assert not world.devices.calls


def evaluation(**changes: object) -> types_pb2.Evaluation:
    fields: dict[str, object] = {
        "phase": types_pb2.EVALUATION_PHASE_AFTER,
        "rank": 4,
        "loss": 0.25,
        "accuracy": 0.5,
        "rows": 100,
        "seconds": 1.5,
    }
    return types_pb2.Evaluation(**(fields | changes))  # type: ignore[arg-type]


async def test_metrics_reach_the_use_case(world: World, stub: coordinator_pb2_grpc.CoordinatorServiceAsyncStub) -> None:
    request = coordinator_pb2.ReportMetricsRequest(
        assignment="assignments/a1", evaluations=[evaluation()], complete=True
    )
    await stub.ReportMetrics(request, timeout=5)
    record = EvaluationRecord(phase=MetricPhase.AFTER, rank=4, loss=0.25, accuracy=0.5, rows=100, seconds=1.5)
    assert world.devices.calls == [("measured", "d1", "a1", (record,), True)]


@pytest.mark.parametrize(
    "changes",
    [
        {"phase": 0},
        {"phase": 99},
        {"rank": 0},
        {"rows": 0},
        {"rows": 2**63},
        {"loss": float("nan")},
        {"loss": float("inf")},
        {"accuracy": 1.01},
        {"accuracy": -0.1},
        {"accuracy": float("nan")},
        {"seconds": -1.0},
        {"seconds": float("inf")},
    ],
)
async def test_impossible_metrics_are_refused(
    world: World, stub: coordinator_pb2_grpc.CoordinatorServiceAsyncStub, changes: dict[str, object]
) -> None:
    request = coordinator_pb2.ReportMetricsRequest(
        assignment="assignments/a1", evaluations=[evaluation(), evaluation(**changes)]
    )
    with refused(Reason.METRICS_INVALID, grpc.StatusCode.INVALID_ARGUMENT):
        await stub.ReportMetrics(request, timeout=5)
    assert not world.devices.calls


async def test_too_many_metrics_are_refused(
    world: World, stub: coordinator_pb2_grpc.CoordinatorServiceAsyncStub
) -> None:
    request = coordinator_pb2.ReportMetricsRequest(assignment="assignments/a1", evaluations=[evaluation()] * 257)
    with refused(Reason.METRICS_INVALID):
        await stub.ReportMetrics(request, timeout=5)
    assert not world.devices.calls


async def test_fault_of_the_server_tells_no_details_but_where_to_look(
    world: World, stub: coordinator_pb2_grpc.CoordinatorServiceAsyncStub
) -> None:
    world.devices.fault = ZeroDivisionError("secret path /root/x")
    with structlog.testing.capture_logs() as logs, refused(Reason.INTERNAL, grpc.StatusCode.INTERNAL) as errors:
        await stub.ReportProgress(
            report(accepted=coordinator_pb2.Accepted()), timeout=5, metadata=(("x-request-id", "abc-1"),)
        )
    assert "secret" not in errors[0].message
    assert errors[0].details == {"request": "abc-1"}
    assert [(log["event"], log["log_level"]) for log in logs] == [("rpc_failed", "error")]
    assert logs[0]["exc_info"]


@pytest.mark.parametrize("reason", list(Reason))
async def test_every_reason_arrives_with_its_variables(
    world: World, stub: coordinator_pb2_grpc.CoordinatorServiceAsyncStub, reason: Reason
) -> None:
    sent = GloraError(reason, "What was wrong: ü. What to do.", thing="some thing", count=3)
    world.devices.fault = sent
    with refused(reason) as errors:
        await stub.ReportProgress(report(accepted=coordinator_pb2.Accepted()), timeout=5)
    assert errors[0].message == sent.message
    assert errors[0].details == {"thing": "some thing", "count": "3"}
    assert errors[0].retry_after == sent.retry_after


async def test_health_on_both_ports(world: World) -> None:
    names = ["", "glora.v1.EnrolmentService"]
    for channel, services in (
        (world.anonymous(enrolment=True), names),
        (world.channel(), [*names, "glora.v1.CoordinatorService"]),
    ):
        async with channel:
            health = health_pb2_grpc.HealthStub(channel)
            for service in services:
                answer = await health.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
                assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_reflection_lists_the_services_of_each_port(world: World) -> None:
    async def services(channel: grpc.aio.Channel) -> set[str]:
        async with channel:
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            call = stub.ServerReflectionInfo(
                iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=5
            )
            answer = await call.read()
            return {service.name for service in answer.list_services_response.service}

    common = {"glora.v1.EnrolmentService", "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
    assert await services(world.anonymous(enrolment=True)) == common
    assert await services(world.channel()) == common | {"glora.v1.CoordinatorService"}


def other_servers(world: World, folder: Path, settings: RpcSettings) -> GrpcServers:
    use_cases = UseCases(devices=world.devices, uploads=world.uploads, enrolment=world.enrolment)
    authority = FileAuthority.open(folder)
    return GrpcServers(settings, authority, use_cases, limit=RateLimiter(), observer=world.observer)


async def test_port_in_use_is_a_sentence_that_names_port_and_setting(world: World, tmp_path: Path) -> None:
    taken = replace(SETTINGS, port=world.servers.port)
    with pytest.raises(GloraError, match=r"GLORA__GRPC__PORT") as caught:
        await other_servers(world, tmp_path, taken).start()
    assert caught.value.reason is Reason.PORT_IN_USE
    assert caught.value.details == {"port": str(world.servers.port), "setting": "grpc.port"}
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        taken = replace(SETTINGS, enrolment_host="127.0.0.1", enrolment_port=port)
        servers = other_servers(world, tmp_path, taken)
        with pytest.raises(GloraError, match=f"Port {port} .*enrolment.port") as caught:
            await servers.start()
        assert caught.value.reason is Reason.PORT_IN_USE


async def test_failed_start_gives_back_the_port_that_it_had(world: World, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        free = probe.getsockname()[1]
    half = replace(SETTINGS, port=free, enrolment_port=world.servers.enrolment_port)
    servers = other_servers(world, tmp_path, half)
    with pytest.raises(GloraError):
        await servers.start()
    again = other_servers(world, tmp_path, replace(SETTINGS, port=free))
    await again.start()
    assert again.port == free
    await again.stop()


@pytest.mark.parametrize("host", ["203.0.113.1", "no such host", "x" * 300])
async def test_host_that_is_not_ours_is_a_sentence(world: World, tmp_path: Path, host: str) -> None:
    with pytest.raises(GloraError, match=r"grpc\.host") as caught:
        await other_servers(world, tmp_path, replace(SETTINGS, host=host)).start()
    assert caught.value.reason is Reason.SETTINGS_INVALID


async def test_ports_are_free_again_after_stop(tmp_path: Path) -> None:
    async with running_world(tmp_path) as world:
        ports = (world.servers.port, world.servers.enrolment_port)
    again = replace(SETTINGS, port=ports[0], enrolment_port=ports[1])
    async with running_world(tmp_path, again) as world:
        assert (world.servers.port, world.servers.enrolment_port) == ports


async def test_devices_are_sent_to_the_public_address(tmp_path: Path) -> None:

    settings = replace(SETTINGS, public_host="glora.example", public_port=443)
    async with running_world(tmp_path, settings) as world, world.anonymous(enrolment=True) as channel:
        _, request = new_key_and_request()
        answer = await enrolment_pb2_grpc.EnrolmentServiceStub(channel).Enrol(
            enrolment_pb2.EnrolRequest(token_secret="good", certificate_request_pem=request), timeout=5
        )
    assert (answer.coordinator_host, answer.coordinator_port) == ("glora.example", 443)
