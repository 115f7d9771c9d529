import itertools
import math
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Final

import pytest
from prometheus_client.parser import text_string_to_metric_families

from glora_server.coordinator.hub import Hub
from glora_server.coordinator.observer import SignIn
from glora_server.coordinator.quality import Quality, quality_of
from glora_server.rounds.assignment import Assignment, AssignmentKind, AssignmentPhase
from glora_server.rounds.ids import AssignmentId, DeviceId, RoundId, RunId, VersionId
from glora_server.rounds.policy import RoundPolicy
from glora_server.rounds.round import Round, RoundPhase
from glora_server.telemetry.metrics import Metrics
from glora_server.telemetry.names import METRICS, Kind, metric_table
from glora_wire.errors import Reason, Refusal

BOUNDED: Final = {"method", "code", "kind", "outcome", "reason", "state", "version", "phase", "route", "status"} | {
    "stat",
    "operation",
    "certificate",
}


def value(metrics: Metrics, name: str, **labels: str) -> float:
    found = metrics.registry.get_sample_value(name, labels)
    assert found is not None, f"{name}{labels} is not exported"
    return found


def test_scrape_shows_exactly_the_listed_metrics_with_kind_and_meaning_from_the_start() -> None:
    text, content_type = Metrics().text()
    assert content_type.startswith("text/plain")
    found = {
        (family.name, family.type, family.documentation)
        for family in text_string_to_metric_families(text.decode())
        if family.name.startswith("glora_")
    }
    # The text format calls an info a gauge, and its parser drops the suffix of counters.
    listed = {
        (
            metric.name.removesuffix("_total"),
            "gauge" if metric.kind is Kind.INFO else metric.kind.value,
            metric.meaning,
        )
        for metric in METRICS
    }
    assert found == listed
    assert len({metric.name for metric in METRICS}) == len(METRICS)


def test_table_has_a_row_with_a_meaning_for_every_metric() -> None:
    rows = metric_table().splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == [metric.name for metric in METRICS]
    assert all(metric.meaning.endswith(".") and "|" not in metric.meaning for metric in METRICS)


def test_the_table_of_the_architecture_is_the_modules() -> None:
    text = (Path(__file__).parents[2] / "ARCHITECTURE.md").read_text(encoding="utf-8")
    assert metric_table() in text, "paste what glora_server.telemetry.names.metric_table() says"
    rows = re.findall(r"^\| `(glora_\w+)` \|", text, flags=re.MULTILINE)
    assert rows == [metric.name for metric in METRICS], "no row beside those of the table"


def test_labels_are_bounded_and_only_gauges_name_a_run() -> None:
    for metric in METRICS:
        if "run" in metric.labels:
            assert metric.kind is Kind.GAUGE, "what is counted can not be removed when the run ends"
        assert set(metric.labels) - {"run"} <= BOUNDED, metric.name


def test_two_servers_in_one_process_count_apart() -> None:
    one, two = Metrics(), Metrics()
    one.rpc_finished(method="Enrol", code="OK", seconds=0.1)
    assert value(one, "glora_rpc_requests_total", method="Enrol", code="OK") == 1
    assert value(two, "glora_rpc_requests_total", method="Enrol", code="OK") == 0


def test_transfers_are_counted_in_all_and_by_assignment() -> None:
    metrics = Metrics()
    metrics.transferred(AssignmentId("a"), down=10)
    metrics.hub = Hub()
    metrics.transferred(AssignmentId("a"), down=5, up=7)
    assert value(metrics, "glora_sent_bytes_total", kind="adapter") == 15
    assert value(metrics, "glora_received_bytes_total", kind="update") == 7
    assert (metrics.hub.traffic[AssignmentId("a")].down, metrics.hub.traffic[AssignmentId("a")].up) == (5, 7)


def test_updates_sign_ins_and_commits_are_counted() -> None:
    metrics = Metrics()
    metrics.upload_judged(None)
    metrics.upload_judged(Refusal(reason=Reason.NON_FINITE, message="NaN"))
    metrics.aggregated(seconds=2.0, commit_seconds=0.5, updates=3)
    metrics.signed_in(SignIn.REFUSED)
    metrics.committed(seconds=0.002)
    metrics.failed(operation="write", kind="full")
    assert value(metrics, "glora_uploads_total", outcome="accepted", reason="") == 1
    assert value(metrics, "glora_uploads_total", outcome="rejected", reason="NON_FINITE") == 1
    assert value(metrics, "glora_versions_total") == 1
    assert value(metrics, "glora_aggregation_seconds_sum") == 2.0
    assert value(metrics, "glora_phase_seconds_sum", phase="aggregate") == 1.5
    assert value(metrics, "glora_phase_seconds_sum", phase="commit") == 0.5
    assert value(metrics, "glora_sign_ins_total", outcome="refused") == 1
    assert value(metrics, "glora_sign_ins_total", outcome="accepted") == 0
    assert value(metrics, "glora_database_commit_seconds_count") == 1
    assert value(metrics, "glora_database_errors_total", operation="write", kind="full") == 1


def test_quality_is_spread_over_modules_of_what_was_measured() -> None:
    first = {
        "captured_energy": 0.9,
        "truncation_error": 0.2,
        "aggregation_bias": 0.1,
        "mean_norm": 2.0,
        "eigenvalues": [0.5, 0.25],
        "eigengap": 0.25,
        "sigma": [3.0, 3.0, 0.0],
        "angles": {"largest": 0.5, "mean": 0.25},
        "coverage": [1.0, 0.75],
        "clients": [
            {"share": 0.75, "change_cosine": 1.0, "capture": 0.8, "influence": 0.4},
            {"share": 0.25, "change_cosine": -1.0, "capture": 0.4, "influence": None},
        ],
    }
    second: dict[str, object] = {
        "captured_energy": 0.7,
        "truncation_error": None,
        "eigenvalues": [],
        "eigengap": None,
        "sigma": [5.0],
        "angles": None,
        "coverage": [],
        "clients": [],
    }
    found = quality_of([first, second, {}])
    assert found.captured_energy.mean == pytest.approx(0.8)
    assert (found.captured_energy.least, found.captured_energy.largest) == (0.7, 0.9)
    assert (found.truncation_error.mean, found.eigengap.mean, found.consensus.mean) == (0.2, 0.5, 0.5)
    assert (found.aggregation_bias.mean, found.mean_norm.mean) == (0.1, 2.0)
    assert (found.angle.mean, found.coverage.mean) == (0.5, 0.75)
    assert (found.capture.mean, found.influence.mean) == pytest.approx((0.7, 0.4))
    assert found.effective_rank.least == pytest.approx(1.0)
    assert found.effective_rank.largest == pytest.approx(2.0)
    nothing = quality_of([])
    assert all(math.isnan(getattr(nothing, item.name).mean) for item in fields(Quality))


def assignment(name: str, phase: AssignmentPhase, reason: Reason | None = None) -> Assignment:
    return Assignment(
        id=AssignmentId(name),
        run_id=RunId("r"),
        round_id=RoundId("o"),
        device_id=DeviceId(name),
        kind=AssignmentKind.TRAIN,
        rank=2,
        version_id=VersionId("v"),
        phase=phase,
        reason=reason,
        offered_at=0.0,
        deadline_at=9.0,
    )


def round_of(phase: RoundPhase, *assignments: Assignment) -> Round:
    return Round(
        id=RoundId("o"),
        run_id=RunId("r"),
        number=1,
        version_id=VersionId("v"),
        policy=RoundPolicy(),
        phase=phase,
        assignments=assignments,
        created_at=0.0,
        opened_at=10.0,
    )


def test_a_round_is_counted_once_and_so_are_its_assignments() -> None:
    metrics = Metrics()
    collecting = round_of(
        RoundPhase.COLLECTING,
        assignment("a", AssignmentPhase.RECEIVED),
        assignment("b", AssignmentPhase.RECEIVED),
        assignment("c", AssignmentPhase.OFFERED),
        assignment("d", AssignmentPhase.DECLINED),
    )
    done = replace(
        round_of(
            RoundPhase.COMMITTED,
            assignment("a", AssignmentPhase.ACCEPTED_UPDATE),
            assignment("b", AssignmentPhase.EXPIRED, Reason.ROUND_CLOSED),
            assignment("c", AssignmentPhase.EXPIRED, Reason.DEADLINE_PASSED),
            assignment("d", AssignmentPhase.DECLINED),
        ),
        closed_at=70.0,
    )
    metrics.round_moved(round_of(RoundPhase.PLANNED), collecting)
    metrics.round_moved(collecting, collecting)
    metrics.round_moved(collecting, done)
    metrics.round_moved(done, done)
    assert value(metrics, "glora_rounds_total", outcome="committed") == 1
    assert value(metrics, "glora_rounds_total", outcome="failed") == 0
    assert value(metrics, "glora_round_seconds_sum") == 60.0
    assert value(metrics, "glora_round_seconds_count") == 1
    assert value(metrics, "glora_assignments_total", outcome="accepted_update", reason="") == 1
    assert value(metrics, "glora_assignments_total", outcome="expired", reason="ROUND_CLOSED") == 1
    assert value(metrics, "glora_assignments_total", outcome="expired", reason="DEADLINE_PASSED") == 1
    assert value(metrics, "glora_assignments_total", outcome="declined", reason="") == 0, "it was counted before"
    assert value(metrics, "glora_uploads_total", outcome="discarded", reason="ROUND_CLOSED") == 1
    assert (
        metrics.registry.get_sample_value("glora_uploads_total", {"outcome": "discarded", "reason": "DEADLINE_PASSED"})
        is None
    ), "that device had uploaded nothing"


def test_each_step_of_an_assignment_is_timed_once() -> None:
    metrics = Metrics()
    offered = assignment("a", AssignmentPhase.OFFERED)
    accepted = replace(offered, phase=AssignmentPhase.ACCEPTED, accepted_at=1.0)
    delivered = replace(accepted, phase=AssignmentPhase.DELIVERED, delivered_at=3.0)
    uploading = replace(delivered, phase=AssignmentPhase.UPLOADING, upload_started_at=7.0)
    received = replace(uploading, phase=AssignmentPhase.RECEIVED, received_at=15.0)
    judged = replace(received, phase=AssignmentPhase.ACCEPTED_UPDATE, closed_at=31.0)
    steps = [offered, accepted, delivered, uploading, received, judged, replace(judged, training_rows=1)]
    for before, after in itertools.pairwise(steps):
        metrics.round_moved(round_of(RoundPhase.COLLECTING, before), round_of(RoundPhase.COLLECTING, after))
    for phase, seconds in (("accept", 1.0), ("download", 2.0), ("train", 4.0), ("upload", 8.0), ("validate", 16.0)):
        assert value(metrics, "glora_phase_seconds_sum", phase=phase) == seconds
        assert value(metrics, "glora_phase_seconds_count", phase=phase) == 1


def test_an_update_that_nobody_judged_is_not_timed_as_one_that_was() -> None:
    metrics = Metrics()
    received = replace(assignment("a", AssignmentPhase.RECEIVED), received_at=15.0)
    closed = replace(received, phase=AssignmentPhase.EXPIRED, reason=Reason.ROUND_CLOSED, closed_at=31.0)
    metrics.round_moved(round_of(RoundPhase.COLLECTING, received), round_of(RoundPhase.COLLECTING, closed))
    assert value(metrics, "glora_phase_seconds_count", phase="validate") == 0


def test_a_step_that_was_skipped_is_not_timed() -> None:
    metrics = Metrics()
    offered = assignment("a", AssignmentPhase.OFFERED)
    received = replace(offered, phase=AssignmentPhase.RECEIVED, received_at=15.0)
    metrics.round_moved(round_of(RoundPhase.COLLECTING, offered), round_of(RoundPhase.COLLECTING, received))
    assert value(metrics, "glora_phase_seconds_count", phase="upload") == 0
