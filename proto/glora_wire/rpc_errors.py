"""Between reasons and gRPC statuses, for both sides: what the server sends, and what the device makes of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final, Protocol, Self, cast

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from google.rpc import code_pb2, error_details_pb2, status_pb2  # type: ignore[import-untyped]  # no py.typed

from glora_wire.errors import GloraError, Kind, Reason

DOMAIN: Final = "glora"
DETAILS_KEY: Final = "grpc-status-details-bin"

CODES: Final[Mapping[Kind, grpc.StatusCode]] = {
    Kind.INVALID: grpc.StatusCode.INVALID_ARGUMENT,
    Kind.OUT_OF_RANGE: grpc.StatusCode.OUT_OF_RANGE,
    Kind.UNAUTHENTICATED: grpc.StatusCode.UNAUTHENTICATED,
    Kind.FORBIDDEN: grpc.StatusCode.PERMISSION_DENIED,
    Kind.NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    Kind.CONFLICT: grpc.StatusCode.ALREADY_EXISTS,
    Kind.PRECONDITION: grpc.StatusCode.FAILED_PRECONDITION,
    Kind.FENCED: grpc.StatusCode.ABORTED,
    Kind.EXHAUSTED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Kind.DATA_LOSS: grpc.StatusCode.DATA_LOSS,
    Kind.UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    Kind.INTERNAL: grpc.StatusCode.INTERNAL,
}
"""Status code of each kind of trouble."""

# Statuses travel in HTTP/2 trailers, which peers and proxies cut at 8 KiB; base64 and percent-encoding swell them.
_MAX_MESSAGE: Final = 900
_MAX_VALUE: Final = 200
_MAX_VALUES: Final = 12

_UNREACHABLE: Final = (
    "The server cannot be reached, or it ends the connection ({why}). Check the address and the port (devices work on "
    "7443, enrolment is on 7444) and that the server runs. A missing or expired client certificate, a server "
    "certificate of another authority, or one without this host name look just the same from here."
)
_SILENT: Final = (
    "The server did not answer in time ({why}). The network may be slow or drop packets, the address or port may be "
    "that of something else, or the server is overloaded; the call can be repeated."
)
_WITHOUT_DETAILS: Final[Mapping[grpc.StatusCode, tuple[Reason, str]]] = {
    grpc.StatusCode.UNAVAILABLE: (Reason.SERVER_UNREACHABLE, _UNREACHABLE),
    grpc.StatusCode.DEADLINE_EXCEEDED: (Reason.SERVER_UNREACHABLE, _SILENT),
    grpc.StatusCode.CANCELLED: (
        Reason.SERVER_UNREACHABLE,
        "The call was cut off before its end ({why}); repeat it.",
    ),
    grpc.StatusCode.UNAUTHENTICATED: (
        Reason.CERTIFICATE_UNKNOWN,
        "The server does not know this device's certificate ({why}); join again.",
    ),
    grpc.StatusCode.RESOURCE_EXHAUSTED: (
        Reason.TOO_MANY_REQUESTS,
        "The server or the network library has reached a limit ({why}); try again later.",
    ),
    grpc.StatusCode.UNIMPLEMENTED: (
        Reason.INTERNAL,
        "The server does not know this call ({why}): the port is that of something else (devices work on 7443, "
        "enrolment is on 7444), or the server is of another version.",
    ),
}


class RemoteError(GloraError):
    """A GloraError that the other side sent, with the waiting time that it asked for."""

    _asked: float | None = None

    @property
    def retry_after(self) -> float | None:
        """Seconds that the server asked to wait, else what the table says for the reason."""
        return self._asked if self._asked is not None else super().retry_after

    def asking(self, seconds: float | None) -> Self:
        """The same error with the server's waiting time set; changes and returns self."""
        self._asked = seconds
        return self

    def __reduce__(self) -> tuple[object, ...]:
        """Support for crossing a process boundary, the waiting time included."""
        return (*super().__reduce__(), {"_asked": self._asked})


class _Call(Protocol):
    """What sync and asyncio RpcErrors have in common."""

    def code(self) -> grpc.StatusCode | None: ...
    def details(self) -> str | None: ...
    def trailing_metadata(self) -> Iterable[tuple[str, str | bytes]] | None: ...


def status_for(error: GloraError) -> status_pb2.Status:
    """The status that carries `error`: code by kind, ErrorInfo, and RetryInfo where waiting helps.

    Long texts are cut, so that the status fits the trailers of every peer.
    """
    status = status_pb2.Status(code=code_for(error).value[0], message=_cut(error.message, _MAX_MESSAGE))
    variables = {key: _cut(value, _MAX_VALUE) for key, value in list(error.details.items())[:_MAX_VALUES]}
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=error.reason.value, domain=DOMAIN, metadata=variables))
    if error.retry_after is not None:
        delay = Duration()
        delay.FromNanoseconds(round(error.retry_after * 1e9))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return status


def code_for(error: GloraError) -> grpc.StatusCode:
    """Status code of the error's kind."""
    return CODES[error.kind]


def error_from_rpc(exc: grpc.RpcError) -> GloraError:
    """What an RpcError means; never raises, also when the other side is no glora server."""
    call = cast("_Call", exc)
    code = (call.code() if hasattr(exc, "code") else None) or grpc.StatusCode.UNKNOWN
    text = (call.details() if hasattr(exc, "details") else None) or ""
    status = _status_of(call) if hasattr(exc, "trailing_metadata") else None
    if status is not None:
        told = _told(status)
        if told is not None:
            return told
    reason, sentence = _WITHOUT_DETAILS.get(
        code, (Reason.INTERNAL, "The call failed ({why}); the server's log may say why.")
    )
    why = f"{code.name}: {_cut(text, 400)}" if text else code.name
    return RemoteError(reason, sentence.format(why=why), code=code.name, grpc=_cut(text, 400))


def _status_of(call: _Call) -> status_pb2.Status | None:
    for key, value in call.trailing_metadata() or ():
        if key == DETAILS_KEY and isinstance(value, bytes):
            try:
                return status_pb2.Status.FromString(value)
            except DecodeError:
                return None
    return None


def _told(status: status_pb2.Status) -> GloraError | None:
    """The error that a glora server described; None when the status has no ErrorInfo of ours."""
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    wait: float | None = None
    found = False
    try:
        for detail in status.details:
            if not found and detail.Unpack(info):
                found = info.domain == DOMAIN
            elif detail.Unpack(retry):
                wait = max(retry.retry_delay.ToNanoseconds() / 1e9, 0.0)
    except (DecodeError, ValueError):
        return None
    if not found:
        return None
    details = dict(info.metadata)
    try:
        reason = Reason(info.reason)
    except ValueError:
        # A newer server may have reasons that this side does not know; its code still says what sort they are.
        reason = _NEAREST.get(status.code, Reason.INTERNAL)
        details["unknown_reason"] = info.reason
    error = RemoteError(reason, status.message)
    error.details = details
    return error.asking(wait)


_NEAREST: Final[Mapping[int, Reason]] = {
    code_pb2.UNAVAILABLE: Reason.SHUTTING_DOWN,
    code_pb2.RESOURCE_EXHAUSTED: Reason.TOO_MANY_REQUESTS,
    code_pb2.ABORTED: Reason.STALE_STATE,
    code_pb2.FAILED_PRECONDITION: Reason.ASSIGNMENT_CLOSED,
    code_pb2.NOT_FOUND: Reason.ASSIGNMENT_UNKNOWN,
    code_pb2.UNAUTHENTICATED: Reason.CERTIFICATE_UNKNOWN,
    code_pb2.PERMISSION_DENIED: Reason.DEVICE_SUSPENDED,
    code_pb2.DATA_LOSS: Reason.DIGEST_MISMATCH,
    code_pb2.OUT_OF_RANGE: Reason.OFFSET_INVALID,
}
"""What to do with a reason from a newer server: the mildest known reason of the same code."""


def _cut(text: str, limit: int) -> str:
    """At most `limit` characters that UTF-8 can spell (protobuf refuses lone surrogates)."""
    text = text.encode("utf-8", "replace").decode()
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
