"""What counts: the observer that the use cases and the edges report to, and the page that Prometheus scrapes."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Final

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.types import ASGIApp

from glora.v1 import coordinator_pb2, enrolment_pb2
from glora_server.coordinator.history import stage_seconds
from glora_server.coordinator.hub import Hub
from glora_server.coordinator.observer import SignIn
from glora_server.coordinator.views_history import Stage
from glora_server.rounds.assignment import OPEN, Assignment, AssignmentPhase
from glora_server.rounds.ids import AssignmentId
from glora_server.rounds.round import LIVE, Round, RoundPhase
from glora_server.telemetry import names
from glora_server.telemetry.instruments import Instruments
from glora_server.telemetry.sampling import Sampler, Watched
from glora_server.telemetry.web import WebMetrics
from glora_wire.errors import Refusal

_METHODS = tuple(
    method.name
    for file, service in ((coordinator_pb2, "CoordinatorService"), (enrolment_pb2, "EnrolmentService"))
    for method in file.DESCRIPTOR.services_by_name[service].methods
)
_STEPS: Final = {
    Stage.ACCEPTING: "accept",
    Stage.DOWNLOADING: "download",
    Stage.TRAINING: "train",
    Stage.UPLOADING: "upload",
    Stage.JUDGING: "validate",
}
_JUDGED: Final = frozenset({AssignmentPhase.ACCEPTED_UPDATE, AssignmentPhase.REJECTED})


class Metrics:
    """The metrics of a server; must be quick and must not fail, for nobody waits for it."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry if registry is not None else CollectorRegistry()
        self.hub: Hub | None = None
        """Told the bytes of each assignment, for the live views."""
        made = self._instruments = Instruments(self.registry)
        self._rpc = made.counter(names.RPC_REQUESTS)
        self._rpc_seconds = made.histogram(names.RPC_SECONDS)
        self._sent = made.counter(names.SENT_BYTES).labels(kind="adapter")
        self._received = made.counter(names.RECEIVED_BYTES).labels(kind="update")
        self._sign_ins = made.counter(names.SIGN_INS)
        self._rounds = made.counter(names.ROUNDS)
        self._assignments = made.counter(names.ASSIGNMENTS)
        self._uploads = made.counter(names.UPLOADS)
        self._phase_seconds = made.histogram(names.PHASE_SECONDS)
        self._begin_at_zero()
        made.info(names.BUILD).info({"version": _installed_version()})
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)

    def _begin_at_zero(self) -> None:
        """Show what can be foreseen before it happens: a rate sees no first event of a series that was not there."""
        for method in _METHODS:
            for code in ("OK", "INTERNAL"):
                self._rpc.labels(method=method, code=code)
            self._rpc_seconds.labels(method=method)
        for outcome in SignIn:
            self._sign_ins.labels(outcome=outcome.value)
        for ended in RoundPhase:
            if ended not in LIVE:
                self._rounds.labels(outcome=ended.value)
        for phase in AssignmentPhase:
            if phase not in OPEN and phase is not AssignmentPhase.COMPLETED:
                self._assignments.labels(outcome=phase.value, reason="")
        for judged in ("accepted", "rejected", "discarded"):
            self._uploads.labels(outcome=judged, reason="")
        for operation in ("read", "write"):
            for kind in ("full", "lost", "busy", "other"):
                self._instruments.counter(names.DATABASE_ERRORS).labels(operation=operation, kind=kind)
        for step in (*_STEPS.values(), "aggregate", "commit"):
            self._phase_seconds.labels(phase=step)

    def text(self) -> tuple[bytes, str]:
        """What a scrape gets, and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST

    def web(self, app: ASGIApp) -> ASGIApp:
        """The application, its requests and websockets counted."""
        return WebMetrics(app, self._instruments)

    async def watch(self, watched: Watched) -> None:
        """Sample what is a state and no event, until cancelled."""
        await Sampler(self._instruments, watched).run()

    # the gRPC edge

    def rpc_finished(self, *, method: str, code: str, seconds: float) -> None:
        """A call ended with the status code of that name."""
        self._rpc.labels(method=method, code=code).inc()
        self._rpc_seconds.labels(method=method).observe(seconds)

    def transferred(self, assignment_id: AssignmentId, *, down: int = 0, up: int = 0) -> None:
        """Payload bytes of an assignment went to (`down`) or came from (`up`) a device."""
        self._sent.inc(down)
        self._received.inc(up)
        if self.hub is not None:
            self.hub.moved(assignment_id, down=down, up=up)

    # the coordinator

    def round_moved(self, before: Round, after: Round) -> None:
        """A round took a step."""
        known = {assignment.id: assignment for assignment in before.assignments}
        for assignment in after.assignments:
            if (was := known.get(assignment.id)) is not None and was is not assignment:
                self._assignment_moved(was, assignment)
        if before.phase in LIVE and after.phase not in LIVE:
            self._rounds.labels(outcome=after.phase.value).inc()
            if after.phase is RoundPhase.COMMITTED and after.opened_at is not None and after.closed_at is not None:
                self._instruments.histogram(names.ROUND_SECONDS).observe(max(0.0, after.closed_at - after.opened_at))

    def _assignment_moved(self, was: Assignment, now: Assignment) -> None:
        for phase, seconds in _phases_ended(was, now):
            self._phase_seconds.labels(phase=phase).observe(seconds)
        if was.phase not in OPEN or now.phase in OPEN:
            return
        reason = now.reason.value if now.reason else ""
        self._assignments.labels(outcome=now.phase.value, reason=reason).inc()
        if was.phase is AssignmentPhase.RECEIVED and now.phase is AssignmentPhase.EXPIRED:
            self._uploads.labels(outcome="discarded", reason=reason).inc()

    def upload_judged(self, refusal: Refusal | None) -> None:
        """An update was accepted (None) or rejected."""
        outcome = "accepted" if refusal is None else "rejected"
        self._uploads.labels(outcome=outcome, reason=refusal.reason.value if refusal else "").inc()

    def aggregated(
        self,
        *,
        seconds: float,
        commit_seconds: float,
        updates: int,  # noqa: ARG002 - counted as uploads already
    ) -> None:
        """A round was folded into a new version."""
        self._instruments.histogram(names.AGGREGATION_SECONDS).observe(seconds)
        self._phase_seconds.labels(phase="aggregate").observe(max(0.0, seconds - commit_seconds))
        self._phase_seconds.labels(phase="commit").observe(commit_seconds)
        self._instruments.counter(names.VERSIONS).inc()

    def signed_in(self, outcome: SignIn) -> None:
        """Somebody tried to sign in."""
        self._sign_ins.labels(outcome=outcome.value).inc()

    # the store; called in its threads

    def committed(self, *, seconds: float) -> None:
        """A transaction that changed something took so long, from begin to commit."""
        self._instruments.histogram(names.COMMIT_SECONDS).observe(seconds)

    def failed(self, *, operation: str, kind: str) -> None:
        """The database itself failed."""
        self._instruments.counter(names.DATABASE_ERRORS).labels(operation=operation, kind=kind).inc()


def _phases_ended(was: Assignment, now: Assignment) -> Iterator[tuple[str, float]]:
    """Steps that ended between two states of an assignment, and how long each took."""
    known = stage_seconds(was)
    for stage, seconds in stage_seconds(now).items():
        # What was not judged before its round ended is closed all the same.
        if stage not in known and (stage is not Stage.JUDGING or now.phase in _JUDGED):
            yield _STEPS[stage], seconds


def _installed_version() -> str:
    try:
        return version("glora")
    except PackageNotFoundError:
        return "unknown"
