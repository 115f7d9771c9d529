"""Reports, metrics and the statuses of errors."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest
import structlog
from rpc_world import World, refused, running_world

from glora.v1 import coordinator_pb2, coordinator_pb2_grpc, types_pb2
from glora_server.coordinator.messages import (
    EvaluationRecord,
    ProgressAnswer,
)
from glora_server.coordinator.model import MetricPhase
from glora_wire.errors import GloraError, Reason, Refusal


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with running_world(tmp_path / "authority") as running:
        yield running


@pytest.fixture
async def stub(world: World) -> AsyncIterator[coordinator_pb2_grpc.CoordinatorServiceAsyncStub]:
    async with world.channel() as channel:
        yield coordinator_pb2_grpc.CoordinatorServiceStub(channel)


def report(**fields: object) -> coordinator_pb2.ReportProgressRequest:
    return coordinator_pb2.ReportProgressRequest(assignment="assignments/a1", **fields)  # type: ignore[arg-type]


async def test_reports_reach_the_use_case(world: World, stub: coordinator_pb2_grpc.CoordinatorServiceAsyncStub) -> None:
    training = coordinator_pb2.Progress(phase=coordinator_pb2.DEVICE_PHASE_TRAINING, done=3, total=10, loss=0.5)
    would_not = coordinator_pb2.Refusal(reason="BASE_MODEL_MISSING", message="no model", permanent=True)
    could_not = coordinator_pb2.Refusal(reason="FLUX_TOO_LOW", message="from the future")
    for message in (report(progress=training), report(declined=would_not), report(failed=could_not)):
        await stub.ReportProgress(message, timeout=60)
    missing = Refusal(reason=Reason.BASE_MODEL_MISSING, message="no model")
    unknown = Refusal(reason=Reason.TRAINING_FAILED, message="FLUX_TOO_LOW: from the future")
    assert world.devices.calls == [
        ("progress", "d1", "a1", "training", 3, 10, 0.5),
        ("declined", "d1", "a1", missing, True),
        ("failed", "d1", "a1", unknown, False),
    ]


async def test_cancelled_work_is_told(world: World, stub: coordinator_pb2_grpc.CoordinatorServiceAsyncStub) -> None:
    world.devices.progress_answer = ProgressAnswer(cancelled=True, reason="ROUND_CLOSED", deadline_at=7.0)
    answer = await stub.ReportProgress(report(accepted=coordinator_pb2.Accepted()), timeout=60)
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
        await stub.ReportProgress(message, timeout=60)
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
    await stub.ReportMetrics(request, timeout=60)
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
        await stub.ReportMetrics(request, timeout=60)
    assert not world.devices.calls


async def test_too_many_metrics_are_refused(
    world: World, stub: coordinator_pb2_grpc.CoordinatorServiceAsyncStub
) -> None:
    request = coordinator_pb2.ReportMetricsRequest(assignment="assignments/a1", evaluations=[evaluation()] * 257)
    with refused(Reason.METRICS_INVALID):
        await stub.ReportMetrics(request, timeout=60)
    assert not world.devices.calls


async def test_fault_of_the_server_tells_no_details_but_where_to_look(
    world: World, stub: coordinator_pb2_grpc.CoordinatorServiceAsyncStub
) -> None:
    world.devices.fault = ZeroDivisionError("secret path /root/x")
    with structlog.testing.capture_logs() as logs, refused(Reason.INTERNAL, grpc.StatusCode.INTERNAL) as errors:
        await stub.ReportProgress(
            report(accepted=coordinator_pb2.Accepted()), timeout=60, metadata=(("x-request-id", "abc-1"),)
        )
    assert "secret" not in errors[0].message
    assert errors[0].details == {"request": "abc-1"}
    assert [(log["event"], log["log_level"]) for log in logs] == [("rpc_failed", "error")]
    assert logs[0]["exc_info"]


async def test_refusal_is_logged_with_device_and_request(
    world: World, stub: coordinator_pb2_grpc.CoordinatorServiceAsyncStub
) -> None:
    world.devices.fault = GloraError(Reason.ASSIGNMENT_CLOSED, "Too late.")
    context = [structlog.contextvars.merge_contextvars]
    with structlog.testing.capture_logs(processors=context) as logs, refused(Reason.ASSIGNMENT_CLOSED):
        await stub.ReportProgress(
            report(accepted=coordinator_pb2.Accepted()), timeout=60, metadata=(("x-request-id", "abc-2"),)
        )
    [log] = logs
    peer = log.pop("peer")
    assert peer.startswith("ipv")
    assert log == {
        "event": "rpc_refused",
        "log_level": "info",
        "reason": "ASSIGNMENT_CLOSED",
        "message": "Too late.",
        "method": "ReportProgress",
        "device": "name-d1",
        "request_id": "abc-2",
    }


@pytest.mark.parametrize("given", ["x" * 65, "a b", "a;b", ""])
async def test_strange_request_ids_are_replaced(
    world: World, stub: coordinator_pb2_grpc.CoordinatorServiceAsyncStub, given: str
) -> None:
    world.devices.fault = ZeroDivisionError()
    with refused(Reason.INTERNAL) as errors:
        await stub.ReportProgress(
            report(accepted=coordinator_pb2.Accepted()), timeout=60, metadata=(("x-request-id", given),)
        )
    assert errors[0].details["request"] != given
    assert len(errors[0].details["request"]) == 12


@pytest.mark.parametrize("reason", list(Reason))
async def test_every_reason_arrives_with_its_variables(
    world: World, stub: coordinator_pb2_grpc.CoordinatorServiceAsyncStub, reason: Reason
) -> None:
    sent = GloraError(reason, "What was wrong: ü. What to do.", thing="some thing", count=3)
    world.devices.fault = sent
    with refused(reason) as errors:
        await stub.ReportProgress(report(accepted=coordinator_pb2.Accepted()), timeout=60)
    assert errors[0].message == sent.message
    assert errors[0].details == {"thing": "some thing", "count": "3"}
    assert errors[0].retry_after == sent.retry_after
