"""Sends what was trained and measured; keeps the update on the disk until its fate is known."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import Final

from glora.v1 import coordinator_pb2, coordinator_pb2_grpc, types_pb2
from glora_client.channel import Stop, is_passing
from glora_client.reporting import Reporter
from glora_client.retry import SESSION_ENDS, Persistence
from glora_client.state import StateFolder, StoredEvaluation, StoredUpdate
from glora_client.transfers import Verdict, push_update, query_upload, report_evaluations
from glora_client.view import View
from glora_wire.errors import GloraError, Reason

OVER: Final = frozenset({Reason.ASSIGNMENT_CLOSED, Reason.ASSIGNMENT_UNKNOWN, Reason.UPLOAD_CONFLICT})
"""The assignment is not the device's any more: drop it and ask for other work."""
_VERDICT_SECONDS: Final = 1.0
_VERDICT_QUESTIONS: Final = 30


class Sender:
    """Pushes stored updates and reports evaluations."""

    def __init__(self, *, state: StateFolder, persistence: Persistence, view: View, stop: Stop) -> None:
        self._state = state
        self._persistence = persistence
        self._view = view
        self._stop = stop

    def finish_stored(self, stub: coordinator_pb2_grpc.CoordinatorServiceStub) -> str | None:
        """Send the update that an earlier life of the client trained; the name of its run, None when there is none.

        Raises Stopped, and GloraError for what ends the session.
        """
        update = self._state.update()
        if update is None:
            self._state.drop_update()
            return None
        self._view.line(f"An update for round {update.round_number} of {update.run_name} waits; sending it.")
        try:
            self.evaluations(stub, update.assignment, update.evaluations, complete=False)
            self.push(stub, update, reporter=None)
        except GloraError as error:
            if error.reason in SESSION_ENDS:
                raise
            self._view.line(f"It is not wanted any more: {error.message}")
            self._state.drop_update()
        return update.run_name

    def push(
        self, stub: coordinator_pb2_grpc.CoordinatorServiceStub, update: StoredUpdate, *, reporter: Reporter | None
    ) -> None:
        """Send the update until the server has all of it, tell its fate, forget it. Raises Stopped and GloraError.

        `reporter`: of the assignment for which it was trained just now; None: what of it was sent before is not known.
        """
        attempts = itertools.count()

        def progress(done: int, total: int) -> None:
            # Called from grpc's own thread: only the view is touched here.
            self._view.progress("uploading", done, total)

        if reporter is not None:
            reporter.progress(coordinator_pb2.DEVICE_PHASE_UPLOADING)
        started = time.monotonic()

        def attempt() -> Verdict:
            fresh = next(attempts) == 0 and reporter is not None
            return push_update(stub, self._state, self._stop, update, progress=progress, fresh=fresh)

        verdict = self._persistence.call(attempt)
        if verdict.state == coordinator_pb2.UPLOAD_STATE_RECEIVED:
            verdict = self._await_verdict(stub, update)
        self._view.rest()
        self._view.line(
            f"Round {update.round_number} of {update.run_name}: {_fate(verdict)}"
            f" ({self._state.update_path.stat().st_size / 1e6:.1f} MB,"
            f" {time.monotonic() - started:.1f} s)."
        )
        self._state.drop_update()

    def evaluations(
        self,
        stub: coordinator_pb2_grpc.CoordinatorServiceStub,
        assignment: str,
        evaluations: Sequence[StoredEvaluation],
        *,
        complete: bool,
    ) -> None:
        """Report what was measured; an assignment that is over takes none. Raises Stopped and GloraError."""
        if not evaluations and not complete:
            return
        messages = [
            types_pb2.Evaluation(
                phase=types_pb2.EvaluationPhase.ValueType(item.phase),
                rank=item.rank,
                loss=item.loss,
                accuracy=item.accuracy,
                rows=item.rows,
                seconds=item.seconds,
            )
            for item in evaluations
        ]
        try:
            self._persistence.call(
                lambda: report_evaluations(
                    stub, self._stop, assignment=assignment, evaluations=messages, complete=complete
                )
            )
        except GloraError as error:
            if error.reason not in OVER and error.reason is not Reason.METRICS_INVALID:
                raise
            self._view.line(f"An evaluation was not taken: {error.message}")

    def _await_verdict(self, stub: coordinator_pb2_grpc.CoordinatorServiceStub, update: StoredUpdate) -> Verdict:
        """The verdict, or RECEIVED when it takes long: the bytes are safe, so the device may go on."""
        for _ in range(_VERDICT_QUESTIONS):
            self._stop.wait(_VERDICT_SECONDS)
            try:
                answer = query_upload(stub, self._stop, update)
            except GloraError as error:
                if not is_passing(error):
                    raise
                continue
            if answer.state != coordinator_pb2.UPLOAD_STATE_RECEIVED:
                return Verdict(answer.state, answer.reason, answer.message)
        return Verdict(coordinator_pb2.UPLOAD_STATE_RECEIVED, "", "")


def _fate(verdict: Verdict) -> str:
    match verdict.state:
        case coordinator_pb2.UPLOAD_STATE_ACCEPTED:
            return "the update was accepted"
        case coordinator_pb2.UPLOAD_STATE_REJECTED:
            return f"the update was rejected: {verdict.reason}: {verdict.message}"
        case coordinator_pb2.UPLOAD_STATE_DISCARDED:
            return "the round went on without the update"
        case _:
            return "the update was received"
