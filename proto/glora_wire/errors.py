"""Every reason that one side gives the other for refusing something, in one table.

A reason is the stable name (log, database, wire, dashboard, scripts); the message is a sentence for people.
`kind` says what sort of trouble it is; the gRPC and HTTP edges turn the kind into their status codes, so a new
reason needs one row here and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import Final


class Kind(Enum):
    """What sort of trouble a reason is; each edge maps it to its own status code."""

    INVALID = "invalid"
    OUT_OF_RANGE = "out_of_range"
    UNAUTHENTICATED = "unauthenticated"
    FORBIDDEN = "forbidden"
    NOT_FOUND = "not_found"
    CONFLICT = "conflict"
    PRECONDITION = "precondition"
    FENCED = "fenced"
    EXHAUSTED = "exhausted"
    DATA_LOSS = "data_loss"
    UNAVAILABLE = "unavailable"
    INTERNAL = "internal"


class Reason(StrEnum):
    """Names that scripts may rely on; retired ones stay reserved."""

    # joining and identity
    TOKEN_MALFORMED = "TOKEN_MALFORMED"
    TOKEN_UNKNOWN = "TOKEN_UNKNOWN"
    TOKEN_EXPIRED = "TOKEN_EXPIRED"
    TOKEN_USED_UP = "TOKEN_USED_UP"
    TOKEN_REVOKED = "TOKEN_REVOKED"
    CA_PIN_MISMATCH = "CA_PIN_MISMATCH"
    CSR_INVALID = "CSR_INVALID"
    NAME_INVALID = "NAME_INVALID"
    NAME_TAKEN = "NAME_TAKEN"
    RANK_NOT_ALLOWED = "RANK_NOT_ALLOWED"
    CERTIFICATE_UNKNOWN = "CERTIFICATE_UNKNOWN"
    CERTIFICATE_EXPIRED = "CERTIFICATE_EXPIRED"
    DEVICE_PENDING = "DEVICE_PENDING"
    DEVICE_SUSPENDED = "DEVICE_SUSPENDED"
    DEVICE_REVOKED = "DEVICE_REVOKED"
    DEVICE_UNKNOWN = "DEVICE_UNKNOWN"
    ADMIN_TOKEN_INVALID = "ADMIN_TOKEN_INVALID"
    # people
    SIGN_IN_NEEDED = "SIGN_IN_NEEDED"
    SIGN_IN_REFUSED = "SIGN_IN_REFUSED"
    ROLE_TOO_LOW = "ROLE_TOO_LOW"
    ORIGIN_REFUSED = "ORIGIN_REFUSED"
    HOST_REFUSED = "HOST_REFUSED"
    USER_UNKNOWN = "USER_UNKNOWN"
    API_TOKEN_UNKNOWN = "API_TOKEN_UNKNOWN"
    PASSWORD_REFUSED = "PASSWORD_REFUSED"
    LAST_ADMIN = "LAST_ADMIN"
    # planning: why a device gets no work
    BASE_MODEL_MISMATCH = "BASE_MODEL_MISMATCH"
    BASE_MODEL_MISSING = "BASE_MODEL_MISSING"
    TASK_MISMATCH = "TASK_MISMATCH"
    ROLE_MISMATCH = "ROLE_MISMATCH"
    NO_TRAINING_DATA = "NO_TRAINING_DATA"
    RANK_TOO_SMALL = "RANK_TOO_SMALL"
    TAGS_MISMATCH = "TAGS_MISMATCH"
    # on the device
    UNKNOWN_LABEL = "UNKNOWN_LABEL"
    DATA_INVALID = "DATA_INVALID"
    DATA_EMPTY = "DATA_EMPTY"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    TRAINING_DIVERGED = "TRAINING_DIVERGED"
    TRAINING_FAILED = "TRAINING_FAILED"
    DEADLINE_TOO_SHORT = "DEADLINE_TOO_SHORT"
    # transfers
    ASSIGNMENT_UNKNOWN = "ASSIGNMENT_UNKNOWN"
    ASSIGNMENT_CLOSED = "ASSIGNMENT_CLOSED"
    ADAPTER_UNKNOWN = "ADAPTER_UNKNOWN"
    OFFSET_INVALID = "OFFSET_INVALID"
    DIGEST_CHANGED = "DIGEST_CHANGED"
    DIGEST_MISMATCH = "DIGEST_MISMATCH"
    UPLOAD_CONFLICT = "UPLOAD_CONFLICT"
    UPLOAD_TOO_LARGE = "UPLOAD_TOO_LARGE"
    UPLOAD_TRUNCATED = "UPLOAD_TRUNCATED"
    UPLOAD_FENCED = "UPLOAD_FENCED"
    UPLOAD_QUEUE_FULL = "UPLOAD_QUEUE_FULL"
    CHUNK_TOO_LARGE = "CHUNK_TOO_LARGE"
    STREAM_MALFORMED = "STREAM_MALFORMED"
    STORAGE_FULL = "STORAGE_FULL"
    # what is inside an update
    PAYLOAD_MALFORMED = "PAYLOAD_MALFORMED"
    TENSOR_NAMES_WRONG = "TENSOR_NAMES_WRONG"
    TENSOR_SHAPE_WRONG = "TENSOR_SHAPE_WRONG"
    TENSOR_DTYPE_WRONG = "TENSOR_DTYPE_WRONG"
    RANK_WRONG = "RANK_WRONG"
    SCALE_WRONG = "SCALE_WRONG"
    CONFIG_INVALID = "CONFIG_INVALID"
    NON_FINITE = "NON_FINITE"
    NORM_TOO_LARGE = "NORM_TOO_LARGE"
    METRICS_INVALID = "METRICS_INVALID"
    WEIGHT_INVALID = "WEIGHT_INVALID"
    # how assignments and rounds end
    DEADLINE_PASSED = "DEADLINE_PASSED"
    ROUND_CLOSED = "ROUND_CLOSED"
    RUN_PAUSED = "RUN_PAUSED"
    RUN_COMPLETED = "RUN_COMPLETED"
    RUN_FAILED = "RUN_FAILED"
    RUN_ABORTED = "RUN_ABORTED"
    QUORUM_MISSED = "QUORUM_MISSED"
    AGGREGATION_FAILED = "AGGREGATION_FAILED"
    RETRIES_USED_UP = "RETRIES_USED_UP"
    # operators
    RUN_UNKNOWN = "RUN_UNKNOWN"
    ROUND_UNKNOWN = "ROUND_UNKNOWN"
    VERSION_UNKNOWN = "VERSION_UNKNOWN"
    REQUEST_INVALID = "REQUEST_INVALID"
    SPEC_INVALID = "SPEC_INVALID"
    MANIFEST_INVALID = "MANIFEST_INVALID"
    STRATEGY_UNKNOWN = "STRATEGY_UNKNOWN"
    STRATEGY_OPTIONS = "STRATEGY_OPTIONS"
    ILLEGAL_TRANSITION = "ILLEGAL_TRANSITION"
    SETTINGS_INVALID = "SETTINGS_INVALID"
    PORT_IN_USE = "PORT_IN_USE"
    DATA_DIR_UNUSABLE = "DATA_DIR_UNUSABLE"
    DATABASE_UNUSABLE = "DATABASE_UNUSABLE"
    SERVER_UNREACHABLE = "SERVER_UNREACHABLE"
    # everything
    TOO_MANY_REQUESTS = "TOO_MANY_REQUESTS"
    STALE_STATE = "STALE_STATE"
    SHUTTING_DOWN = "SHUTTING_DOWN"
    INTERNAL = "INTERNAL"


_BY_KIND: Final[dict[Kind, frozenset[Reason]]] = {
    Kind.UNAUTHENTICATED: frozenset(
        {
            Reason.TOKEN_UNKNOWN,
            Reason.TOKEN_EXPIRED,
            Reason.TOKEN_USED_UP,
            Reason.TOKEN_REVOKED,
            Reason.CA_PIN_MISMATCH,
            Reason.CERTIFICATE_UNKNOWN,
            Reason.CERTIFICATE_EXPIRED,
            Reason.ADMIN_TOKEN_INVALID,
            Reason.SIGN_IN_NEEDED,
            Reason.SIGN_IN_REFUSED,
        }
    ),
    Kind.FORBIDDEN: frozenset(
        {
            Reason.RANK_NOT_ALLOWED,
            Reason.DEVICE_PENDING,
            Reason.DEVICE_SUSPENDED,
            Reason.DEVICE_REVOKED,
            Reason.ROLE_TOO_LOW,
            Reason.ORIGIN_REFUSED,
            Reason.HOST_REFUSED,
        }
    ),
    Kind.NOT_FOUND: frozenset(
        {
            Reason.DEVICE_UNKNOWN,
            Reason.ASSIGNMENT_UNKNOWN,
            Reason.ADAPTER_UNKNOWN,
            Reason.RUN_UNKNOWN,
            Reason.ROUND_UNKNOWN,
            Reason.VERSION_UNKNOWN,
            Reason.USER_UNKNOWN,
            Reason.API_TOKEN_UNKNOWN,
        }
    ),
    Kind.CONFLICT: frozenset({Reason.NAME_TAKEN, Reason.UPLOAD_CONFLICT, Reason.PORT_IN_USE}),
    Kind.PRECONDITION: frozenset(
        {
            Reason.LAST_ADMIN,
            Reason.ASSIGNMENT_CLOSED,
            Reason.DIGEST_CHANGED,
            Reason.ILLEGAL_TRANSITION,
            Reason.ROUND_CLOSED,
            Reason.RUN_PAUSED,
            Reason.RUN_COMPLETED,
            Reason.RUN_FAILED,
            Reason.RUN_ABORTED,
            Reason.DEADLINE_PASSED,
            Reason.BASE_MODEL_MISMATCH,
            Reason.BASE_MODEL_MISSING,
            Reason.TASK_MISMATCH,
            Reason.ROLE_MISMATCH,
            Reason.NO_TRAINING_DATA,
            Reason.RANK_TOO_SMALL,
            Reason.TAGS_MISMATCH,
            Reason.QUORUM_MISSED,
            Reason.RETRIES_USED_UP,
        }
    ),
    Kind.OUT_OF_RANGE: frozenset({Reason.OFFSET_INVALID}),
    Kind.FENCED: frozenset({Reason.UPLOAD_FENCED, Reason.STALE_STATE}),
    Kind.EXHAUSTED: frozenset(
        {Reason.UPLOAD_QUEUE_FULL, Reason.STORAGE_FULL, Reason.TOO_MANY_REQUESTS, Reason.OUT_OF_MEMORY}
    ),
    Kind.DATA_LOSS: frozenset({Reason.DIGEST_MISMATCH}),
    Kind.UNAVAILABLE: frozenset(
        {Reason.SHUTTING_DOWN, Reason.SERVER_UNREACHABLE, Reason.DATABASE_UNUSABLE, Reason.DATA_DIR_UNUSABLE}
    ),
    Kind.INTERNAL: frozenset({Reason.INTERNAL, Reason.AGGREGATION_FAILED}),
}
_KINDS: Final[dict[Reason, Kind]] = {reason: kind for kind, reasons in _BY_KIND.items() for reason in reasons}

RETRYABLE: Final[dict[Reason, float]] = {
    Reason.UPLOAD_QUEUE_FULL: 1.0,
    Reason.STORAGE_FULL: 30.0,
    Reason.TOO_MANY_REQUESTS: 5.0,
    Reason.SHUTTING_DOWN: 2.0,
    Reason.STALE_STATE: 0.1,
    Reason.DEVICE_PENDING: 15.0,
    Reason.DEVICE_SUSPENDED: 60.0,
    Reason.DATABASE_UNUSABLE: 5.0,
}
"""Seconds after which the same call may succeed, for the reasons where waiting helps."""


def kind_of(reason: Reason) -> Kind:
    """What sort of trouble `reason` is; INVALID where the table names no other."""
    return _KINDS.get(reason, Kind.INVALID)


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A verdict against something: a value, not an exception (the reason and a sentence for people)."""

    reason: Reason
    message: str


class GloraError(Exception):
    """Raised for everything that somebody else can act on: a reason, a sentence, the variables of the sentence."""

    def __init__(self, reason: Reason, message: str, **details: object) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.details = {name: str(value) for name, value in details.items()}

    def __reduce__(self) -> tuple[object, ...]:
        """Support for crossing a process boundary (the worker raises, the coordinator reads)."""
        return (_rebuild, (type(self), self.reason, self.message, self.details))

    @property
    def kind(self) -> Kind:
        """The sort of trouble, for the edges."""
        return kind_of(self.reason)

    @property
    def retry_after(self) -> float | None:
        """Seconds to wait before the same call may succeed; None where waiting does not help."""
        return RETRYABLE.get(self.reason)

    def as_refusal(self) -> Refusal:
        """The same as a value."""
        return Refusal(reason=self.reason, message=self.message)


def _rebuild(cls: type[GloraError], reason: Reason, message: str, details: dict[str, str]) -> GloraError:
    return cls(reason, message, **details)
