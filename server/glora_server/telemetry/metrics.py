"""Every metric of the server, each defined once.

Names are `glora_<thing>_<unit>` in base units; labels are always present and have few values: methods, codes,
phases and reasons, never a device, a run or an assignment.
"""

from __future__ import annotations

import math
from importlib.metadata import PackageNotFoundError, version
from typing import Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from glora.v1 import coordinator_pb2, enrolment_pb2
from glora_server.coordinator.hub import Hub
from glora_server.coordinator.model import DeviceState
from glora_server.coordinator.observer import Quality
from glora_server.rounds.assignment import OPEN, AssignmentPhase
from glora_server.rounds.ids import AssignmentId
from glora_server.rounds.round import LIVE, Round, RoundPhase
from glora_server.telemetry.sampling import Samples, Watched, sample_for_ever
from glora_wire.errors import Refusal

_RPC_SECONDS: Final = (0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 30.0, 60.0, 300.0, 1800.0)
_LONG_SECONDS: Final = (1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14400.0, 86400.0)
_WORK_SECONDS: Final = (0.05, 0.2, 0.5, 1.0, 2.0, 5.0, 15.0, 60.0, 300.0, 1800.0)
_LAG_SECONDS: Final = (0.001, 0.005, 0.02, 0.05, 0.1, 0.25, 1.0, 5.0)

_METHODS: Final = tuple(
    method.name
    for file, service in ((coordinator_pb2, "CoordinatorService"), (enrolment_pb2, "EnrolmentService"))
    for method in file.DESCRIPTOR.services_by_name[service].methods
)

METRIC_NAMES: Final = (
    "glora_rpc_requests_total",
    "glora_rpc_seconds",
    "glora_sent_bytes_total",
    "glora_received_bytes_total",
    "glora_uploads_total",
    "glora_assignments_total",
    "glora_rounds_total",
    "glora_round_seconds",
    "glora_aggregation_seconds",
    "glora_versions_total",
    "glora_captured_energy_ratio",
    "glora_truncation_error_ratio",
    "glora_eigengap_ratio",
    "glora_consensus_ratio",
    "glora_active_rounds",
    "glora_devices",
    "glora_online_devices",
    "glora_worker_peak_bytes",
    "glora_worker_restarts_total",
    "glora_event_loop_lag_seconds",
    "glora_build_info",
)
"""What a scrape shows, beside the usual process_* and python_info."""


class Metrics:
    """The metrics, and the observer that the use cases and the gRPC edge report to."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        # One series of every two would only say when the server was started.
        disable_created_metrics()  # type: ignore[no-untyped-call]  # prometheus_client does not annotate it
        self.registry = registry if registry is not None else CollectorRegistry()
        self.hub: Hub | None = None
        """Told the bytes of each assignment, for the live views."""
        self._define_traffic(self.registry)
        self._define_rounds(self.registry)
        self._define_states(self.registry)
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)

    def _define_traffic(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "glora_rpc_requests", "Calls that ended, by gRPC status code.", ("method", "code"), registry=registry
        )
        self._rpc_seconds = Histogram(
            "glora_rpc_seconds",
            "Duration of calls; WaitForWork waits on purpose.",
            ("method",),
            buckets=_RPC_SECONDS,
            registry=registry,
        )
        for method in _METHODS:
            self._requests.labels(method=method, code="OK")
            self._rpc_seconds.labels(method=method)
        self._sent = Counter(
            "glora_sent_bytes", "Payload bytes that went to devices.", ("kind",), registry=registry
        ).labels(kind="adapter")
        self._received = Counter(
            "glora_received_bytes", "Payload bytes that came from devices.", ("kind",), registry=registry
        ).labels(kind="update")

    def _define_rounds(self, registry: CollectorRegistry) -> None:
        self._uploads = Counter(
            "glora_uploads",
            "Whole updates by what became of them: accepted, rejected, discarded; reason is empty for accepted.",
            ("outcome", "reason"),
            registry=registry,
        )
        self._uploads.labels(outcome="accepted", reason="")
        self._assignments = Counter(
            "glora_assignments", "Training assignments that ended, by how.", ("outcome",), registry=registry
        )
        for phase in AssignmentPhase:
            if phase not in OPEN and phase is not AssignmentPhase.COMPLETED:
                self._assignments.labels(outcome=phase.value)
        self._rounds = Counter("glora_rounds", "Rounds that ended, by how.", ("outcome",), registry=registry)
        for ended in RoundPhase:
            if ended not in LIVE:
                self._rounds.labels(outcome=ended.value)
        self._round_seconds = Histogram(
            "glora_round_seconds",
            "From the opening of a committed round to its end.",
            buckets=_LONG_SECONDS,
            registry=registry,
        )
        self._aggregation_seconds = Histogram(
            "glora_aggregation_seconds",
            "Folding the updates of one round into a new version.",
            buckets=_WORK_SECONDS,
            registry=registry,
        )
        self._versions = Counter("glora_versions", "Versions that were published.", registry=registry)
        self._define_quality(registry)

    def _define_quality(self, registry: CollectorRegistry) -> None:
        """Of the last published version, whichever run it belongs to; by module and device in the database."""

        def gauge(name: str, meaning: str) -> Gauge:
            made = Gauge(name, f"{meaning}; mean over modules, last version.", registry=registry)
            made.set(math.nan)  # nothing was measured yet, which is not zero
            return made

        self._captured_energy = gauge("glora_captured_energy_ratio", "Energy of the mean update that the state kept")
        self._truncation_error = gauge(
            "glora_truncation_error_ratio", "Distance of the state from the mean update, relative to its norm"
        )
        self._eigengap = gauge(
            "glora_eigengap_ratio", "Eigengap at the server's rank, relative to the largest eigenvalue"
        )
        self._consensus = gauge(
            "glora_consensus_ratio", "Cosine between a device's change and the mean change, by weight"
        )

    def _define_states(self, registry: CollectorRegistry) -> None:
        devices = Gauge(
            "glora_devices", "Enrolled devices by state, revoked ones aside.", ("state",), registry=registry
        )
        for state in DeviceState:
            if state is not DeviceState.REVOKED:
                devices.labels(state=state.value)
        self._samples = Samples(
            active_rounds=Gauge("glora_active_rounds", "Rounds that have not ended.", registry=registry),
            devices=devices,
            online_devices=Gauge(
                "glora_online_devices", "Devices that were heard of within the last minute.", registry=registry
            ),
            worker_peak_bytes=Gauge(
                "glora_worker_peak_bytes", "Largest resident size of the aggregation worker.", registry=registry
            ),
            worker_restarts=Counter(
                "glora_worker_restarts", "Times that the aggregation worker had to be started anew.", registry=registry
            ),
            loop_lag=Histogram(
                "glora_event_loop_lag_seconds",
                "How late the event loop wakes what asked to be woken.",
                buckets=_LAG_SECONDS,
                registry=registry,
            ),
        )
        Info("glora_build", "Version of the server.", registry=registry).info({"version": _installed_version()})

    def text(self) -> tuple[bytes, str]:
        """What a scrape gets, and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST

    async def watch(self, watched: Watched) -> None:
        """Sample what is a state and no event, until cancelled."""
        await sample_for_ever(self._samples, watched)

    def rpc_finished(self, *, method: str, code: str, seconds: float) -> None:
        """A call ended with the status code of that name."""
        self._requests.labels(method=method, code=code).inc()
        self._rpc_seconds.labels(method=method).observe(seconds)

    def transferred(self, assignment_id: AssignmentId, *, down: int = 0, up: int = 0) -> None:
        """Payload bytes of an assignment went to (`down`) or came from (`up`) a device."""
        self._sent.inc(down)
        self._received.inc(up)
        if self.hub is not None:
            self.hub.moved(assignment_id, down=down, up=up)

    def round_moved(self, before: Round, after: Round) -> None:
        """A round took a step."""
        phases = {assignment.id: assignment.phase for assignment in before.assignments}
        for assignment in after.assignments:
            was = phases.get(assignment.id, AssignmentPhase.OFFERED)
            if was in OPEN and assignment.phase not in OPEN:
                self._assignments.labels(outcome=assignment.phase.value).inc()
                if was is AssignmentPhase.RECEIVED and assignment.phase is AssignmentPhase.EXPIRED:
                    reason = assignment.reason.value if assignment.reason else ""
                    self._uploads.labels(outcome="discarded", reason=reason).inc()
        if before.phase in LIVE and after.phase not in LIVE:
            self._rounds.labels(outcome=after.phase.value).inc()
            if after.phase is RoundPhase.COMMITTED and after.opened_at is not None and after.closed_at is not None:
                self._round_seconds.observe(max(0.0, after.closed_at - after.opened_at))

    def upload_judged(self, refusal: Refusal | None) -> None:
        """An update was accepted (None) or rejected."""
        if refusal is None:
            self._uploads.labels(outcome="accepted", reason="").inc()
        else:
            self._uploads.labels(outcome="rejected", reason=refusal.reason.value).inc()

    def aggregated(
        self,
        *,
        seconds: float,
        updates: int,  # noqa: ARG002 - counted as uploads already
        quality: Quality,
    ) -> None:
        """A round was folded into a new version."""
        self._aggregation_seconds.observe(seconds)
        self._versions.inc()
        self._captured_energy.set(quality.captured_energy)
        self._truncation_error.set(quality.truncation_error)
        self._eigengap.set(quality.eigengap)
        self._consensus.set(quality.consensus)


def metric_table() -> str:
    """All metrics as a table in Markdown, for ARCHITECTURE.md."""
    metrics = Metrics()
    rows = ["| metric | kind | labels | meaning |", "|---|---|---|---|"]
    families = {family.name: family for family in metrics.registry.collect()}
    for name in METRIC_NAMES:
        family = families[name.removesuffix("_total").removesuffix("_info")]
        labels = sorted({label for sample in family.samples for label in sample.labels} - {"le"})
        rows.append(f"| `{name}` | {family.type} | {', '.join(labels)} | {family.documentation} |")
    return "\n".join(rows)


def _installed_version() -> str:
    try:
        return version("glora")
    except PackageNotFoundError:
        return "unknown"
