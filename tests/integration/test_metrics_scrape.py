"""A server in a process of its own, in the middle of a run, as Prometheus sees it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import grpc
import httpx2
import pytest
from e2e_data import manifest_of, run_toml, tiny_bert
from federation import Federation
from glora_processes import until
from hand_device import HandDevice, State, packed, trained
from prometheus_client import Metric as Family
from prometheus_client.parser import text_string_to_metric_families
from promtool import DEPLOY, alert_expressions, expressions, matchers_in, promtool, series_in

from glora.v1 import coordinator_pb2, types_pb2
from glora_dashboard.run_models import RunAnswer
from glora_server.coordinator.model import MetricPhase
from glora_server.telemetry.names import METRICS, Kind

pytestmark = pytest.mark.e2e

NAMES: Final = ("left", "right")


@dataclass(frozen=True, slots=True)
class Scrape:
    """One page, parsed."""

    text: str
    families: dict[str, Family]

    def value(self, name: str, **labels: str) -> float:
        """The one sample of that name with at least these labels."""
        found = [
            sample.value
            for family in self.families.values()
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]
        assert len(found) == 1, f"{name}{labels} has {len(found)} samples"
        return found[0]


def scrape(federation: Federation) -> Scrape:
    text = httpx2.get(f"{federation.url}/metrics", trust_env=False, timeout=60.0).raise_for_status().text
    return Scrape(text, {family.name: family for family in text_string_to_metric_families(text)})


def take_part(device: HandDevice, assignment: types_pb2.Assignment) -> None:
    """Measure, train (a little noise), upload."""
    device.accept(assignment)
    payload, config = device.pull(assignment)
    before = types_pb2.Evaluation(
        phase=types_pb2.EVALUATION_PHASE_BEFORE, rank=device.rank, loss=1.5, accuracy=0.25, rows=40, seconds=0.1
    )
    report = coordinator_pb2.ReportMetricsRequest(assignment=assignment.name, evaluations=[before])
    device.stub.ReportMetrics(report, timeout=60.0)
    assert device.push(assignment, packed(trained(payload)), config).state == State.UPLOAD_STATE_ACCEPTED


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """Two rounds are over, so that a version can be compared with the last, and the third one waits for devices."""
    folder = tmp_path_factory.mktemp("scrape")
    toml = run_toml(
        "watched",
        tiny_bert(folder / "model"),
        lora="max_rank = 4",
        training="steps = 1",
        policy="rounds = 9\nquorum = 2\ndeadline_seconds = 600.0\ngather_seconds = 0.0",
        evaluation="ranks = [4]\nbefore = true\nafter = false",
    )
    with Federation(folder / "federation") as federation:
        federation.start_server()
        manifest = manifest_of(toml)
        token = federation.token(uses=2, max_rank=4)
        for name in NAMES:
            federation.join(name, 4, token)
        devices = [HandDevice(federation.state_dir(name), str(manifest["base_model_fingerprint"])) for name in NAMES]
        try:
            questions = [device.ask() for device in devices]
            federation.until_online(*NAMES)
            federation.create_run(toml, manifest)
            all_take_part(devices, questions)
            federation.wait_run("watched", lambda run: run.version_number == 1, "a version of round 1")
            all_take_part(devices, [device.ask() for device in devices])
            federation.wait_run("watched", lambda run: run.version_number == 2, "a version of round 2")
            yield federation
        finally:
            for device in devices:
                device.close()


def all_take_part(devices: list[HandDevice], questions: list[grpc.Future[coordinator_pb2.WaitForWorkResponse]]) -> None:
    """At the same time: a verdict may wait for the worker, which is still starting."""
    with ThreadPoolExecutor(len(devices)) as threads:
        parts = [
            threads.submit(take_part, device, question.result().assignment)
            for device, question in zip(devices, questions, strict=True)
        ]
        for part in parts:
            part.result()


@pytest.fixture(scope="module")
def page(federation: Federation) -> Scrape:
    """A scrape after states were sampled again, in round 3."""

    def sampled() -> bool:
        seen = scrape(federation)
        lives = sum(sample.value for sample in seen.families["glora_active_rounds"].samples)
        return 'glora_run_version{run="watched"} 2.0' in seen.text and lives == 1

    until(sampled, "the gauges of the run are there", 120.0)
    return scrape(federation)


def test_a_scrape_has_what_the_module_lists_names_kinds_meanings_and_labels(page: Scrape) -> None:
    found = {name: family for name, family in page.families.items() if name.startswith("glora_")}
    listed = {metric.name.removesuffix("_total"): metric for metric in METRICS}
    assert found.keys() == listed.keys()
    for name, metric in listed.items():
        family = found[name]
        assert family.type == ("gauge" if metric.kind is Kind.INFO else metric.kind.value), name
        assert family.documentation == metric.meaning, name
        assert family.samples, f"{name} has no series in a server that has seen a round"
        for sample in family.samples:
            assert sample.labels.keys() - {"le"} == set(metric.labels), sample


def test_prometheus_finds_nothing_to_improve(page: Scrape) -> None:
    said = promtool("check", "metrics", stdin=page.text)
    assert [line for line in said.splitlines() if line.startswith("glora_")] == []


def test_the_numbers_are_those_of_the_rounds(page: Scrape, federation: Federation) -> None:
    assert page.value("glora_rounds_total", outcome="committed") == 2
    assert page.value("glora_versions_total") == 2
    assert page.value("glora_uploads_total", outcome="accepted") == 4
    assert page.value("glora_assignments_total", outcome="accepted_update") == 4
    assert page.value("glora_active_runs", phase="active") == 1
    assert sum(sample.value for sample in page.families["glora_active_rounds"].samples) == 1, "round 3"
    assert page.value("glora_round_quorum", run="watched") == 2
    assert page.value("glora_devices", state="approved") == 2
    assert page.value("glora_model_loss", run="watched", phase="before") == 1.5
    assert page.value("glora_model_accuracy_ratio", run="watched", phase="before") == 0.25
    for phase in ("accept", "download", "train", "upload", "validate"):
        assert page.value("glora_phase_seconds_count", phase=phase) == 4, phase
    for phase in ("aggregate", "commit"):
        assert page.value("glora_phase_seconds_count", phase=phase) == 2, phase
    least, mean, most = (page.value("glora_captured_energy_ratio", stat=stat) for stat in ("min", "mean", "max"))
    assert 0 < least <= mean <= most <= 1 + 1e-6
    assert page.value("glora_aggregation_bias_ratio", stat="max") == 0.0
    assert page.value("glora_coverage_ratio", stat="min") == 1.0
    assert 0 < page.value("glora_principal_angle_radians", stat="max") < 1.6
    assert 0 < page.value("glora_capture_ratio", stat="min") <= 1.0
    assert page.value("glora_influence_ratio", stat="min") > 0
    assert page.value("glora_mean_update_norm", stat="min") > 0
    assert page.value("glora_worker_up") == 1
    assert page.value("glora_worker_resident_bytes") > 50e6
    assert page.value("glora_database_commit_seconds_count") > 10
    assert page.value("glora_http_requests_total", route="/api/v1/runs/{name}", status="200", method="GET") > 0


def test_no_series_names_a_device_an_assignment_or_a_path(page: Scrape, federation: Federation) -> None:
    ids = {str(row[0]) for row in federation.rows("SELECT id FROM devices UNION SELECT id FROM assignments")}
    labels = {
        value for family in page.families.values() for sample in family.samples for value in sample.labels.values()
    }
    assert not labels & (ids | set(NAMES))
    assert "/api/v1/runs/watched" not in labels


def test_dashboards_and_alerts_ask_for_what_is_exported(page: Scrape) -> None:
    dashboards = sorted((DEPLOY / "grafana" / "dashboards").glob("*.json"))
    asked = [expression for path in dashboards for expression in expressions(path)] + [*alert_expressions().values()]
    exported = {sample.name for family in page.families.values() for sample in family.samples} | {"up"}
    for expression in asked:
        assert series_in(expression), expression
        assert series_in(expression) <= exported, expression


def test_dashboards_and_alerts_choose_by_values_that_there_are(page: Scrape) -> None:
    """A panel that asks for a word which no series has would be empty for ever."""
    dashboards = sorted((DEPLOY / "grafana" / "dashboards").glob("*.json"))
    asked = [expression for path in dashboards for expression in expressions(path)] + [*alert_expressions().values()]
    samples = [sample for family in page.families.values() for sample in family.samples]
    matchers = {matcher for expression in asked for matcher in matchers_in(expression)}
    for matcher in matchers:
        if matcher.label in {"job", "status"}:
            continue  # the one is Prometheus' own, and errors of the other have not happened
        values = {sample.labels[matcher.label] for sample in samples if sample.name == matcher.series}
        if matcher.series.startswith("glora_model_"):
            values |= {phase.value for phase in MetricPhase}  # nobody has evaluated the version yet
        for word in matcher.pattern.split("|"):
            assert any(re.fullmatch(word, value) for value in values), f"{matcher}: {values}"
    assert len(matchers) > 10


def test_a_run_that_is_over_has_no_series(page: Scrape, federation: Federation) -> None:
    with federation.api() as api:
        api.post(RunAnswer, "/runs/watched/abort", {"reason": "That is enough."})
    until(lambda: 'run="watched"' not in scrape(federation).text, "the series of the run are gone", 120.0)
