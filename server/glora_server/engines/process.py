"""One worker process as its parent sees it: start, exchange, end. Blocking; for one thread alone."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from typing import Final

from glora_server.coordinator.ports import WorkerLostError
from glora_server.engines.pipe import Pipe
from glora_server.engines.protocol import Answer, Hello, Job
from glora_wire.errors import GloraError

_CLOSING_SECONDS: Final = 2.0


class WorkerProcess:
    """A live worker. The thread that makes it must outlive it: on Linux the worker is killed when that thread ends."""

    def __init__(self, device: str, threads: int) -> None:
        """Start it and wait for its greeting, seconds; raises WorkerLostError, and GloraError when it cannot serve."""
        ours, theirs = socket.socketpair()
        # Not multiprocessing's own start methods: they import the parent's __main__ again, whatever that is.
        command = [sys.executable, "-P", "-m", "glora_server.engines.worker"]
        arguments = [str(theirs.fileno()), str(os.getpid()), device, str(threads)]
        with theirs:
            self._pipe = Pipe(ours)
            try:
                self._process = subprocess.Popen(  # noqa: S603 (our own module under our own interpreter)
                    [*command, *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    process_group=0,  # a terminal's Ctrl-C is for the parent
                )
            except OSError as error:
                self._pipe.close()
                raise WorkerLostError(f"The worker process could not be started: {error}.") from error
        self.hello = self._greeting()

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    def exchange(self, job: Job) -> Answer:
        """The answer to one job; raises WorkerLostError when the worker ends first.

        What cannot be pickled raises before anything is sent, and the worker stays in step.
        """
        try:
            self._pipe.send(job)
        except OSError as error:
            raise self._lost() from error
        answer = self._received()
        if not isinstance(answer, Answer):
            self.kill()
            raise WorkerLostError(f"The worker process answered with {type(answer).__name__} and was ended.")
        return answer

    def kill(self) -> None:
        """End it now; any thread may call this, an exchange under way then raises WorkerLostError."""
        self._process.kill()

    def close(self) -> None:
        """Close the pipe, upon which it ends by itself; kill it when it does not."""
        self._pipe.close()
        try:
            self._process.wait(_CLOSING_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _greeting(self) -> Hello:
        greeting = self._received()
        if isinstance(greeting, Hello):
            return greeting
        self.close()
        if isinstance(greeting, GloraError):
            raise greeting
        raise WorkerLostError(f"The worker process greeted with {type(greeting).__name__}.")

    def _received(self) -> object:
        try:
            return self._pipe.receive()
        except (EOFError, OSError) as error:
            raise self._lost() from error

    def _lost(self) -> WorkerLostError:
        self._process.kill()
        self.close()
        return WorkerLostError(f"The worker process {_how(self._process.returncode)}; the job can be given again.")


def _how(status: int | None) -> str:
    if status is None or status >= 0:
        return f"ended with status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = str(-status)
    return f"was ended by signal {name}"
