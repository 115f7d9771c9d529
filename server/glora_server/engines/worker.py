"""Main of the worker process: `python -m glora_server.engines.worker FD PARENT DEVICE THREADS`.

One job at a time over the socket FD, an answer each. It ends when its parent does (end of the pipe, and on Linux a
signal, which also ends it in the middle of a job) or closes the socket. It leaves SIGINT and SIGTERM to the parent:
both reach a whole terminal or service group, and the parent may want a last job.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import socket
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, assert_never

from glora_server.coordinator.ports import AggregateJob, CheckJob, InitialiseJob, RenderJob
from glora_server.engines.pipe import Pipe
from glora_server.engines.protocol import (
    Answer,
    CheckStrategy,
    DescribeStrategy,
    Hello,
    Job,
    ListStrategies,
    Result,
)
from glora_wire.buffers import keep_buffers
from glora_wire.errors import GloraError, Reason

if TYPE_CHECKING:
    import torch

    from glora_server.engines.resident import ResidentUploads

_PR_SET_PDEATHSIG: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Means:
    """What jobs are done with."""

    device: torch.device
    threads: int
    resident: ResidentUploads


def main(arguments: list[str]) -> int:
    """Serve until the parent closes the socket or ends; the exit status."""
    descriptor, parent, device, threads = int(arguments[0]), int(arguments[1]), arguments[2], int(arguments[3])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _end_with(parent)
    keep_buffers()
    with socket.socket(fileno=descriptor) as end:
        try:
            return _serve(Pipe(end), device, threads)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return 0


def _end_with(parent: int) -> None:
    """Ask the kernel to kill this process when its parent ends; exits at once when that has happened already."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit(0)


def _serve(pipe: Pipe, choice: str, threads: int) -> int:
    try:
        means = _start_torch(choice, threads)
    except GloraError as error:
        pipe.send(error)
        return 1
    pipe.send(Hello(pid=os.getpid(), device=_named(means.device), peak_bytes=_peak_bytes()))
    while _serve_one(pipe, means):
        pass
    return 1


def _serve_one(pipe: Pipe, means: _Means) -> bool:
    """Answer one job; whether the process can go on. No reference to the job stays behind: states are large."""
    job: Job = pipe.receive()
    started = time.perf_counter()
    outcome, healthy = _outcome(job, means)
    pipe.send(Answer(outcome=outcome, seconds=time.perf_counter() - started, peak_bytes=_peak_bytes()))
    return healthy


def _start_torch(choice: str, threads: int) -> _Means:
    try:
        import torch  # noqa: PLC0415 (after the signals are set: it takes seconds)
    except ImportError as error:
        raise GloraError(
            Reason.SETTINGS_INVALID, f"The server needs torch; install glora[server] ({error})."
        ) from error
    from glora_server.engines.resident import ResidentUploads  # noqa: PLC0415 (it imports torch)

    torch.set_grad_enabled(False)
    device = _chosen(choice)
    if device.type == "cpu":
        # Modules are folded side by side instead; several threads for one product of narrow factors wait more than
        # they work, and what is computed would depend on how many there are.
        torch.set_num_threads(1)
    elif threads:
        torch.set_num_threads(threads)
    return _Means(device=device, threads=threads or _cores(), resident=ResidentUploads.on(device))


def _cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _chosen(choice: str) -> torch.device:
    """The device of "auto" (the first GPU where there is one), "cpu", "cuda" or "cuda:N"."""
    import torch  # noqa: PLC0415 (see _start_torch)

    if choice == "cpu" or (choice == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    wanted = torch.device("cuda" if choice == "auto" else choice)
    device = torch.device("cuda", wanted.index or 0)
    if device.index >= torch.cuda.device_count():
        seen = ", ".join(f"cuda:{number}" for number in range(torch.cuda.device_count())) or "none"
        raise GloraError(
            Reason.SETTINGS_INVALID,
            f"worker.device asks for {device} and torch sees of CUDA devices: {seen}; use auto or cpu, or one of them.",
        )
    torch.cuda.set_device(device)
    return device


def _named(device: torch.device) -> str:
    import torch  # noqa: PLC0415 (see _start_torch)

    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def _outcome(job: Job, means: _Means) -> tuple[Result | GloraError, bool]:
    """What to answer, and whether the process can go on: after an unforeseen CUDA error its context is lost."""
    try:
        return _run(job, means), True
    except GloraError as error:
        return error, True
    except Exception as error:  # noqa: BLE001 (whatever it is, the parent gets an answer and the log the traceback)
        traceback.print_exc()
        reason = Reason.AGGREGATION_FAILED if isinstance(job, AggregateJob) else Reason.INTERNAL
        message = f"{type(job).__name__} failed in the worker: {type(error).__name__}: {error}"
        return GloraError(reason, message[:2000]), means.device.type != "cuda"


def _run(job: Job, means: _Means) -> Result:
    from glora_server.engines import catalogue, folding, jobs  # noqa: PLC0415 (they import torch, see _start_torch)

    match job:
        case InitialiseJob():
            return jobs.initialise(job, means.device)
        case RenderJob():
            jobs.render(job, means.device)
            return None
        case CheckJob():
            return jobs.check(job, means.device, means.resident)
        case AggregateJob():
            return folding.fold(job, means.device, means.resident, threads=means.threads)
        case ListStrategies():
            return catalogue.strategies()
        case DescribeStrategy():
            return catalogue.describe(job.choice, round_index=job.round_index)
        case CheckStrategy():
            return catalogue.check_strategy(job.choice, min_rank=job.min_rank, max_rank=job.max_rank)
        case _:
            assert_never(job)


def _peak_bytes() -> int:
    if sys.platform == "linux":
        # Not getrusage: there a process inherits the peak of the one that started it.
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
