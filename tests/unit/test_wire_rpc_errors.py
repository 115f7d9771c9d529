"""Every reason crosses gRPC and comes back; what no glora server sent is explained in words."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Sequence

import grpc
import pytest
from google.rpc import code_pb2, error_details_pb2, status_pb2  # type: ignore[import-untyped]  # no py.typed

from glora_wire.errors import GloraError, Kind, Reason
from glora_wire.rpc_errors import CODES, DETAILS_KEY, RemoteError, code_for, error_from_rpc, status_for


class FakeCall(grpc.RpcError):
    """An RpcError as grpc raises it at a client."""

    def __init__(self, code: grpc.StatusCode, text: str, trailing: Sequence[tuple[str, str | bytes]] | None) -> None:
        super().__init__(text)
        self._code, self._text, self._trailing = code, text, trailing

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._text

    def trailing_metadata(self) -> Sequence[tuple[str, str | bytes]] | None:  # type: ignore[override]  # as aio has it
        return self._trailing


def sent(error: GloraError) -> FakeCall:
    status = status_for(error)
    return FakeCall(code_for(error), status.message, [("x", "y"), (DETAILS_KEY, status.SerializeToString())])


def test_every_kind_has_a_code_of_its_own() -> None:
    assert CODES.keys() == set(Kind)
    assert len(set(CODES.values())) == len(Kind)


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_crosses_and_comes_back(reason: Reason) -> None:
    error = GloraError(reason, "What was wrong, and what to do: bitte schön.", limit=3, name="pi-7")
    assert status_for(error).code == CODES[error.kind].value[0]
    back = error_from_rpc(sent(error))
    assert (back.reason, back.message, back.details) == (error.reason, error.message, error.details)
    assert back.kind is error.kind
    assert back.retry_after == error.retry_after


def test_the_servers_waiting_time_counts_and_survives_pickling() -> None:
    status = status_for(GloraError(Reason.STORAGE_FULL, "Full."))
    retry = error_details_pb2.RetryInfo()
    assert status.details[1].Unpack(retry)
    assert retry.retry_delay.seconds == 30
    retry.retry_delay.FromNanoseconds(7_500_000_000)
    status.details[1].Pack(retry)
    call = FakeCall(grpc.StatusCode.RESOURCE_EXHAUSTED, "", [(DETAILS_KEY, status.SerializeToString())])
    back = error_from_rpc(call)
    assert back.retry_after == 7.5
    again = pickle.loads(pickle.dumps(back))
    assert isinstance(again, RemoteError)
    assert (again.retry_after, again.reason, again.message) == (7.5, back.reason, back.message)


def test_statuses_fit_the_trailers() -> None:
    error = GloraError(Reason.INTERNAL, "ü" * 10_000, **{f"v{index}": "x" * 5000 for index in range(50)})
    assert len(status_for(error).SerializeToString()) < 5500
    assert status_for(GloraError(Reason.INTERNAL, "lone \ud800", name="\ud800")).message == "lone ?"


@pytest.mark.parametrize(
    ("code", "reason", "word"),
    [
        (grpc.StatusCode.UNAVAILABLE, Reason.SERVER_UNREACHABLE, "certificate"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, Reason.SERVER_UNREACHABLE, "in time"),
        (grpc.StatusCode.CANCELLED, Reason.SERVER_UNREACHABLE, "repeat"),
        (grpc.StatusCode.UNAUTHENTICATED, Reason.CERTIFICATE_UNKNOWN, "join again"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.TOO_MANY_REQUESTS, "later"),
        (grpc.StatusCode.UNIMPLEMENTED, Reason.INTERNAL, "7443"),
        (grpc.StatusCode.UNKNOWN, Reason.INTERNAL, "log"),
    ],
)
@pytest.mark.parametrize("trailing", [None, [], [(DETAILS_KEY, b"\xff\xff")], [(DETAILS_KEY, b"")], [("x", "y")]])
def test_servers_that_sent_no_reason(
    code: grpc.StatusCode, reason: Reason, word: str, trailing: Sequence[tuple[str, str | bytes]] | None
) -> None:
    back = error_from_rpc(FakeCall(code, "failed to {connect}", trailing))
    assert back.reason is reason
    assert word in back.message
    assert "failed to {connect}" in back.message
    assert back.details == {"code": code.name, "grpc": "failed to {connect}"}


def test_bare_errors_and_foreign_domains() -> None:
    assert error_from_rpc(grpc.RpcError("?")).reason is Reason.INTERNAL
    status = status_pb2.Status(code=code_pb2.UNAVAILABLE)
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason="DEVICE_REVOKED", domain="elsewhere"))
    broken = status.details.add()
    broken.type_url, broken.value = "type.googleapis.com/google.rpc.RetryInfo", b"\xff"
    call = FakeCall(grpc.StatusCode.UNAVAILABLE, "", [(DETAILS_KEY, status.SerializeToString())])
    assert error_from_rpc(call).reason is Reason.SERVER_UNREACHABLE


def test_reasons_of_a_newer_server() -> None:
    status = status_pb2.Status(code=code_pb2.FAILED_PRECONDITION, message="New rule.")
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason="NEW_RULE", domain="glora", metadata={"a": "b"}))
    back = error_from_rpc(
        FakeCall(grpc.StatusCode.FAILED_PRECONDITION, "", [(DETAILS_KEY, status.SerializeToString())])
    )
    assert back.reason is Reason.ASSIGNMENT_CLOSED
    assert (back.message, back.details) == ("New rule.", {"a": "b", "unknown_reason": "NEW_RULE"})


async def test_over_a_real_connection() -> None:
    error = GloraError(Reason.UPLOAD_QUEUE_FULL, "Zu viele auf einmal: später.", waiting=3)

    async def fail(_: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        status = status_for(error)
        await context.abort(code_for(error), status.message, ((DETAILS_KEY, status.SerializeToString()),))

    server = grpc.aio.server()
    handler = grpc.method_handlers_generic_handler("s.S", {"M": grpc.unary_unary_rpc_method_handler(fail)})
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            known: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/s.S/M")
            missing: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/s.S/N")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await known(b"", timeout=5)
            with pytest.raises(grpc.aio.AioRpcError) as unknown:
                await missing(b"", timeout=5)
        back = await asyncio.to_thread(_blocking_call, port)
    finally:
        await server.stop(None)
    for answer in (error_from_rpc(caught.value), back):
        assert (answer.reason, answer.message, answer.details) == (error.reason, error.message, error.details)
        assert answer.retry_after == 1.0
    assert "7443" in error_from_rpc(unknown.value).message


def _blocking_call(port: int) -> GloraError:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        known: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/s.S/M")
        with pytest.raises(grpc.RpcError) as caught:
            known(b"", timeout=5)
        return error_from_rpc(caught.value)
