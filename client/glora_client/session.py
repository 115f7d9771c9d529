"""The agent's life: wait for work, do it, ask again; survives bad networks and days without a server."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Final

from glora.v1 import coordinator_pb2, types_pb2
from glora_client.assignment import LocalWork, Worker
from glora_client.channel import Backoff, Stop, Stopped, is_passing, work_channel, work_stub
from glora_client.identity import needs_renewal, renew
from glora_client.process import TrainerOptions, TrainingProcess
from glora_client.retry import SESSION_ENDS, Persistence
from glora_client.sending import Sender
from glora_client.state import Identity, StateFolder
from glora_client.view import View
from glora_wire.errors import GloraError, Reason

_WAIT_SECONDS: Final = 75.0
"""The server answers a long poll after at most 45 seconds; this much later the path must be dead."""
_RENEWAL_PAUSE: Final = 600.0
_RUN_ENDS: Final = frozenset({"RUN_COMPLETED", "RUN_FAILED", "RUN_ABORTED"})


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionOptions:
    """What the session works with; `once`: end when a run that was worked for has ended."""

    profile: types_pb2.CapabilityProfile
    local: LocalWork
    trainer: TrainerOptions
    once: bool = False
    backoff: Backoff = field(default_factory=Backoff)


class Session:
    """One device at work. `run` returns when it was stopped or, with `once`, when its run has ended."""

    def __init__(
        self,
        *,
        state: StateFolder,
        identity: Identity,
        options: SessionOptions,
        view: View,
        stop: Stop,
        process: TrainingProcess | None = None,
    ) -> None:
        self._state = state
        self._identity = identity
        self._options = options
        self._view = view
        self._stop = stop
        self._process = process or TrainingProcess(options.trainer)
        self._persistence = Persistence(stop, view, options.backoff)
        self._sender = Sender(state=state, persistence=self._persistence, view=view, stop=stop)
        self._worker = Worker(
            state=state,
            identity=identity,
            local=options.local,
            process=self._process,
            persistence=self._persistence,
            sender=self._sender,
            view=view,
            stop=stop,
        )
        self._channel = work_channel(identity, state.credentials())
        self._stub = work_stub(self._channel)
        self._noticed: dict[str, str] = {}
        self._runs = {options.profile.run_name} - {""}
        self._next_renewal = 0.0

    def run(self) -> None:
        """Work until stopped. Raises GloraError for what only people can mend (revoked, unknown certificate)."""
        self._view.line(f"{self._identity.name} works for {self._identity.host}:{self._identity.port}.")
        try:
            resumed = self._sender.finish_stored(self._stub)
            if resumed is not None:
                self._runs.add(resumed)
            while self._step():
                pass
        except Stopped:
            self._view.line("Stopping; work that was begun goes on at the next start.")
        finally:
            self._process.close()
            self._channel.close()

    def _step(self) -> bool:
        """Ask for work and do it; False when there will be no more."""
        try:
            answer = self._persistence.call(self._wait)
            if answer.WhichOneof("outcome") == "assignment":
                self._runs.add(answer.assignment.run_name)
                self._worker.do(self._stub, answer.assignment)
            elif self._ended(answer):
                return False
            else:
                self._stop.wait(answer.nothing.retry_after.ToNanoseconds() / 1e9)
            self._renew_when_due()
        except GloraError as error:
            if error.reason in SESSION_ENDS:
                raise
            # Whatever else the server says against one piece of work is no reason to stop asking for other work.
            self._view.line(f"{error.message} ({error.reason})")
            self._stop.wait(self._options.backoff.longest / 2)
        return True

    def _wait(self) -> coordinator_pb2.WaitForWorkResponse:
        request = coordinator_pb2.WaitForWorkRequest(profile=self._options.profile)
        call = self._stub.WaitForWork.future(request, timeout=_WAIT_SECONDS)
        try:
            with self._stop.ending(call):
                answer: coordinator_pb2.WaitForWorkResponse = call.result()
        except GloraError as error:
            # A server that refuses an expired certificate looks just like one that is away.
            if error.reason is Reason.SERVER_UNREACHABLE and time.time() > self._identity.expires_at:
                raise GloraError(
                    Reason.CERTIFICATE_EXPIRED,
                    "The device's certificate has expired and the server does not answer; join again with a new token.",
                ) from error
            raise
        return answer

    def _ended(self, answer: coordinator_pb2.WaitForWorkResponse) -> bool:
        """Whether the run that this session worked for is over and nothing else is wanted; tells what is new."""
        for notice in answer.notices:
            if self._noticed.get(notice.run_name) != notice.reason:
                self._noticed[notice.run_name] = notice.reason
                self._view.line(f"No work from {notice.run_name}: {notice.message}")
        return self._options.once and any(
            notice.reason in _RUN_ENDS and notice.run_name in self._runs for notice in answer.notices
        )

    def _renew_when_due(self) -> None:
        """A new certificate when two thirds of the old one's life are over; failure is tried again later."""
        now = time.time()
        if now < self._next_renewal or not needs_renewal(self._identity, now):
            return
        self._next_renewal = now + _RENEWAL_PAUSE
        try:
            self._identity = renew(self._state, self._identity, self._channel, self._stop)
        except GloraError as error:
            if not is_passing(error):
                raise
            self._view.line(f"The certificate could not be renewed yet: {error.message}")
            return
        old, self._channel = self._channel, work_channel(self._identity, self._state.credentials())
        self._stub = work_stub(self._channel)
        old.close()
        self._view.line("The device's certificate was renewed.")
