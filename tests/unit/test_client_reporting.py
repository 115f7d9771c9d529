"""When a device tells its server how far it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest

from glora.v1 import coordinator_pb2 as pb
from glora.v1 import types_pb2
from glora_client import reporting
from glora_client.channel import Stop
from glora_client.reporting import Reporter


class _Answered:
    def result(self) -> pb.ReportProgressResponse:
        return pb.ReportProgressResponse()

    def cancel(self) -> bool:
        return False


@dataclass
class _Line:
    """A server that takes every report, and a clock that moves when it is told to."""

    now: float = 1000.0
    sent: list[pb.ReportProgressRequest] = field(default_factory=list)

    @property
    def ReportProgress(self) -> Any:  # noqa: N802 - as the stub names it
        line = self

        class Call:
            def future(self, request: pb.ReportProgressRequest, timeout: float) -> _Answered:
                del timeout
                line.sent.append(request)
                return _Answered()

        return Call()

    def phases(self) -> list[int]:
        return [item.progress.phase for item in self.sent if item.WhichOneof("report") == "progress"]


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch) -> _Line:
    made = _Line()
    monkeypatch.setattr(reporting, "time", SimpleNamespace(monotonic=lambda: made.now))
    return made


@pytest.fixture
def reporter(line: _Line) -> Reporter:
    made = Reporter(cast("Any", line), Stop(), types_pb2.Assignment(name="assignments/a"))
    made.accept()
    return made


def test_phases_that_are_over_at_once_are_not_told(line: _Line, reporter: Reporter) -> None:
    for phase in (pb.DEVICE_PHASE_DOWNLOADING, pb.DEVICE_PHASE_LOADING, pb.DEVICE_PHASE_TRAINING):
        reporter.progress(phase)
        line.now += 0.01
    assert line.phases() == []


def test_a_phase_that_lasts_is_told_soon(line: _Line, reporter: Reporter) -> None:
    reporter.progress(pb.DEVICE_PHASE_LOADING)
    reporter.progress(pb.DEVICE_PHASE_TRAINING, 1, 10)
    line.now += 0.5  # how often the agent looks after its training process
    reporter.keep_alive()
    assert line.phases() == [pb.DEVICE_PHASE_TRAINING]


def test_after_a_silence_a_new_phase_is_told_at_once(line: _Line, reporter: Reporter) -> None:
    line.now += 5.0
    reporter.progress(pb.DEVICE_PHASE_UPLOADING)
    assert line.phases() == [pb.DEVICE_PHASE_UPLOADING]


def test_that_a_device_measures_is_told_at_once(line: _Line, reporter: Reporter) -> None:
    reporter.progress(pb.DEVICE_PHASE_EVALUATING)
    assert line.phases() == [pb.DEVICE_PHASE_EVALUATING]


@pytest.mark.parametrize(
    ("seconds", "change", "told"),
    [
        (reporting.MIN_INTERVAL - 0.1, True, False),
        (reporting.MIN_INTERVAL, True, True),
        (reporting.SILENCE - 0.1, False, False),
        (reporting.SILENCE, False, True),
    ],
)
def test_progress_is_told_once_a_second_and_silence_broken_after_three(
    line: _Line, reporter: Reporter, seconds: float, change: bool, told: bool
) -> None:
    line.now += 5.0
    reporter.progress(pb.DEVICE_PHASE_TRAINING, 1, 10)
    line.now += seconds
    again: Callable[[], None] = reporter.keep_alive
    if change:
        reporter.progress(pb.DEVICE_PHASE_TRAINING, 2, 10)
    else:
        again()
    assert len(line.phases()) == 1 + told
