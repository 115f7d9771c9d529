"""The processes of the demo: real `glora` commands with a log each, started together and ended together."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Final

from glora_wire.errors import GloraError, Reason

HOST: Final = "127.0.0.1"
_POLL_SECONDS: Final = 0.05
_STOP_SECONDS: Final = 5.0
_TAIL_LINES: Final = 20
_PORTS_TRIED: Final = 50


@dataclass(frozen=True, slots=True, eq=False)
class Child:
    """A process and the file that has everything that it wrote."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    lasts: bool
    """It is to run until it is stopped, so that any end of it is a failure."""

    @property
    def failed(self) -> bool:
        """It ended, and not as it should have."""
        code = self.process.poll()
        return code is not None and (self.lasts or code != 0)

    @property
    def tail(self) -> str:
        """The last lines that it wrote."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:]
        return "\n".join(f"  {line}" for line in lines) or "  (nothing was written)"


class Processes:
    """The `glora` processes of one demo; a context manager that ends them all. For the main thread alone.

    (On Linux a child is ended with the thread that started it.)
    """

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._children: list[Child] = []

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, name: str, *arguments: str, lasts: bool = False) -> Child:
        """Start `glora ARGUMENTS` and let it run (`lasts`: until it is stopped); it writes to NAME.log."""
        log = self._logs / f"{name}.log"
        with log.open("ab") as output:
            process = subprocess.Popen(  # noqa: S603 - our own commands
                _command(arguments),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=child_environment(os.environ),
                process_group=0,  # a terminal's Ctrl-C is for the demo, which ends its children in order
            )
        child = Child(name, process, log, lasts)
        self._children.append(child)
        return child

    def finish(self, children: Sequence[Child], within: float) -> None:
        """Wait until these have done their work; raises INTERNAL with the log of the one that failed."""
        deadline = time.monotonic() + within
        for child in children:
            while child.process.poll() is None:
                self.check()
                if time.monotonic() > deadline:
                    raise failure(f"{child.name} was not done after {within:.0f} s", child)
                time.sleep(_POLL_SECONDS)
        self.check()
        for child in children:
            self._children.remove(child)

    def wait_until(self, ready: Callable[[], bool], what: str, within: float, child: Child) -> None:
        """Wait until `ready` answers yes; raises INTERNAL with the log of `child` when it does not in time."""
        deadline = time.monotonic() + within
        while not ready():
            self.check()
            if time.monotonic() > deadline:
                raise failure(f"{what} took longer than {within:.0f} s", child)
            time.sleep(_POLL_SECONDS)

    def check(self) -> None:
        """Raise INTERNAL with the log of a process that has failed, or has ended although it was to last."""
        for child in self._children:
            if child.failed:
                what = "ended unexpectedly" if child.lasts else "failed"
                raise failure(f"{child.name} {what} (exit code {child.process.returncode})", child)

    def stay(self) -> None:
        """Wait for Ctrl-C; raises INTERNAL when a process ends before."""
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                self.check()
                time.sleep(_POLL_SECONDS)

    def stop(self) -> None:
        """End every process that is left, politely first."""
        try:
            for child in self._children:
                _signal_group(child, signal.SIGTERM)
            deadline = time.monotonic() + _STOP_SECONDS
            for child in self._children:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.process.wait(max(0.0, deadline - time.monotonic()))
        finally:
            for child in self._children:
                _signal_group(child, signal.SIGKILL)
                child.process.wait()
            self._children.clear()


def failure(what: str, child: Child) -> GloraError:
    """The error that says what happened and shows the end of the process's log."""
    return GloraError(Reason.INTERNAL, f"{what}. The end of its log:\n{child.tail}")


def child_environment(inherited: Mapping[str, str]) -> dict[str, str]:
    """`inherited` without settings of other servers and devices; offline, one thread a process."""
    kept = {name: value for name, value in inherited.items() if not name.startswith("GLORA_")}
    return kept | {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "NO_COLOR": "1",
    }


def free_port(wanted: int) -> int:
    """`wanted`, or the next port after it that nobody listens on; raises PORT_IN_USE when there is none nearby."""
    for port in range(wanted, min(wanted + _PORTS_TRIED, 65536)):
        if port_is_free(port):
            return port
    raise GloraError(
        Reason.PORT_IN_USE,
        f"The ports from {wanted} to {min(wanted + _PORTS_TRIED, 65536) - 1} are all in use; name another with --port.",
        port=wanted,
    )


def port_is_free(port: int) -> bool:
    """Whether this port of the loopback address can be listened on."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
            probe.listen(1)
        except OSError:
            return False
    return True


@contextlib.contextmanager
def ending_cleanly() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end this process as Ctrl-C does: with everything that it started."""
    previous = {number: signal.signal(number, _leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _leave(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _command(arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-P", "-m", "glora_cli.demo_child", str(os.getpid()), *arguments]


def _signal_group(child: Child, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.process.pid, number)
