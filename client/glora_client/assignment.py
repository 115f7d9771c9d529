"""Does one assignment: check, accept, pull, train or evaluate, keep the result safe, send it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from glora.v1 import coordinator_pb2, coordinator_pb2_grpc, types_pb2
from glora_client.channel import Stop
from glora_client.data import rows_of
from glora_client.job_run import JobRun, Task
from glora_client.plan import DeliveredAdapter, LocalPlan, plan_from_proto, use_from_proto
from glora_client.process import TrainingProcess
from glora_client.protocol import Job, JobKind
from glora_client.reporting import Reporter
from glora_client.retry import SESSION_ENDS, Persistence
from glora_client.sending import OVER, Sender
from glora_client.state import Identity, StateFolder
from glora_client.transfers import PulledAdapter, file_name, pull_adapter
from glora_client.view import View
from glora_wire.errors import GloraError, Reason
from glora_wire.manifest import Manifest

_PERMANENT: Final = frozenset(
    {
        Reason.BASE_MODEL_MISMATCH,
        Reason.BASE_MODEL_MISSING,
        Reason.UNKNOWN_LABEL,
        Reason.DATA_INVALID,
        Reason.DATA_EMPTY,
        Reason.NO_TRAINING_DATA,
        Reason.CONFIG_INVALID,
        Reason.MANIFEST_INVALID,
    }
)
_UPLOAD_SECONDS: Final = 1.0
_MAX_RESERVE: Final = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalWork:
    """What this device works with: the model's folder and fingerprint, and its data."""

    model: Path
    fingerprint: str
    data: str | None
    evaluation_data: str | None


class Worker:
    """Does assignments one after the other."""

    def __init__(
        self,
        *,
        state: StateFolder,
        identity: Identity,
        local: LocalWork,
        process: TrainingProcess,
        persistence: Persistence,
        sender: Sender,
        view: View,
        stop: Stop,
    ) -> None:
        self._state = state
        self._identity = identity
        self._local = local
        self._process = process
        self._persistence = persistence
        self._sender = sender
        self._view = view
        self._stop = stop
        self._checked: set[tuple[str, bool]] = set()

    def do(self, stub: coordinator_pb2_grpc.CoordinatorServiceStub, assignment: types_pb2.Assignment) -> None:
        """Do the assignment; however it ends, the server hears of it. Raises Stopped and GloraError."""
        reporter = Reporter(stub, self._stop, assignment)
        try:
            plan = self._decide(assignment, reporter)
            if plan is not None:
                self._work(Task(stub=stub, assignment=assignment, plan=plan, reporter=reporter))
        except GloraError as error:
            if error.reason not in OVER:
                raise
            self._view.line(f"{assignment.run_name} went on without this device: {error.message}")
            self._state.drop_update()
        finally:
            self._view.rest()

    def _decide(self, assignment: types_pb2.Assignment, reporter: Reporter) -> LocalPlan | None:
        """The plan of an assignment that was accepted; None when it was declined or is not wanted any more."""
        try:
            plan = plan_from_proto(assignment.plan)
            self._check(assignment, plan)
        except GloraError as error:
            self._view.line(f"Declined work for {assignment.run_name}: {error.message}")
            refusal = error
            self._persistence.call(lambda: reporter.decline(refusal, permanent=True))
            return None
        self._persistence.call(reporter.accept)
        return None if reporter.cancelled else plan

    def _check(self, assignment: types_pb2.Assignment, plan: LocalPlan) -> None:
        """Return when this device can do the assignment; raises GloraError for what speaks against it."""
        manifest = Manifest.from_json(assignment.manifest_json)
        local = self._local
        if manifest.base_model_fingerprint != local.fingerprint:
            raise GloraError(
                Reason.BASE_MODEL_MISMATCH,
                f"The run {assignment.run_name} trains {manifest.base_model_name} (fingerprint "
                f"{manifest.base_model_fingerprint[:12]}), but this device was started with {local.model} (fingerprint "
                f"{local.fingerprint[:12]}); start it with --model and the run's base model.",
            )
        trains = assignment.kind == types_pb2.ASSIGNMENT_KIND_TRAIN
        needed = local.data if trains else local.evaluation_data
        if needed is None:
            option = "--data" if trains else "--eval-data"
            raise GloraError(
                Reason.NO_TRAINING_DATA, f"This device was started without {option}, which the work needs."
            )
        if (manifest.digest, trains) not in self._checked:
            for source in {needed, local.evaluation_data}:
                rows_of(source, task=plan.task, labels=manifest.labels)
            self._checked.add((manifest.digest, trains))

    def _work(self, task: Task) -> None:
        what = f"training at rank {task.plan.rank}" if task.trains else "evaluating"
        self._view.line(f"{task.title}: {what}.")
        try:
            started = time.monotonic()
            adapters = self._pull(task)
            if not task.reporter.cancelled:
                job = self._job(task, adapters, transfer_seconds=time.monotonic() - started)
                JobRun(
                    task, job, state=self._state, process=self._process, sender=self._sender, view=self._view
                ).finish()
            if task.reporter.cancelled:
                self._view.line(f"{task.title} is not wanted any more ({task.reporter.cancel_reason or 'no reason'}).")
        except GloraError as error:
            if error.reason in OVER or error.reason in SESSION_ENDS:
                raise
            self._view.line(f"{task.title} failed: {error.message}")
            self._state.drop_update()
            failure = error
            self._persistence.call(lambda: task.reporter.fail(failure, permanent=failure.reason in _PERMANENT))

    def _pull(self, task: Task) -> tuple[DeliveredAdapter, ...]:
        """Every adapter of the assignment; fewer when the work was cancelled meanwhile."""
        assignment, reporter = task.assignment, task.reporter
        self._state.prune(file_name(assignment.name))

        def progress(done: int, total: int) -> None:
            self._view.progress("downloading", done, total)
            reporter.progress(coordinator_pb2.DEVICE_PHASE_DOWNLOADING, done, total)

        def pull(key: str) -> Callable[[], PulledAdapter]:
            return lambda: pull_adapter(
                task.stub,
                self._state,
                self._stop,
                assignment=assignment.name,
                adapter_key=key,
                max_chunk_bytes=assignment.max_chunk_bytes,
                progress=progress,
            )

        adapters: list[DeliveredAdapter] = []
        for reference in assignment.adapters:
            if reporter.cancelled:
                break
            use = use_from_proto(reference.use)
            pulled = self._persistence.call(pull(reference.key))
            adapters.append(
                DeliveredAdapter(path=pulled.path, config_json=pulled.config_json, use=use, rank=reference.rank)
            )
        return tuple(adapters)

    def _job(self, task: Task, adapters: tuple[DeliveredAdapter, ...], *, transfer_seconds: float) -> Job:
        return Job(
            number=self._process.next_number(),
            kind=JobKind.TRAIN if task.trains else JobKind.EVALUATE,
            model=str(self._local.model),
            manifest_json=task.assignment.manifest_json,
            plan=task.plan,
            adapters=adapters,
            data=self._local.data,
            evaluation_data=self._local.evaluation_data,
            out=self._state.update_path if task.trains else None,
            seconds_left=_training_seconds(task.reporter, transfer_seconds),
            device=self._identity.device,
            round_number=task.assignment.round_number,
        )


def _training_seconds(reporter: Reporter, transfer_seconds: float) -> float | None:
    """Time for the job (None: no deadline): what is left, less about twice what the download took for the upload."""
    left = reporter.seconds_left()
    if left is None:
        return None
    return left - min(_UPLOAD_SECONDS + 2.0 * transfer_seconds, _MAX_RESERVE * max(left, 0.0))
