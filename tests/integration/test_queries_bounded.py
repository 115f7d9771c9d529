"""No page reads more rows than it shows, however long the history is: rows are counted as the database gives them."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import pytest_asyncio
from synthetic_history import MAIN, Size, fill_store
from watched_queries import Reading, counted, system_at

from glora_server.coordinator.hub import Hub
from glora_server.coordinator.model import DeviceState, Page
from glora_server.coordinator.queries import Queries
from glora_server.coordinator.views_history import AuditFilter, DeviceFilter, DeviceOrder, Outcome
from glora_server.coordinator.views_plots import Severity
from glora_server.rounds.assignment import AssignmentPhase
from glora_server.storage.store import SqlStore
from glora_wire.errors import GloraError, Reason

NOW = 1_800_000_000.0
SIZE = Size(devices=240, rounds=60, per_round=24, live=200)
PAGE = Page(size=20)


@pytest.fixture
def reading(monkeypatch: pytest.MonkeyPatch) -> Reading:
    return counted(monkeypatch.setattr)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def store(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[SqlStore]:
    folder = tmp_path_factory.mktemp("history")
    opened = SqlStore.open(f"sqlite:///{folder / 'glora.sqlite3'}", clock=lambda: NOW)
    await fill_store(opened, SIZE, at=NOW)
    yield opened
    await opened.close()


@pytest_asyncio.fixture(loop_scope="module")
async def queries(store: SqlStore) -> Queries:
    made = Queries(
        store=store,
        hub=Hub(),
        clock=lambda: NOW,
        catalogue=None,  # type: ignore[arg-type]  # no question of these tests asks it
        system_view=system_at(NOW),
    )
    await made.roster.entries()
    return made


pytestmark = pytest.mark.asyncio(loop_scope="module")

Question = Callable[[Queries], Awaitable[object]]
BOUNDS: dict[str, tuple[Question, int]] = {
    "runs": (lambda q: q.runs(PAGE), 400),
    "plain runs": (lambda q: q.plain_runs(PAGE), 25),
    "run": (lambda q: q.run(MAIN), 800),
    "rounds": (lambda q: q.rounds(MAIN, PAGE), 60),
    "round": (lambda q: q.round(MAIN, 30), 60),
    "live round": (lambda q: q.round(MAIN, SIZE.rounds + 1), 420),
    "assignments": (lambda q: q.assignments(MAIN, SIZE.rounds + 1, PAGE), 30),
    "devices": (lambda q: q.devices(PAGE), 60),
    "device lines": (lambda q: q.device_lines(PAGE), 80),
    "device": (lambda q: q.device_detail("pi-0012"), 80),
    "device history": (lambda q: q.device_history("pi-0012", PAGE), 60),
    "audit": (lambda q: q.audit(PAGE), 25),
    "lineage": (lambda q: q.lineage(MAIN, PAGE), 200),
    "exports": (lambda q: q.exports(MAIN, PAGE), 80),
    "contributions": (lambda q: q.contributions(MAIN, 30, PAGE), 30),
    "measurements": (lambda q: q.measurements(MAIN, PAGE), 25),
    "diagnostics": (lambda q: q.diagnostics(MAIN, SIZE.rounds, PAGE), 25),
    "versions": (lambda q: q.versions(MAIN, PAGE), 25),
    "alerts": (lambda q: q.alerts(), 60),
    "system": (lambda q: q.system(), 5),
}


@pytest.mark.parametrize("name", BOUNDS)
async def test_a_page_reads_what_it_shows(queries: Queries, reading: Reading, name: str) -> None:
    ask, bound = BOUNDS[name]
    await ask(queries)
    assert reading.rows <= bound, f"{name} read {reading.rows} rows"


async def test_what_is_plotted_is_bounded(queries: Queries, reading: Reading, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glora_server.coordinator.queries_plots.MOST_POINTS", 10)
    series = await queries.series(MAIN)
    numbers = [point.number for point in series.versions]
    assert len(numbers) <= 10
    assert numbers[-1] == SIZE.rounds
    assert {b - a for a, b in itertools.pairwise(numbers)} == {series.step}
    assert {figures.number for figures in series.rounds} <= {*numbers, 0}
    assert reading.rows < 10 * 20
    monkeypatch.setattr("glora_server.coordinator.queries_plots.MOST_MAP_ROUNDS", 5)
    monkeypatch.setattr("glora_server.coordinator.queries_plots.MOST_MAP_MODULES", 7)
    spectrum = await queries.spectrum(MAIN)
    assert (len(spectrum.modules), spectrum.modules_left_out) == (7, 17)
    assert len(spectrum.numbers) <= 5
    assert max(spectrum.numbers) == SIZE.rounds
    assert len(spectrum.cells) == 7 * len(spectrum.numbers)
    assert all(abs(sum(cell.shares) - 1) < 1e-4 for cell in spectrum.cells)


async def test_the_roster_is_read_once_for_many_questions(queries: Queries, reading: Reading) -> None:
    await queries.device_counts()
    await queries.device_counts()
    assert reading.rows == 0
    queries.hub.device_changed(next(iter(await queries.roster.entries())))
    await queries.device_counts()
    assert reading.rows > SIZE.devices


async def test_pages_follow_one_another(queries: Queries) -> None:
    async def everything(ask: Callable[[Page], Awaitable[object]]) -> list[object]:
        found: list[object] = []
        token = ""
        while True:
            part = await ask(Page(size=37, token=token))
            found += part.items  # type: ignore[attr-defined]  # a Listing of whatever
            token = part.next_token  # type: ignore[attr-defined]
            if not token:
                return found

    for order in DeviceOrder:
        listed = await everything(lambda page, order=order: queries.devices(page, DeviceFilter(order=order)))  # type: ignore[misc]
        names = [view.device.name for view in listed]  # type: ignore[attr-defined]
        assert len(names) == len(set(names)) == SIZE.devices, order
    assigned = await everything(lambda page: queries.assignments(MAIN, SIZE.rounds + 1, page))
    assert len({view.assignment.id for view in assigned}) == SIZE.live  # type: ignore[attr-defined]
    measured = await everything(lambda page: queries.measurements(MAIN, page))
    keys = [(item.version_number, item.rank, item.device_id) for item in measured]  # type: ignore[attr-defined]
    assert keys == sorted(keys)
    assert len(measured) > 1000


async def test_devices_are_filtered_and_sorted(queries: Queries) -> None:
    async def names(**wanted: object) -> list[str]:
        found = await queries.devices(Page(size=500), DeviceFilter(**wanted))  # type: ignore[arg-type]
        return [view.device.name for view in found.items]

    pending = await names(state=DeviceState.PENDING)
    assert pending == ["jetson-0049", "phone-0099", "jetson-0149", "phone-0199"]
    assert all(name.startswith(("pi-", "jetson-", "laptop-", "phone-")) for name in await names())
    assert {name.partition("-")[0] for name in await names(text="ANDROID")} == {"phone"}
    berlin = await names(tag="berlin")
    assert 0 < len(berlin) < SIZE.devices
    by_name = await names(order=DeviceOrder.NAME)
    assert by_name == sorted(by_name)
    assert await names(online=True) == []
    here = (await queries.roster.entries())[next(iter(await queries.roster.entries()))]
    queries.hub.arrive(here.id, here.profile, NOW)
    assert await names(online=True) == [here.name]
    assert (await names(order=DeviceOrder.LAST_SEEN))[0] == here.name
    assert len(await names(online=False)) == SIZE.devices - 1


async def test_a_page_token_of_another_order_is_refused(queries: Queries) -> None:
    token = (await queries.devices(Page(size=5), DeviceFilter(order=DeviceOrder.NAME))).next_token
    for wrong in (token, "x", "bm9uc2Vuc2U"):
        with pytest.raises(GloraError) as raised:
            await queries.devices(Page(size=5, token=wrong))
        assert raised.value.reason is Reason.REQUEST_INVALID


async def test_the_counts_of_a_round_are_those_of_its_assignments(queries: Queries) -> None:
    for number in (7, SIZE.rounds + 1):
        view = await queries.round(MAIN, number)
        every = (await queries.assignments(MAIN, number, Page(size=1000))).items
        assert view.devices == len(every)
        for phase in AssignmentPhase:
            assert view.counts.get(phase, 0) == sum(item.assignment.phase is phase for item in every), phase


async def test_a_round_that_is_not_there_is_named(queries: Queries) -> None:
    with pytest.raises(GloraError, match="no round 999"):
        await queries.round(MAIN, 999)
    with pytest.raises(GloraError, match="no attempt 3 at round 7"):
        await queries.round(MAIN, 7, 3)


async def test_a_device_that_looks_away_is_an_outlier(queries: Queries) -> None:
    away = await queries.device_detail("jetson-0013")
    usual = await queries.device_detail("pi-0012")
    assert sum(item.outlier for item in away.agreement) >= 0.8 * len(away.agreement) > 0
    assert sum(item.outlier for item in usual.agreement) <= 0.2 * len(usual.agreement)
    assert usual.reliability == usual.outcomes[Outcome.ACCEPTED] / sum(
        number for outcome, number in usual.outcomes.items() if outcome is not Outcome.NOT_NEEDED
    )
    history = (await queries.device_history("pi-0012", Page(size=1000))).items
    assert [item.view.assignment.offered_at for item in history] == sorted(
        (item.view.assignment.offered_at for item in history), reverse=True
    )
    assert {item.run_name for item in history} >= {MAIN}


async def test_the_audit_is_filtered(queries: Queries) -> None:
    page = Page(size=1000)
    marias = (await queries.audit(page, AuditFilter(actor="maria"))).items
    assert {entry.actor for entry in marias} == {"maria"}
    runs = (await queries.audit(page, AuditFilter(action="run."))).items
    assert {entry.action for entry in runs} == {"run.pause", "run.resume", "run.edit"}
    assert len((await queries.audit(page, AuditFilter(action="run.pause"))).items) == 50
    late = (await queries.audit(page, AuditFilter(since=NOW - 86400, until=NOW - 7200))).items
    assert len(late) == 11
    assert all(NOW - 86400 <= entry.at < NOW - 7200 for entry in late)
    assert (await queries.audit(page, AuditFilter(target="nobody"))).items == ()


async def test_exports_say_how_good_each_rank_is(queries: Queries) -> None:
    found = (await queries.exports(MAIN, Page())).items
    assert [item.version.number for item in found] == list(range(SIZE.rounds, SIZE.rounds - 5, -1))
    for item in found:
        assert [score.rank for score in item.scores] == [1, 2, 4, 8, 16]
    accuracies = [score.accuracy for score in found[0].scores]
    assert accuracies[-1] > accuracies[0]


async def test_alerts_are_sentences_the_worst_first(queries: Queries) -> None:
    found = await queries.alerts()
    assert {alert.code for alert in found} >= {"disk_low", "devices_pending", "no_devices", "certificates_expire"}
    order = [Severity.CRITICAL, Severity.WARNING, Severity.INFO]
    assert [order.index(alert.severity) for alert in found] == sorted(order.index(alert.severity) for alert in found)
    assert all(alert.message.endswith((".", "!")) for alert in found)
