"""What every call goes through: who calls, under which request id, how it ends.

enter ─ bind request id and device to the log ─ work ─ GloraError      → its status, with ErrorInfo
                                                      ─ other exception → INTERNAL, logged with its traceback
                                                      ─ cancelled       → counted, nothing said
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final, Never

import grpc
import structlog
from grpc.aio import AbortError, ServicerContext

from glora_server.coordinator.model import Device
from glora_server.rpc.services import DeviceUseCases, RpcObserver, ServerIdentity
from glora_wire.errors import GloraError, Reason
from glora_wire.rpc_errors import DETAILS_KEY, code_for, status_for

Context = ServicerContext[Any, Any]
"""Of any call; its messages do not matter here."""

_REQUEST_ID_KEY: Final = "x-request-id"
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_CERTIFICATE_KEY: Final = "x509_pem_cert"
_log = structlog.get_logger("glora.rpc")


@dataclass(slots=True)
class _Ending:
    code: str = "OK"


class Edge:
    """Binds, counts and ends calls."""

    def __init__(self, identity: ServerIdentity, devices: DeviceUseCases, observer: RpcObserver) -> None:
        self._identity = identity
        self._devices = devices
        self._observer = observer

    @asynccontextmanager
    async def call(self, context: Context, method: str) -> AsyncIterator[None]:
        """A call of anyone; what the body raises becomes the status of the call."""
        request_id = _request_id(context)
        ending = _Ending(code=grpc.StatusCode.CANCELLED.name)
        started = time.perf_counter()
        with structlog.contextvars.bound_contextvars(request_id=request_id, method=method):
            try:
                yield
                ending.code = grpc.StatusCode.OK.name
            except GloraError as error:
                ending.code = code_for(error).name
                # A server that stops tells every waiting device so; that is no news to log a thousand times.
                tell = _log.debug if error.reason is Reason.SHUTTING_DOWN else _log.info
                tell("rpc_refused", reason=error.reason.value, message=error.message, peer=context.peer())
                await refuse(context, error)
            except AbortError:
                ending.code = context.code().name
                raise
            except Exception as error:
                if context.cancelled() or context.done():
                    # The other side is gone, and what failed is the answer to it.
                    _log.debug("rpc_peer_gone", error=str(error))
                    raise
                ending.code = grpc.StatusCode.INTERNAL.name
                _log.exception("rpc_failed", peer=context.peer())
                await refuse(context, _internal(request_id))
            finally:
                structlog.contextvars.unbind_contextvars("device")
                seconds = time.perf_counter() - started
                self._observer.rpc_finished(method=method, code=ending.code, seconds=seconds)

    @asynccontextmanager
    async def device_call(self, context: Context, method: str) -> AsyncIterator[Device]:
        """A call of the device whose certificate opened the connection."""
        async with self.call(context, method):
            device = await self.identify(context)
            # Until the call has ended, so that its refusal names the device too.
            structlog.contextvars.bind_contextvars(device=device.name)
            yield device

    async def identify(self, context: Context) -> Device:
        """The device that calls, asked anew each time so that a revocation counts at once.

        Raises CERTIFICATE_UNKNOWN, DEVICE_REVOKED, DEVICE_SUSPENDED, DEVICE_PENDING.
        """
        for certificate in context.auth_context().get(_CERTIFICATE_KEY, ()):
            return await self._devices.identify(self._identity.key_of_certificate(certificate))
        raise GloraError(
            Reason.CERTIFICATE_UNKNOWN, "The connection carries no client certificate; join with a token first."
        )


async def refuse(context: Context, error: GloraError, code: grpc.StatusCode | None = None) -> Never:
    """End the call with the error's status, or with another `code` and the same details."""
    status = status_for(error)
    if code is not None:
        status.code = code.value[0]
    details = ((DETAILS_KEY, status.SerializeToString()),)
    await context.abort(code or code_for(error), status.message, details)
    raise AssertionError("abort returned")


def _request_id(context: Context) -> str:
    """The caller's request id where it gave a harmless one, else a fresh one."""
    for key, value in context.invocation_metadata() or ():
        if key == _REQUEST_ID_KEY and isinstance(value, str) and _REQUEST_ID.fullmatch(value):
            return value
    return secrets.token_hex(6)


def _internal(request_id: str) -> GloraError:
    return GloraError(
        Reason.INTERNAL,
        f"The server has met an error of its own; its log tells more under request {request_id}.",
        request=request_id,
    )
