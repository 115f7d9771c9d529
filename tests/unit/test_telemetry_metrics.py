import asyncio
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TypeVar, cast

import pytest
from prometheus_client.parser import text_string_to_metric_families

from glora_server.coordinator.hub import Hub
from glora_server.coordinator.model import Device, DeviceState, Profile
from glora_server.coordinator.observer import Quality
from glora_server.coordinator.ports import UnitOfWork
from glora_server.coordinator.quality import quality_of
from glora_server.rounds.assignment import Assignment, AssignmentKind, AssignmentPhase
from glora_server.rounds.ids import AssignmentId, DeviceId, RoundId, RunId, VersionId
from glora_server.rounds.policy import RoundPolicy
from glora_server.rounds.round import Round, RoundPhase
from glora_server.telemetry.metrics import METRIC_NAMES, Metrics, metric_table
from glora_wire.errors import GloraError, Reason, Refusal

T = TypeVar("T")


def value(metrics: Metrics, name: str, **labels: str) -> float:
    found = metrics.registry.get_sample_value(name, labels)
    assert found is not None, f"{name}{labels} is not exported"
    return found


def scrape_names(metrics: Metrics) -> set[str]:
    """Names as a Prometheus server would store them, histograms by their base name."""
    text, content_type = metrics.text()
    assert content_type.startswith("text/plain")
    names = set()
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            histogram = family.type == "histogram"
            names.add(family.name if histogram else sample.name)
    return names


def test_scrape_shows_exactly_the_listed_metrics_from_the_start() -> None:
    ours = {name for name in scrape_names(Metrics()) if name.startswith("glora_")}
    assert ours == set(METRIC_NAMES)
    assert len(METRIC_NAMES) == len(set(METRIC_NAMES))


def test_table_has_a_row_with_a_meaning_for_every_metric() -> None:
    rows = metric_table().splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == list(METRIC_NAMES)
    assert all(row.rstrip(" |").split(" | ")[-1].endswith(".") for row in rows)


def test_no_label_can_name_a_device_or_a_run() -> None:
    text = Metrics().text()[0].decode()
    labels = {
        label
        for family in text_string_to_metric_families(text)
        if family.name.startswith("glora_")
        for sample in family.samples
        for label in sample.labels
    }
    assert labels == {"method", "code", "kind", "outcome", "reason", "state", "version", "le"}


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


def test_updates_are_counted_by_verdict() -> None:
    metrics = Metrics()
    metrics.upload_judged(None)
    metrics.upload_judged(Refusal(reason=Reason.NON_FINITE, message="NaN"))
    quality = Quality(captured_energy=0.9, truncation_error=0.3, eigengap=0.1, consensus=0.7)
    metrics.aggregated(seconds=2.0, updates=3, quality=quality)
    assert value(metrics, "glora_uploads_total", outcome="accepted", reason="") == 1
    assert value(metrics, "glora_uploads_total", outcome="rejected", reason="NON_FINITE") == 1
    assert value(metrics, "glora_versions_total") == 1
    assert value(metrics, "glora_aggregation_seconds_sum") == 2.0
    for name, expected in asdict(quality).items():
        assert value(metrics, f"glora_{name}_ratio") == expected


def test_nothing_measured_is_no_number_rather_than_zero() -> None:
    metrics = Metrics()
    for field_ in fields(Quality):
        assert math.isnan(value(metrics, f"glora_{field_.name}_ratio"))


def test_quality_is_the_mean_over_modules_of_what_was_measured() -> None:
    first = {
        "captured_energy": 0.9,
        "truncation_error": 0.2,
        "eigenvalues": [0.5, 0.25],
        "eigengap": 0.25,
        "clients": [{"share": 0.75, "change_cosine": 1.0}, {"share": 0.25, "change_cosine": -1.0}],
    }
    second: dict[str, object] = {
        "captured_energy": 0.7,
        "truncation_error": None,
        "eigenvalues": [],
        "eigengap": None,
        "clients": [],
    }
    found = quality_of([first, second, {}])
    assert found.captured_energy == pytest.approx(0.8)
    assert (found.truncation_error, found.eigengap, found.consensus) == (0.2, 0.5, 0.5)
    assert all(math.isnan(number) for number in asdict(quality_of([])).values())


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
    assert value(metrics, "glora_assignments_total", outcome="accepted_update") == 1
    assert value(metrics, "glora_assignments_total", outcome="expired") == 2
    assert value(metrics, "glora_assignments_total", outcome="declined") == 1
    assert value(metrics, "glora_uploads_total", outcome="discarded", reason="ROUND_CLOSED") == 1
    assert (
        metrics.registry.get_sample_value("glora_uploads_total", {"outcome": "discarded", "reason": "DEADLINE_PASSED"})
        is None
    ), "that device had uploaded nothing"


@dataclass(frozen=True, slots=True)
class Stats:
    peak_bytes: int
    restarts: int


@dataclass(slots=True)
class FakeWorker:
    counters: Stats = Stats(1000, 2)

    def stats(self) -> Stats:
        return self.counters


@dataclass(slots=True)
class FakeRows:
    devices_: tuple[Device, ...] = ()

    @property
    def devices(self) -> "FakeRows":
        return self

    @property
    def rounds(self) -> "FakeRows":
        return self

    def all(self) -> tuple[Device, ...]:
        return self.devices_

    def live(self) -> tuple[Round, ...]:
        return (round_of(RoundPhase.COLLECTING),)


@dataclass(slots=True)
class FakeStore:
    rows: FakeRows
    away: bool = False

    async def read(self, work: Callable[[UnitOfWork], T]) -> T:
        if self.away:
            raise GloraError(Reason.DATABASE_UNUSABLE, "It is away.")
        return work(cast("UnitOfWork", self.rows))

    async def write(self, work: Callable[[UnitOfWork], T]) -> T:
        raise AssertionError(f"sampling writes nothing, but it called {work}")


@dataclass(slots=True)
class FakeServer:
    store: FakeStore
    hub: Hub = field(default_factory=Hub)
    numerics: FakeWorker = field(default_factory=FakeWorker)


def device(name: str, state: DeviceState) -> Device:
    return Device(
        id=DeviceId(name),
        name=name,
        state=state,
        declared_rank=1,
        granted_rank=1,
        token_id=None,
        key_sha256=name,
        certificate_pem="",
        certificate_serial="",
        certificate_expires_at=0.0,
        created_at=0.0,
    )


async def watch_briefly(metrics: Metrics, server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glora_server.telemetry.sampling._LAG_EVERY_SECONDS", 0.001)
    monkeypatch.setattr("glora_server.telemetry.sampling._STATES_EVERY_SECONDS", 0.002)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(metrics.watch(server), 0.05)


async def test_states_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    here, away = device("here", DeviceState.APPROVED), device("away", DeviceState.APPROVED)
    server = FakeServer(FakeStore(FakeRows((here, away, device("new", DeviceState.PENDING)))))
    server.hub.arrive(here.id, Profile(), 0.0)
    metrics = Metrics()
    await watch_briefly(metrics, server, monkeypatch)
    assert value(metrics, "glora_devices", state="approved") == 2
    assert value(metrics, "glora_devices", state="pending") == 1
    assert value(metrics, "glora_devices", state="suspended") == 0
    assert value(metrics, "glora_online_devices") == 1
    assert value(metrics, "glora_active_rounds") == 1
    assert value(metrics, "glora_worker_peak_bytes") == 1000
    assert value(metrics, "glora_worker_restarts_total") == 2
    assert value(metrics, "glora_event_loop_lag_seconds_count") >= 2


async def test_sampling_outlives_a_database_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    server = FakeServer(FakeStore(FakeRows(), away=True))
    metrics = Metrics()
    await watch_briefly(metrics, server, monkeypatch)
    assert value(metrics, "glora_worker_peak_bytes") == 1000
    assert value(metrics, "glora_active_rounds") == 0
