"""The training process: `python -m glora_client.trainer`, started by the agent, one for the whole run.

It keeps the base model in memory between rounds, reads jobs from standard input and writes events to standard output
(see protocol.py). It ends when its parent does: at the end of standard input, and by the kernel where there is prctl.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Protocol, TextIO

from glora_client.protocol import Event, Failed, Job, event_line
from glora_wire.errors import GloraError, Reason

_PR_SET_PDEATHSIG = 1


class Control(Protocol):
    """What the inbox needs of `batches.RoundControl`, which lives in a module that imports torch."""

    def cancel(self) -> None:
        """The work is not wanted any more."""
        ...

    def set_seconds_left(self, seconds: float | None) -> None:
        """The time that is left."""
        ...


class Inbox:
    """What the agent sent: jobs in order, and messages for the job that runs."""

    def __init__(self) -> None:
        self.jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._control: Control | None = None
        self._cancelled: set[int] = set()
        self._running = 0
        self._lock = threading.Lock()

    def begin(self, number: int, control: Control) -> None:
        """Job `number` runs under `control` from now on."""
        with self._lock:
            self._running, self._control = number, control
            if number in self._cancelled:
                control.cancel()

    def end(self) -> None:
        """No job runs."""
        with self._lock:
            self._control = None

    def take(self, document: dict[str, object]) -> None:
        """Act on one message of the agent."""
        job, cancel = document.get("job"), document.get("cancel")
        if isinstance(job, dict):
            self.jobs.put(Job.from_document(job))
        with self._lock:
            if isinstance(cancel, int):
                self._cancelled.add(cancel)
                if self._control is not None and self._running == cancel:
                    self._control.cancel()
            if "seconds_left" in document and self._control is not None:
                seconds = document["seconds_left"]
                self._control.set_seconds_left(float(seconds) if isinstance(seconds, int | float) else None)


def main(arguments: Sequence[str]) -> int:
    """Serve jobs until standard input ends; returns the exit status."""
    parser = argparse.ArgumentParser(description="Training process of a glora client; started by the client itself.")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--fit", default=None)
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--parent", type=int, default=0)
    options = parser.parse_args(arguments)
    _end_with_parent(options.parent)
    _quiet()
    events = _take_standard_output()
    inbox = Inbox()
    threading.Thread(target=_listen, args=(inbox,), name="inbox", daemon=True).start()

    from glora_client.jobs import JobRunner, set_threads  # noqa: PLC0415 - torch takes seconds; the inbox must listen

    set_threads(options.threads)
    runner = JobRunner(fit_name=options.fit, quantization=options.quantization)
    while (job := inbox.jobs.get()) is not None:
        number = job.number

        def emit(event: Event, number: int = number) -> None:
            events.write(event_line(number, event) + "\n")
            events.flush()

        _run(runner.run, job, emit, inbox)
    return 0


def _run(
    run: Callable[[Job, Callable[[Event], None], Inbox], None], job: Job, emit: Callable[[Event], None], inbox: Inbox
) -> None:
    """Run a job; every way to fail becomes an event with a reason."""
    try:
        run(job, emit, inbox)
    except GloraError as error:
        emit(Failed(reason=error.reason.value, message=error.message))
    except MemoryError:
        emit(_out_of_memory())
    except Exception as error:  # noqa: BLE001 - the process must outlive any job; the traceback goes to the log
        traceback.print_exc()
        if "out of memory" in str(error).lower() or "can't allocate" in str(error):
            emit(_out_of_memory())
        else:
            emit(
                Failed(
                    reason=Reason.TRAINING_FAILED.value,
                    message=f"Training failed: {type(error).__name__}: {error} (the training log has the traceback).",
                )
            )
    finally:
        inbox.end()


def _out_of_memory() -> Failed:
    return Failed(
        reason=Reason.OUT_OF_MEMORY.value,
        message="The device ran out of memory; join with a smaller --rank, or ask the operator for a smaller batch.",
    )


def _listen(inbox: Inbox) -> None:
    for line in sys.stdin:
        inbox.take(json.loads(line))
    # The agent is gone: nobody wants the result, and torch may be deep inside a step.
    os._exit(0)


def _end_with_parent(parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if parent and os.getppid() != parent:
            raise SystemExit(0)


def _quiet() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def _take_standard_output() -> TextIO:
    """The real standard output, for events only; whatever libraries print goes to standard error instead."""
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return events


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
