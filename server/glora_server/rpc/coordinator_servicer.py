"""CoordinatorService: parse, call, map the error; a method holds no decision."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final

import grpc
import grpc.aio
from typing_extensions import override

from glora.v1 import coordinator_pb2, coordinator_pb2_grpc
from glora_server.coordinator.messages import ProgressAnswer, UploadHeader, UploadStatus
from glora_server.coordinator.model import Device
from glora_server.rounds.ids import AssignmentId
from glora_server.rpc import requests, responses
from glora_server.rpc.edge import Context, Edge
from glora_server.rpc.polls import Polls
from glora_server.rpc.services import RpcObserver, RpcSettings, UseCases
from glora_server.rpc.transfers import Download, Guard, Incoming, Part
from glora_wire.chunks import pack_part, unpacker

SERVICE: Final = coordinator_pb2.DESCRIPTOR.services_by_name["CoordinatorService"].full_name
_READERS: Final = 4
_ANSWER_SECONDS: Final = 1.0
"""Kept of a caller's deadline for the answer to a long poll."""


def register(servicer: CoordinatorServicer, server: grpc.aio.Server) -> None:
    """Let the server answer with the servicer; what carries payloads is read and written without protobuf."""
    coordinator_pb2_grpc.add_CoordinatorServiceServicer_to_server(servicer, server)
    transfers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "PullAdapter": grpc.unary_stream_rpc_method_handler(
            servicer.PullAdapter,
            request_deserializer=coordinator_pb2.PullAdapterRequest.FromString,
            response_serializer=pack_part,
        ),
        "PushUpdate": grpc.stream_unary_rpc_method_handler(
            servicer.PushUpdate,
            request_deserializer=unpacker(coordinator_pb2.PushUpdateRequest),
            response_serializer=coordinator_pb2.PushUpdateResponse.SerializeToString,
        ),
    }
    # Of two handlers of one method that were registered, the last one stays.
    server.add_registered_method_handlers(SERVICE, transfers)


class CoordinatorServicer(coordinator_pb2_grpc.CoordinatorServiceServicer):
    """What devices call during rounds, over mutual TLS."""

    def __init__(
        self, use_cases: UseCases, edge: Edge, polls: Polls, *, settings: RpcSettings, observer: RpcObserver
    ) -> None:
        self._devices = use_cases.devices
        self._uploads = use_cases.uploads
        self._edge = edge
        self._polls = polls
        self._settings = settings
        self._observer = observer
        # Of its own, so that slow disks do not hold up what else the process does in threads.
        self._reading = ThreadPoolExecutor(_READERS, thread_name_prefix="adapter-reader")

    def close(self) -> None:
        """End the reader threads."""
        self._reading.shutdown(wait=False)

    @override
    async def WaitForWork(
        self, request: coordinator_pb2.WaitForWorkRequest, context: Context
    ) -> coordinator_pb2.WaitForWorkResponse:
        """Work, or nothing after a while."""
        async with self._edge.device_call(context, "WaitForWork") as device:
            profile = requests.profile(request.profile)
            timeout = self._poll_seconds(context)
            answer = await self._polls.run(self._devices.wait_for_work(device, profile, timeout=timeout))
            if answer.offer is not None:
                # Half a minute has passed, in which the device may have been revoked.
                await self._edge.identify(context)
            return responses.work(answer, time.time())

    # The generated signature wants an async generator; a coroutine that writes is cancelled where it stands, so that
    # the file is closed at once when the device goes away.
    @override
    async def PullAdapter(  # type: ignore[override]
        self, request: coordinator_pb2.PullAdapterRequest, context: Context
    ) -> None:
        """Stream an adapter."""
        async with self._edge.device_call(context, "PullAdapter") as device:
            assignment_id, key, offset, digest = requests.pull_request(request)
            adapter = await self._devices.open_adapter(device, assignment_id, key=key, offset=offset, digest=digest)
            async with adapter:
                download = Download(
                    context,
                    Guard(self._edge, context),
                    reading=self._reading,
                    stall_seconds=self._settings.stall_seconds,
                )
                await download.send(adapter, offset, partial(self._count_down, assignment_id))
            await self._devices.delivered(device, assignment_id, key)

    @override
    async def QueryUpload(
        self, request: coordinator_pb2.QueryUploadRequest, context: Context
    ) -> coordinator_pb2.QueryUploadResponse:
        """How much of an update has arrived."""
        async with self._edge.device_call(context, "QueryUpload") as device:
            assignment_id, digest = requests.query_request(request)
            return responses.upload_query(await self._uploads.query(device, assignment_id, digest))

    @override
    async def PushUpdate(
        self, request_iterator: AsyncIterator[Part], context: Context
    ) -> coordinator_pb2.PushUpdateResponse:
        """Take an update."""
        async with self._edge.device_call(context, "PushUpdate") as device:
            guard = Guard(self._edge, context)
            incoming = Incoming(aiter(request_iterator), guard, stall_seconds=self._settings.stall_seconds)
            assignment_id, header = requests.upload_header(await incoming.header())
            return responses.upload_verdict(await self._receive(device, assignment_id, header, incoming))

    @override
    async def ReportProgress(
        self, request: coordinator_pb2.ReportProgressRequest, context: Context
    ) -> coordinator_pb2.ReportProgressResponse:
        """Note where the device stands."""
        async with self._edge.device_call(context, "ReportProgress") as device:
            return responses.progress(await self._report(device, request), time.time())

    @override
    async def ReportMetrics(
        self, request: coordinator_pb2.ReportMetricsRequest, context: Context
    ) -> coordinator_pb2.ReportMetricsResponse:
        """Store evaluations."""
        async with self._edge.device_call(context, "ReportMetrics") as device:
            assignment_id = requests.assignment_id(request.assignment)
            evaluations = requests.evaluations(request.evaluations)
            await self._devices.measured(device, assignment_id, evaluations, complete=request.complete)
            return coordinator_pb2.ReportMetricsResponse()

    def _poll_seconds(self, context: Context) -> float:
        """How long a poll may wait: a random time, which spreads load, and not until the caller's deadline."""
        settings = self._settings
        seconds = random.uniform(settings.poll_min_seconds, settings.poll_max_seconds)  # noqa: S311 - no secret
        left: float | None = context.time_remaining()
        return seconds if left is None else max(0.0, min(seconds, left - _ANSWER_SECONDS))

    async def _report(self, device: Device, request: coordinator_pb2.ReportProgressRequest) -> ProgressAnswer:
        assignment_id = requests.assignment_id(request.assignment)
        match request.WhichOneof("report"):
            case "accepted":
                return await self._devices.accepted(device, assignment_id)
            case "progress":
                phase, done, total, loss = requests.progress(request.progress)
                return await self._devices.progress(
                    device, assignment_id, phase=phase, done=done, total=total, loss=loss
                )
            case "declined":
                refusal, permanent = requests.refusal(request.declined), request.declined.permanent
                return await self._devices.declined(device, assignment_id, refusal, permanent=permanent)
            case "failed":
                refusal, permanent = requests.refusal(request.failed), request.failed.permanent
                return await self._devices.failed(device, assignment_id, refusal, permanent=permanent)
            case _:
                raise requests.invalid("it reports nothing that this server knows", field="report")

    async def _receive(
        self, device: Device, assignment_id: AssignmentId, header: UploadHeader, incoming: Incoming
    ) -> UploadStatus:
        outcome = await self._uploads.open(device, assignment_id, header)
        if isinstance(outcome, UploadStatus):
            return outcome
        try:
            return await incoming.receive(header, outcome, partial(self._count_up, assignment_id))
        finally:
            # A second cancellation must not keep the session from being closed.
            await asyncio.shield(outcome.close())

    def _count_down(self, assignment_id: AssignmentId, length: int) -> None:
        self._observer.transferred(assignment_id, down=length)

    def _count_up(self, assignment_id: AssignmentId, length: int) -> None:
        self._observer.transferred(assignment_id, up=length)
