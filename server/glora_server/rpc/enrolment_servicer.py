"""EnrolmentService, once for each port: Enrol where no certificate is needed, RenewCertificate where one is."""

from __future__ import annotations

from typing import Never

import grpc
from typing_extensions import override

from glora.v1 import enrolment_pb2, enrolment_pb2_grpc
from glora_server.rpc import requests, responses
from glora_server.rpc.edge import Context, Edge, refuse
from glora_server.rpc.services import EnrolmentUseCases, PeerLimit
from glora_wire.errors import GloraError, Reason


class EnrolmentServicer(enrolment_pb2_grpc.EnrolmentServiceServicer):
    """On the enrolment port: devices that have no certificate yet."""

    def __init__(
        self, enrolment: EnrolmentUseCases, edge: Edge, limit: PeerLimit, *, public_host: str, public_port: int
    ) -> None:
        self._enrolment = enrolment
        self._edge = edge
        self._limit = limit
        self._public_host = public_host
        self._public_port = public_port

    @override
    async def Enrol(self, request: enrolment_pb2.EnrolRequest, context: Context) -> enrolment_pb2.EnrolResponse:
        """Turn a join token and a certificate request into a device."""
        async with self._edge.call(context, "Enrol"):
            peer = context.peer()
            self._limit.check(peer)
            record = await self._enrolment.enrol(requests.enrol_request(request), peer)
            return responses.enrolment(record, host=self._public_host, port=self._public_port)

    @override
    async def RenewCertificate(
        self, request: enrolment_pb2.RenewCertificateRequest, context: Context
    ) -> enrolment_pb2.RenewCertificateResponse:
        """Say where certificates are renewed."""
        async with self._edge.call(context, "RenewCertificate"):
            await _elsewhere(context, f"Certificates are renewed on the coordinator port ({self._public_port}).")


class RenewalServicer(enrolment_pb2_grpc.EnrolmentServiceServicer):
    """On the coordinator port: devices that have a certificate."""

    def __init__(self, enrolment: EnrolmentUseCases, edge: Edge) -> None:
        self._enrolment = enrolment
        self._edge = edge

    @override
    async def Enrol(self, request: enrolment_pb2.EnrolRequest, context: Context) -> enrolment_pb2.EnrolResponse:
        """Say where devices join."""
        async with self._edge.call(context, "Enrol"):
            await _elsewhere(context, "Devices join on the enrolment port (7444 where nothing else was set).")

    @override
    async def RenewCertificate(
        self, request: enrolment_pb2.RenewCertificateRequest, context: Context
    ) -> enrolment_pb2.RenewCertificateResponse:
        """A new certificate for the device that calls."""
        async with self._edge.device_call(context, "RenewCertificate") as device:
            return responses.renewal(await self._enrolment.renew(device, request.certificate_request_pem))


async def _elsewhere(context: Context, where: str) -> Never:
    error = GloraError(Reason.REQUEST_INVALID, f"This port does not serve the call. {where}")
    await refuse(context, error, grpc.StatusCode.UNIMPLEMENTED)
