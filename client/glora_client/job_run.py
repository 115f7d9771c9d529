"""Follows one job of the training process from the agent's side: passes progress on, keeps and sends the result."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Final

from glora.v1 import coordinator_pb2, coordinator_pb2_grpc, types_pb2
from glora_client.channel import Stopped
from glora_client.plan import AdapterUse, LocalPlan
from glora_client.process import TrainingProcess
from glora_client.protocol import Evaluated, Event, Failed, Finished, Job, Measured, Phase, Progressed, Trained
from glora_client.reporting import Reporter
from glora_client.sending import Sender
from glora_client.state import StateFolder, StoredEvaluation, StoredUpdate
from glora_client.view import View
from glora_wire.digests import algorithm_from_proto, digest_file

_PHASES: Final = {
    Phase.LOADING: coordinator_pb2.DEVICE_PHASE_LOADING,
    Phase.EVALUATING: coordinator_pb2.DEVICE_PHASE_EVALUATING,
    Phase.TRAINING: coordinator_pb2.DEVICE_PHASE_TRAINING,
}
_MEASURED: Final = {
    Measured.BEFORE: types_pb2.EVALUATION_PHASE_BEFORE,
    Measured.AFTER: types_pb2.EVALUATION_PHASE_AFTER,
    Measured.VERSION: types_pb2.EVALUATION_PHASE_VERSION,
}
_POLL_SECONDS: Final = 0.5
_MOVED_SECONDS: Final = 1.0
"""A deadline that moved less is the same deadline."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """An assignment that was taken on."""

    stub: coordinator_pb2_grpc.CoordinatorServiceStub
    assignment: types_pb2.Assignment
    plan: LocalPlan
    reporter: Reporter

    @property
    def trains(self) -> bool:
        """Whether it ends with an update."""
        return self.assignment.kind == types_pb2.ASSIGNMENT_KIND_TRAIN

    @property
    def title(self) -> str:
        """What people call it."""
        return f"Round {self.assignment.round_number} of {self.assignment.run_name}"


class JobRun:
    """One job, from its submission to its last event."""

    def __init__(
        self, task: Task, job: Job, *, state: StateFolder, process: TrainingProcess, sender: Sender, view: View
    ) -> None:
        self._task = task
        self._job = job
        self._state = state
        self._process = process
        self._sender = sender
        self._view = view
        self._measured: list[StoredEvaluation] = []
        self._sent = False
        self._cancelling = False
        left = task.reporter.seconds_left()
        self._reserve = 0.0 if left is None or job.seconds_left is None else left - job.seconds_left
        self._deadline = task.reporter.deadline

    def finish(self) -> None:
        """Do the job and send what it gave; returns as well when the work was cancelled.

        Raises Stopped, and GloraError when the job failed before there was anything to send.
        """
        self._process.submit(self._job)
        try:
            while not isinstance(event := self._process.next_event(self._job.number, _POLL_SECONDS), Finished):
                if isinstance(event, Failed):
                    self._failed(event)
                    return
                if event is not None:
                    self._take(event)
                self._listen()
        except Stopped:
            self._process.cancel(self._job.number)
            raise
        if not self._task.trains:
            self._sender.evaluations(self._task.stub, self._task.assignment.name, self._measured, complete=True)

    def _failed(self, event: Failed) -> None:
        if event.cancelled:
            return
        if not self._sent:
            raise event.as_error()
        self._view.line(f"{self._task.title}: the evaluation after training failed: {event.message}")

    def _listen(self) -> None:
        """Show that the device is there; hear whether the work is still wanted and, before it is sent, until when."""
        reporter = self._task.reporter
        reporter.keep_alive()
        if reporter.cancelled and not self._cancelling:
            self._cancelling = True
            self._process.cancel(self._job.number)
        if self._sent:
            return
        deadline = reporter.deadline
        if not math.isclose(deadline, self._deadline, abs_tol=_MOVED_SECONDS):
            self._deadline = deadline
            left = reporter.seconds_left()
            self._process.set_seconds_left(None if left is None else left - self._reserve)

    def _take(self, event: Event) -> None:
        match event:
            case Progressed(phase=phase, done=done, total=total, loss=loss):
                note = f"loss {loss:.3f}" if loss and math.isfinite(loss) else ""
                self._view.progress(phase.value, done, total, note)
                self._task.reporter.progress(_PHASES[phase], done, total, loss)
            case Evaluated():
                self._evaluated(event)
            case Trained():
                update = self._keep(event)
                self._sender.push(self._task.stub, update, reporter=self._task.reporter)
                self._sent = True
            case _:
                pass

    def _evaluated(self, event: Evaluated) -> None:
        task = self._task
        self._view.line(
            f"{task.title}: {event.measured} at rank {event.rank}: accuracy {event.accuracy:.3f}, "
            f"loss {event.loss:.3f} on {event.rows} rows."
        )
        item = StoredEvaluation(
            phase=_MEASURED[event.measured],
            rank=event.rank,
            loss=event.loss,
            accuracy=event.accuracy,
            rows=event.rows,
            seconds=event.seconds,
        )
        self._measured.append(item)
        if task.trains:
            self._sender.evaluations(task.stub, task.assignment.name, [item], complete=False)

    def _keep(self, event: Trained) -> StoredUpdate:
        """The update, safe on the disk before a byte of it is sent."""
        assignment = self._task.assignment
        main = next(item for item in self._job.adapters if item.use is AdapterUse.TRAIN)
        update = StoredUpdate(
            assignment=assignment.name,
            run_name=assignment.run_name,
            round_number=assignment.round_number,
            digest=digest_file(self._state.update_path, algorithm_from_proto(assignment.hash_algorithm)).text,
            adapter_config_json=_with_rank(main.config_json, event.rank or main.rank, main.rank),
            training_rows=event.rows,
            completed_steps=event.steps,
            stopped_early=event.stopped_early,
            training_loss=event.loss,
            training_seconds=event.seconds,
            max_chunk_bytes=assignment.max_chunk_bytes,
            evaluations=tuple(self._measured),
        )
        self._state.save_update(update)
        return update


def _with_rank(config_json: str, rank: int, granted: int) -> str:
    """The adapter_config of an adapter of `rank`; alpha follows, so that the scale stays."""
    if rank == granted:
        return config_json
    document = json.loads(config_json)
    document["lora_alpha"] = document["lora_alpha"] * rank / granted
    document["r"] = rank
    return json.dumps(document, indent=2, sort_keys=True)
