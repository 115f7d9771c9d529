"""Tells the server where an assignment stands and hears whether it is still wanted, and until when."""

from __future__ import annotations

import math
import time
from typing import Final

from google.protobuf.timestamp_pb2 import Timestamp

from glora.v1 import coordinator_pb2, coordinator_pb2_grpc, types_pb2
from glora_client.channel import Stop, is_passing
from glora_wire.errors import GloraError

_REPORT_SECONDS: Final = 5.0
MIN_INTERVAL: Final = 1.0
"""Reports of progress are at least this far apart (seconds)."""
SILENCE: Final = 3.0
"""Without news a report is sent after this time anyway, to hear of a cancellation and a moved deadline."""
PHASE_INTERVAL: Final = 0.3
"""A new phase is told this long after the last word: nobody can see phases that are over sooner."""
_AT_ONCE: Final = frozenset({coordinator_pb2.DEVICE_PHASE_EVALUATING})
"""The server plans by these: who still measures is waited for."""


class Reporter:
    """One assignment's line to the server."""

    def __init__(
        self, stub: coordinator_pb2_grpc.CoordinatorServiceStub, stop: Stop, assignment: types_pb2.Assignment
    ) -> None:
        self._stub = stub
        self._stop = stop
        self._name = assignment.name
        self._last = -math.inf
        self._latest = coordinator_pb2.Progress()
        self._told = coordinator_pb2.Progress()
        self.deadline = math.inf
        """By this device's monotonic clock; infinite when there is none."""
        self.cancelled = False
        """The server does not want the work any more."""
        self.cancel_reason = ""
        self._take_deadline(assignment.deadline if assignment.HasField("deadline") else None, assignment.sent_at)

    def seconds_left(self) -> float | None:
        """Time to the deadline by the server's clock; None when there is none."""
        return None if math.isinf(self.deadline) else self.deadline - time.monotonic()

    def accept(self) -> None:
        """The device will do it. Raises Stopped and GloraError."""
        self._send(coordinator_pb2.ReportProgressRequest(assignment=self._name, accepted=coordinator_pb2.Accepted()))
        self._last = time.monotonic()

    def decline(self, error: GloraError, *, permanent: bool) -> None:
        """The device cannot do it. Raises Stopped and GloraError."""
        refusal = coordinator_pb2.Refusal(reason=error.reason.value, message=error.message, permanent=permanent)
        self._send(coordinator_pb2.ReportProgressRequest(assignment=self._name, declined=refusal))

    def fail(self, error: GloraError, *, permanent: bool) -> None:
        """The device began and could not finish. Raises Stopped and GloraError."""
        refusal = coordinator_pb2.Refusal(reason=error.reason.value, message=error.message, permanent=permanent)
        self._send(coordinator_pb2.ReportProgressRequest(assignment=self._name, failed=refusal))

    def progress(
        self, phase: coordinator_pb2.DevicePhase.ValueType, done: int = 0, total: int = 0, loss: float = 0.0
    ) -> None:
        """Note how far the work is and pass it on: a new phase soon, else once a second. Raises Stopped and GloraError.

        An unreachable server is no reason to stop working: then the next report tries again.
        """
        loss = loss if math.isfinite(loss) else 0.0
        new_phase = phase != self._latest.phase
        self._latest = coordinator_pb2.Progress(phase=phase, done=done, total=total, loss=loss)
        self.keep_alive(at_once=new_phase and phase in _AT_ONCE)

    def keep_alive(self, *, at_once: bool = False) -> None:
        """Send the latest progress when it is due. Raises Stopped and GloraError."""
        interval = self._interval()
        now = time.monotonic()
        if self._latest.phase == coordinator_pb2.DEVICE_PHASE_UNSPECIFIED or (
            now - self._last < interval and not at_once
        ):
            return
        self._last, self._told = now, self._latest
        try:
            self._send(coordinator_pb2.ReportProgressRequest(assignment=self._name, progress=self._latest))
        except GloraError as error:
            if not is_passing(error):
                raise

    def _interval(self) -> float:
        """Seconds between the last word and the next."""
        if self._latest.phase != self._told.phase:
            return PHASE_INTERVAL
        return MIN_INTERVAL if self._latest != self._told else SILENCE

    def _send(self, request: coordinator_pb2.ReportProgressRequest) -> None:
        call = self._stub.ReportProgress.future(request, timeout=_REPORT_SECONDS)
        with self._stop.ending(call):
            answer = call.result()
        self._take_deadline(answer.deadline if answer.HasField("deadline") else None, answer.sent_at)
        if answer.cancelled:
            self.cancelled, self.cancel_reason = True, answer.reason

    def _take_deadline(self, deadline: Timestamp | None, sent_at: Timestamp) -> None:
        # Both times are the server's, so a wrong clock on the device does not matter.
        if deadline is not None:
            self.deadline = time.monotonic() + (deadline.ToNanoseconds() - sent_at.ToNanoseconds()) / 1e9
