"""Answers of the use cases as messages."""

from __future__ import annotations

from typing import Final

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from glora.v1 import coordinator_pb2, enrolment_pb2, types_pb2
from glora_server.coordinator.messages import (
    AdapterUseName,
    EnrolmentRecord,
    ProgressAnswer,
    UploadStateName,
    UploadStatus,
    WorkAnswer,
    WorkOffer,
)
from glora_server.rounds.assignment import AssignmentKind
from glora_wire import digests
from glora_wire.streams import MAX_CHUNK_BYTES

_KINDS: Final = {
    AssignmentKind.TRAIN: types_pb2.ASSIGNMENT_KIND_TRAIN,
    AssignmentKind.EVALUATE: types_pb2.ASSIGNMENT_KIND_EVALUATE,
}
_USES: Final[dict[AdapterUseName, types_pb2.AdapterUse.ValueType]] = {
    "train": types_pb2.ADAPTER_USE_TRAIN,
    "frozen": types_pb2.ADAPTER_USE_FROZEN,
    "merge": types_pb2.ADAPTER_USE_MERGE,
    "evaluate": types_pb2.ADAPTER_USE_EVALUATE,
}
_STATES: Final[dict[UploadStateName, coordinator_pb2.UploadState.ValueType]] = {
    "partial": coordinator_pb2.UPLOAD_STATE_PARTIAL,
    "received": coordinator_pb2.UPLOAD_STATE_RECEIVED,
    "accepted": coordinator_pb2.UPLOAD_STATE_ACCEPTED,
    "rejected": coordinator_pb2.UPLOAD_STATE_REJECTED,
    "discarded": coordinator_pb2.UPLOAD_STATE_DISCARDED,
}


def work(answer: WorkAnswer, now: float) -> coordinator_pb2.WaitForWorkResponse:
    """The answer to WaitForWork, sent at `now` (Unix seconds)."""
    response = coordinator_pb2.WaitForWorkResponse(
        notices=[
            coordinator_pb2.Notice(run_name=notice.run_name, reason=notice.reason.value, message=notice.message)
            for notice in answer.notices
        ]
    )
    if answer.offer is None:
        response.nothing.retry_after.CopyFrom(duration(answer.retry_after))
    else:
        response.assignment.CopyFrom(assignment(answer.offer, now))
    return response


def assignment(offer: WorkOffer, now: float) -> types_pb2.Assignment:
    """The offer as the device gets it, sent at `now` (Unix seconds)."""
    return types_pb2.Assignment(
        name=f"assignments/{offer.assignment.id}",
        run=f"runs/{offer.run.id}",
        run_name=offer.run.name,
        round_number=offer.round_number,
        kind=_KINDS[offer.assignment.kind],
        version=f"versions/{offer.version.id}",
        version_number=offer.version.number,
        adapters=[
            types_pb2.AdapterReference(key=adapter.key, use=_USES[adapter.use], rank=adapter.rank)
            for adapter in offer.adapters
        ],
        plan=_plan(offer),
        manifest_json=offer.run.manifest.to_json(),
        deadline=timestamp(offer.deadline_at),
        max_upload_bytes=offer.max_upload_bytes,
        max_chunk_bytes=MAX_CHUNK_BYTES,
        hash_algorithm=digests.algorithm_to_proto(offer.spec.wire.hash),
        sent_at=timestamp(now),
    )


def _plan(offer: WorkOffer) -> types_pb2.TrainingPlan:
    training, strategy = offer.spec.training, offer.strategy
    return types_pb2.TrainingPlan(
        task=offer.run.manifest.task,
        rank=offer.assignment.rank,
        scale=offer.spec.lora.scale,
        lora_dropout=offer.spec.lora.dropout,
        steps=training.steps,
        epochs=training.epochs,
        batch_size=training.batch_size,
        max_length=training.max_length,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        optimizer=training.optimizer,
        warmup_ratio=training.warmup_ratio,
        schedule=training.schedule,
        seed=offer.seed,
        mixed_precision=training.mixed_precision,
        wire_dtype=offer.spec.wire.dtype.to_proto(),
        # A strategy says it in the protos' own words, lower case; a word that they lack is a fault of the strategy.
        train_mask=types_pb2.TrainMask.Value(f"TRAIN_MASK_{strategy.train_mask.upper()}"),
        init=types_pb2.InitSource.Value(f"INIT_SOURCE_{strategy.init.upper()}"),
        upload_set=types_pb2.UploadSet.Value(f"UPLOAD_SET_{strategy.upload_set.upper()}"),
        reset_optimizer=strategy.reset_optimizer,
        allow_early_stop=training.allow_early_stop,
        evaluate_before=offer.spec.evaluation.before,
        evaluate_after=offer.spec.evaluation.after,
        extra=training.extra,
    )


def upload_query(status: UploadStatus) -> coordinator_pb2.QueryUploadResponse:
    """The answer to QueryUpload."""
    return coordinator_pb2.QueryUploadResponse(
        state=_STATES[status.state],
        committed_bytes=status.committed_bytes,
        reason=status.refusal.reason.value if status.refusal else "",
        message=status.refusal.message if status.refusal else "",
    )


def upload_verdict(status: UploadStatus) -> coordinator_pb2.PushUpdateResponse:
    """The answer to PushUpdate."""
    return coordinator_pb2.PushUpdateResponse(
        state=_STATES[status.state],
        reason=status.refusal.reason.value if status.refusal else "",
        message=status.refusal.message if status.refusal else "",
    )


def progress(answer: ProgressAnswer, now: float) -> coordinator_pb2.ReportProgressResponse:
    """The answer to ReportProgress, sent at `now` (Unix seconds)."""
    return coordinator_pb2.ReportProgressResponse(
        cancelled=answer.cancelled,
        reason=answer.reason,
        deadline=timestamp(answer.deadline_at),
        sent_at=timestamp(now),
    )


def enrolment(record: EnrolmentRecord, *, host: str, port: int) -> enrolment_pb2.EnrolResponse:
    """The answer to Enrol; the device works at `port` of `host` (empty: where it joined)."""
    return enrolment_pb2.EnrolResponse(
        device=f"devices/{record.device.id}",
        certificate_pem=record.certificate_pem,
        authority_pem=record.authority_pem,
        expires_at=timestamp(record.expires_at),
        approval_pending=record.approval_pending,
        granted_rank=record.device.granted_rank,
        coordinator_port=port,
        coordinator_host=host,
    )


def renewal(record: EnrolmentRecord) -> enrolment_pb2.RenewCertificateResponse:
    """The answer to RenewCertificate."""
    return enrolment_pb2.RenewCertificateResponse(
        certificate_pem=record.certificate_pem,
        authority_pem=record.authority_pem,
        expires_at=timestamp(record.expires_at),
    )


def timestamp(seconds: float) -> Timestamp:
    """Unix seconds as a message, to the microsecond: a float has no more."""
    message = Timestamp()
    message.FromMicroseconds(round(seconds * 1e6))
    return message


def duration(seconds: float) -> Duration:
    """Seconds as a message."""
    message = Duration()
    message.FromNanoseconds(round(seconds * 1e9))
    return message
