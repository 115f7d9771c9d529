"""Requests of devices as records: every field is checked here, once, before a use case sees it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Final

from glora.v1 import coordinator_pb2, enrolment_pb2, types_pb2
from glora_server.coordinator.messages import EnrolRequestRecord, EvaluationRecord, UploadHeader
from glora_server.coordinator.model import MetricPhase, Profile
from glora_server.rounds.ids import AssignmentId
from glora_wire import digests
from glora_wire.digests import Digest
from glora_wire.errors import GloraError, Reason, Refusal

_ASSIGNMENT: Final = re.compile(r"assignments/([A-Za-z0-9_-]{1,64})")
_MAX_COUNT: Final = 2**53
"""Numbers beyond are no counts of anything, and databases and JSON readers would garble them."""
_MAX_TEXT: Final = 256
_MAX_ACCELERATORS: Final = 16
_MAX_MESSAGE: Final = 1000
_MAX_EVALUATIONS: Final = 256
_PHASES: Final = {
    types_pb2.EVALUATION_PHASE_BEFORE: MetricPhase.BEFORE,
    types_pb2.EVALUATION_PHASE_AFTER: MetricPhase.AFTER,
    types_pb2.EVALUATION_PHASE_VERSION: MetricPhase.VERSION,
}
_DEVICE_PHASES: Final = {
    coordinator_pb2.DEVICE_PHASE_DOWNLOADING: "downloading",
    coordinator_pb2.DEVICE_PHASE_LOADING: "loading",
    coordinator_pb2.DEVICE_PHASE_EVALUATING: "evaluating",
    coordinator_pb2.DEVICE_PHASE_TRAINING: "training",
    coordinator_pb2.DEVICE_PHASE_UPLOADING: "uploading",
}


def assignment_id(name: str) -> AssignmentId:
    """The id in "assignments/ID"; raises REQUEST_INVALID."""
    found = _ASSIGNMENT.fullmatch(name)
    if found is None:
        raise invalid(f'assignment must be "assignments/ID", not {name[:100]!r}', field="assignment")
    return AssignmentId(found[1])


def profile(message: types_pb2.CapabilityProfile) -> Profile:
    """What the device says about itself; long texts are cut, because they are only shown."""
    roles = frozenset(message.roles)
    return Profile(
        software_version=message.software_version[:_MAX_TEXT],
        platform=message.platform[:_MAX_TEXT],
        cpu_count=message.cpu_count,
        memory_bytes=_count("profile.memory_bytes", message.memory_bytes),
        accelerators=tuple(text[:_MAX_TEXT] for text in message.accelerators[:_MAX_ACCELERATORS]),
        max_rank=message.max_rank,
        trains=types_pb2.ROLE_TRAIN in roles or not roles,
        evaluates=types_pb2.ROLE_EVALUATE in roles,
        fingerprint=message.base_model_fingerprint[:_MAX_TEXT],
        task=message.task[:_MAX_TEXT],
        training_rows=_count("profile.training_rows", message.training_rows),
        evaluation_rows=_count("profile.evaluation_rows", message.evaluation_rows),
        run_name=message.run_name[:_MAX_TEXT],
    )


def enrol_request(message: enrolment_pb2.EnrolRequest) -> EnrolRequestRecord:
    """The request to join; the use case judges name, token and certificate request."""
    return EnrolRequestRecord(
        token_id=message.token_id,
        token_secret=message.token_secret,
        certificate_request_pem=message.certificate_request_pem,
        name=message.device_name,
        max_rank=message.max_rank,
        profile=profile(message.profile),
    )


def pull_request(message: coordinator_pb2.PullAdapterRequest) -> tuple[AssignmentId, str, int, Digest | None]:
    """Assignment, adapter key, offset and the digest of the first attempt; raises REQUEST_INVALID."""
    digest = digests.from_proto(message.digest) if message.HasField("digest") else None
    if not message.adapter_key:
        raise invalid("adapter_key is empty; take it from the assignment's adapters", field="adapter_key")
    if message.offset and digest is None:
        raise invalid("offset is not 0, so digest must say of which payload", field="digest")
    return assignment_id(message.assignment), message.adapter_key, _count("offset", message.offset), digest


def query_request(message: coordinator_pb2.QueryUploadRequest) -> tuple[AssignmentId, Digest]:
    """Assignment and digest; raises REQUEST_INVALID, STREAM_MALFORMED."""
    return assignment_id(message.assignment), _digest(message, "digest")


def upload_header(message: coordinator_pb2.PushHeader) -> tuple[AssignmentId, UploadHeader]:
    """Assignment and header; raises REQUEST_INVALID, STREAM_MALFORMED, WEIGHT_INVALID, METRICS_INVALID."""
    if message.training_rows >= _MAX_COUNT:
        raise GloraError(
            Reason.WEIGHT_INVALID,
            f"training_rows is {message.training_rows}, which no device holds.",
            training_rows=message.training_rows,
        )
    digest = _digest(message, "digest")
    _count("digest.size_bytes", digest.size)
    return assignment_id(message.assignment), UploadHeader(
        digest=digest,
        offset=_count("offset", message.offset),
        adapter_config_json=message.adapter_config_json,
        training_rows=message.training_rows,
        completed_steps=message.completed_steps,
        stopped_early=message.stopped_early,
        training_loss=_metric("training_loss", message.training_loss),
        training_seconds=_metric("training_seconds", message.training_seconds, lowest=0.0),
    )


def trailer_digest(message: coordinator_pb2.Trailer) -> Digest:
    """Digest of a trailer; raises REQUEST_INVALID, STREAM_MALFORMED."""
    return _digest(message, "digest")


def progress(message: coordinator_pb2.Progress) -> tuple[str, int, int, float]:
    """Phase, done, total and loss; raises REQUEST_INVALID."""
    phase = _DEVICE_PHASES.get(message.phase)
    if phase is None:
        raise invalid(f"progress.phase is {message.phase}, which is none that this server knows", field="phase")
    if not math.isfinite(message.loss):
        raise invalid(f"progress.loss is {message.loss}; report TRAINING_DIVERGED as failed instead", field="loss")
    return phase, _count("progress.done", message.done), _count("progress.total", message.total), message.loss


def refusal(message: coordinator_pb2.Refusal) -> Refusal:
    """The device's reason; one that only a newer device knows stands in the message; raises REQUEST_INVALID."""
    if not message.reason:
        raise invalid("the report gives no reason", field="reason")
    text = message.message[:_MAX_MESSAGE]
    try:
        return Refusal(reason=Reason(message.reason), message=text)
    except ValueError:
        return Refusal(reason=Reason.TRAINING_FAILED, message=f"{message.reason[:_MAX_TEXT]}: {text}")


def evaluations(messages: Iterable[types_pb2.Evaluation]) -> tuple[EvaluationRecord, ...]:
    """The evaluations, in order; raises METRICS_INVALID."""
    records = tuple(_evaluation(message) for message in messages)
    if len(records) > _MAX_EVALUATIONS:
        raise _bad_metric(f"{len(records)} evaluations came at once; at most {_MAX_EVALUATIONS} may", "evaluations")
    return records


def invalid(what: str, *, field: str) -> GloraError:
    """The error for a request that no correct device sends."""
    return GloraError(Reason.REQUEST_INVALID, f"The request is not valid: {what}.", field=field)


def _evaluation(message: types_pb2.Evaluation) -> EvaluationRecord:
    phase = _PHASES.get(message.phase)
    if phase is None:
        raise _bad_metric(f"phase {message.phase} of an evaluation is none that this server knows", "phase")
    if not message.rank or not 0 < message.rows < _MAX_COUNT:
        raise _bad_metric(f"an evaluation of rank {message.rank} over {message.rows} rows says nothing", "rows")
    accuracy = _metric("accuracy", message.accuracy, lowest=0.0)
    if accuracy > 1.0:
        raise _bad_metric(f"accuracy is {accuracy}, but it is a share between 0 and 1", "accuracy")
    return EvaluationRecord(
        phase=phase,
        rank=message.rank,
        loss=_metric("loss", message.loss),
        accuracy=accuracy,
        rows=message.rows,
        seconds=_metric("seconds", message.seconds, lowest=0.0),
    )


def _metric(name: str, value: float, *, lowest: float = -math.inf) -> float:
    if not math.isfinite(value) or value < lowest:
        raise _bad_metric(f"{name} is {value}", name)
    return value


def _bad_metric(what: str, name: str) -> GloraError:
    return GloraError(Reason.METRICS_INVALID, f"The metrics are not valid: {what}.", metric=name)


def _count(name: str, value: int) -> int:
    if value >= _MAX_COUNT:
        raise invalid(f"{name} is {value}, which is too large to be true", field=name)
    return value


def _digest(
    message: coordinator_pb2.QueryUploadRequest | coordinator_pb2.PushHeader | coordinator_pb2.Trailer, field: str
) -> Digest:
    if not message.HasField("digest"):
        raise invalid(f"{field} is missing", field=field)
    return digests.from_proto(message.digest)
