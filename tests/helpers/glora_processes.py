"""Real `glora` processes: started, watched, killed, and all of them ended in the end."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from glora_cli.demo_run import child_environment

HOST: Final = "127.0.0.1"
LOOK_SECONDS: Final = 0.05
_TAIL_LINES: Final = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


@dataclass(frozen=True, slots=True, eq=False)
class Process:
    """A `glora` command that runs on its own, and the file that has everything that it wrote."""

    name: str
    popen: subprocess.Popen[bytes]
    log: Path

    @property
    def alive(self) -> bool:
        return self.popen.poll() is None

    @property
    def text(self) -> str:
        """What it and those before it of the same name wrote."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def kill(self) -> None:
        """kill -9, of this one process: what it started must notice by itself."""
        self.popen.kill()
        self.popen.wait()

    def ended(self, within: float = 120.0) -> int:
        """Its exit code, once it ended by itself."""
        return self.popen.wait(within)


@dataclass(eq=False)
class Processes:
    """Processes that write into `folder`/logs, each in a process group of its own; they end with this process, too."""

    folder: Path
    processes: list[Process] = field(default_factory=list)

    def run(self, *words: str, within: float = 400.0, bound: bool = False) -> Ended:
        """Run `glora WORDS` to its end; when `bound`, permission bits bind it also where this process is root."""
        as_user = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if bound and os.geteuid() == 0 else []
        done = subprocess.run(
            [*as_user, sys.executable, "-P", "-c", "from glora_cli.main import main; main()", *words],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=within,
            check=False,
        )
        return Ended(code=done.returncode, out=done.stdout, err=done.stderr)

    def start(self, name: str, *words: str) -> Process:
        """Start `glora WORDS` and let it run; it writes to NAME.log."""
        log = self.folder / "logs" / f"{name}.log"
        with log.open("ab") as output:
            popen = subprocess.Popen(
                [sys.executable, "-P", "-m", "glora_cli.demo_child", str(os.getpid()), *words],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment(),
                start_new_session=True,
            )
        process = Process(name, popen, log)
        self.processes.append(process)
        return process

    def stop(self) -> None:
        """End what is left: politely, then with everything that it started."""
        for process in self.processes:
            if process.alive:
                process.popen.terminate()
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.popen.wait(10.0)
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.popen.pid, signal.SIGKILL)
            process.popen.wait()
        self.processes.clear()

    def logs(self) -> Iterator[tuple[str, str]]:
        """Name and last lines of every log, the oldest first."""
        for path in sorted((self.folder / "logs").glob("*.log"), key=lambda path: path.stat().st_ctime):
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:]
            yield path.stem, "\n".join(lines)


def until(true: Callable[[], bool], what: str, within: float = 120.0, *, watching: Sequence[Process] = ()) -> None:
    """Wait until `true` answers yes; fails at once when one of the processes that are `watched` has died."""
    dead = {process for process in watching if not process.alive}
    deadline = time.monotonic() + within
    while not true():
        for process in watching:
            assert process.alive or process in dead, f"{process.name} ended before {what}:\n{process.text[-2000:]}"
        assert time.monotonic() < deadline, f"it did not happen in {within:.0f} s that {what}"
        time.sleep(LOOK_SECONDS)


def environment() -> dict[str, str]:
    """The environment of every process: offline, one thread, nothing of other servers."""
    return child_environment(os.environ)


_PORTS: Final = range(20_000, 32_768)
"""None that the system gives to outgoing connections: one of them could have it before the server does, or again."""
_TAKEN: Final[set[int]] = set()


def free_port() -> int:
    """A port of the loopback address that nobody listens on and that was not given out before."""
    while True:
        port = secrets.choice(_PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((HOST, port))
            if port not in _TAKEN:
                _TAKEN.add(port)
                return port
