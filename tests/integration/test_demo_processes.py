"""The processes of the demo: real ones, but quick."""

from __future__ import annotations

import contextlib
import signal
import time
from pathlib import Path

import pytest

from glora_cli.demo_run import Processes
from glora_cli.demo_spec import server_toml
from glora_wire.errors import GloraError, Reason


def test_a_command_is_waited_for(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        child = processes.start("version", "--version")
        processes.finish([child], within=200.0)
        processes.check()
    assert child.log.read_text().startswith("glora ")


def test_a_command_may_end_while_others_are_waited_for(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        first, second = processes.start("first", "--version"), processes.start("second", "--version")
        first.process.wait()
        processes.finish([second], within=200.0)
        processes.finish([first], within=200.0)


def test_a_failing_command_shows_the_end_of_its_log(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes, pytest.raises(GloraError) as caught:
        processes.finish([processes.start("wrong", "no-such-command")], within=200.0)
    assert caught.value.reason is Reason.INTERNAL
    assert "wrong failed (exit code 2)" in caught.value.message
    assert "No such command 'no-such-command'" in caught.value.message


def test_a_process_that_ends_by_itself_is_noticed_while_others_are_waited_for(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        server = processes.start("server", "server", "--data-dir", "/proc/nowhere", lasts=True)
        with pytest.raises(GloraError, match="server ended unexpectedly"):
            processes.wait_until(lambda: False, "Nothing", within=200.0, child=server)


def test_what_takes_too_long_is_told(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        child = processes.start("server", "server", "--data-dir", str(_server_folder(tmp_path)), lasts=True)
        with pytest.raises(GloraError, match="Starting it took longer than 0 s"):
            processes.wait_until(lambda: False, "Starting it", within=0.0, child=child)


def test_staying_ends_with_ctrl_c_or_with_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A shell that runs the tests in the background has them ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with Processes(tmp_path) as processes, contextlib.ExitStack() as after:
        after.callback(signal.signal, signal.SIGINT, before)
        with monkeypatch.context() as waiting:
            waiting.setattr(processes, "check", lambda: signal.raise_signal(signal.SIGINT))
            processes.stay()
        processes.start("server", "server", "--data-dir", "/proc/nowhere", lasts=True)
        with pytest.raises(GloraError, match="server ended unexpectedly"):
            processes.stay()


def test_all_processes_end_together_and_soon(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        children = [
            processes.start(
                f"s{number}", "server", "--data-dir", str(_server_folder(tmp_path / f"{number}")), lasts=True
            )
            for number in range(2)
        ]
        started = time.monotonic()
    assert time.monotonic() - started < 10.0
    assert all(child.process.returncode is not None for child in children)


def _server_folder(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    settings = server_toml(http_port=0, grpc_port=0, enrolment_port=0, admin_password="correct horse battery")
    (folder / "glora.toml").write_text(settings)
    return folder
