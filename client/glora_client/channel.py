"""Connections to the server: mutual TLS for work, and what a call does when it is stopped or fails."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

import grpc

from glora.v1 import coordinator_pb2, coordinator_pb2_grpc
from glora_client.state import Identity
from glora_wire.chunks import pack_part, unpacker
from glora_wire.errors import GloraError, Reason
from glora_wire.rpc_errors import error_from_rpc

_OPTIONS: Final = (
    # A device behind NAT must notice a dead path within a minute, without the server calling it a flood.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 2),
    # The session waits by itself; the library's own waiting must stay short.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    ("grpc.enable_retries", 0),
)
SHORT_SECONDS: Final = 15.0
"""Deadline of a call that the server answers at once."""

Answer = TypeVar("Answer")


class Cancellable(Protocol):
    """A call that can be ended from another thread."""

    def cancel(self) -> object:
        """End the call."""
        ...


class Stopped(Exception):  # noqa: N818 - not an error: the person asked for it
    """Raised where a call or a wait ends because the client is being stopped."""


class Stop:
    """Whether the client should end; ends the calls that are under way. Safe to use from a signal handler's thread."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._calls: set[Cancellable] = set()
        self._lock = threading.RLock()

    def set(self) -> None:
        """Ask the client to end."""
        self._event.set()
        with self._lock:
            calls = list(self._calls)
        for call in calls:
            call.cancel()

    def is_set(self) -> bool:
        """Whether the client should end."""
        return self._event.is_set()

    def wait(self, seconds: float) -> None:
        """Sleep; raises Stopped when the client should end."""
        if self._event.wait(seconds):
            raise Stopped

    @contextmanager
    def ending(self, call: Cancellable) -> Iterator[None]:
        """While the block runs, stopping ends `call`. Raises Stopped or GloraError instead of grpc's errors."""
        with self._lock:
            self._calls.add(call)
        try:
            if self.is_set():
                call.cancel()
            yield
        except grpc.RpcError as error:
            if self.is_set():
                raise Stopped from error
            raise error_from_rpc(error) from error
        except grpc.FutureCancelledError as error:
            if self.is_set():
                raise Stopped from error
            raise GloraError(Reason.SERVER_UNREACHABLE, "The call was cut off before its end.") from error
        finally:
            with self._lock:
                self._calls.discard(call)


@dataclass(frozen=True, slots=True)
class Backoff:
    """Full-jitter exponential waiting: uniformly between 0 and base · 2^attempt, at most `longest` seconds."""

    base: float = 0.2
    longest: float = 30.0

    def seconds(self, attempt: int, uniform: Callable[[], float] = random.random) -> float:
        """How long to wait before attempt `attempt` + 1, counted from 0."""
        return uniform() * min(self.longest, self.base * 2.0 ** min(attempt, 30))


def is_passing(error: GloraError) -> bool:
    """Whether the same call may succeed later without anybody doing anything."""
    return error.retry_after is not None or error.reason in {Reason.SERVER_UNREACHABLE, Reason.INTERNAL}


def work_channel(identity: Identity, credentials: tuple[bytes, bytes, bytes]) -> grpc.Channel:
    """A channel with mutual TLS to the coordinator port; connects when it is first used."""
    key, certificate, authority = credentials
    return grpc.secure_channel(
        f"{_bracketed(identity.host)}:{identity.port}",
        grpc.ssl_channel_credentials(root_certificates=authority, private_key=key, certificate_chain=certificate),
        options=_OPTIONS,
    )


def work_stub(channel: grpc.Channel) -> coordinator_pb2_grpc.CoordinatorServiceStub:
    """The service behind the channel; parts of transfers are what `glora_wire.chunks` makes of them."""
    stub = coordinator_pb2_grpc.CoordinatorServiceStub(channel)
    service = coordinator_pb2.DESCRIPTOR.services_by_name["CoordinatorService"].full_name
    stub.PullAdapter = channel.unary_stream(
        f"/{service}/PullAdapter",
        request_serializer=coordinator_pb2.PullAdapterRequest.SerializeToString,
        response_deserializer=unpacker(coordinator_pb2.PullAdapterResponse),  # type: ignore[arg-type]  # or a Chunk
    )
    stub.PushUpdate = channel.stream_unary(
        f"/{service}/PushUpdate",
        request_serializer=pack_part,
        response_deserializer=coordinator_pb2.PushUpdateResponse.FromString,
    )
    return stub


def enrolment_channel(host: str, port: int, authority_pem: bytes) -> grpc.Channel:
    """A channel to the enrolment port that trusts only this authority."""
    return grpc.secure_channel(
        f"{_bracketed(host)}:{port}", grpc.ssl_channel_credentials(root_certificates=authority_pem), options=_OPTIONS
    )


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
