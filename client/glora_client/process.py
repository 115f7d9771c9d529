"""The agent's end of the training process: starts it when it is first needed, hands it jobs, hears its events."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from glora_client.protocol import Event, Job, parse_event
from glora_wire.errors import GloraError, Reason

_END_SECONDS: Final = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerOptions:
    """How the training process is started; `threads` 0 leaves torch's choice."""

    log: Path
    threads: int = 0
    fit: str | None = None
    quantization: str = "none"


class TrainingProcess:
    """One process for the whole run of the agent; a new one when it died."""

    def __init__(self, options: TrainerOptions) -> None:
        self._options = options
        self._popen: subprocess.Popen[str] | None = None
        self._events: queue.SimpleQueue[tuple[int, Event] | None] = queue.SimpleQueue()
        self._number = 0

    def next_number(self) -> int:
        """A number for the next job."""
        self._number += 1
        return self._number

    def submit(self, job: Job) -> None:
        """Hand over a job; starts the process when there is none."""
        if self._popen is None or self._popen.poll() is not None:
            self.close()
            self._start()
        self._send(job.to_line())

    def cancel(self, number: int) -> None:
        """The job is not wanted any more; it ends with `Failed(cancelled=True)`."""
        self._send(json.dumps({"cancel": number}))

    def set_seconds_left(self, seconds: float | None) -> None:
        """The running job must have trained within this time."""
        self._send(json.dumps({"seconds_left": seconds}))

    def next_event(self, number: int, timeout: float) -> Event | None:
        """The next event of job `number`; None when none came within `timeout` seconds.

        Raises GloraError OUT_OF_MEMORY or TRAINING_FAILED when the process died.
        """
        try:
            item = self._events.get(timeout=timeout)
        except queue.Empty:
            return None
        if item is None:
            raise self._death()
        return item[1] if item[0] == number else None

    def close(self) -> None:
        """End the process: politely, then firmly."""
        popen, self._popen = self._popen, None
        if popen is None:
            return
        if popen.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                popen.stdin.close()
        try:
            popen.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            popen.kill()
            popen.wait()

    def _start(self) -> None:
        options = self._options
        command = [sys.executable, "-m", "glora_client.trainer", "--parent", str(os.getpid())]
        command += ["--threads", str(options.threads), "--quantization", options.quantization]
        if options.fit is not None:
            command += ["--fit", options.fit]
        environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
        if options.threads:
            environment |= {"OMP_NUM_THREADS": str(options.threads)}
        if options.fit is not None:
            # A training function of one's own lies where the client was started, as with `python -m`.
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path.cwd()), os.environ.get("PYTHONPATH")]))
        with options.log.open("a", encoding="utf-8") as log:
            self._popen = subprocess.Popen(  # noqa: S603 - our own module
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
                # Ctrl-C is for the agent, which ends this process by itself.
                start_new_session=True,
            )
        self._events = queue.SimpleQueue()
        threading.Thread(target=_listen, args=(self._popen, self._events), name="trainer-events", daemon=True).start()

    def _send(self, line: str) -> None:
        if self._popen is None or self._popen.stdin is None:
            return
        try:
            self._popen.stdin.write(line + "\n")
            self._popen.stdin.flush()
        except (BrokenPipeError, ValueError):
            # It died; next_event says so with the reason.
            return

    def _death(self) -> GloraError:
        popen, self._popen = self._popen, None
        status = None if popen is None else popen.wait()
        if status == -signal.SIGKILL:
            return GloraError(
                Reason.OUT_OF_MEMORY,
                "The training process was killed, most likely because the device ran out of memory; join with a "
                "smaller --rank, or ask the operator for a smaller batch.",
            )
        return GloraError(
            Reason.TRAINING_FAILED,
            f"The training process ended unexpectedly (status {status}); {self._options.log} says why.",
        )


def _listen(popen: subprocess.Popen[str], events: queue.SimpleQueue[tuple[int, Event] | None]) -> None:
    if popen.stdout is not None:
        with popen.stdout as stdout:
            for line in stdout:
                events.put(parse_event(line))
    events.put(None)
