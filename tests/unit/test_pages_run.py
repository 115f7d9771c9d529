"""What the pages of runs are made of, without a page."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from fake_server import FakeServer
from storage_records import assignment, evaluation

from glora_dashboard.pages import parts, run_charts, run_parts
from glora_dashboard.pages.chart_numbers import MOST_ROWS, numbers_of
from glora_dashboard.pages.charts import line, plot
from glora_dashboard.pages.overview import alert_list, run_card
from glora_dashboard.pages.policy_form import changes_of
from glora_dashboard.pages.quality import best_by_version, gain_words, newest_words
from glora_dashboard.pages.run_actions import possible_actions
from glora_dashboard.pages.signs import ASSIGNMENT_SIGNS, ROUND_TONES, RUN_TONES, SEVERITY_SIGNS, work_sign
from glora_server.coordinator.model import MetricPhase
from glora_server.coordinator.policy_table import POLICY_KEYS
from glora_server.coordinator.views import RankScore, RunView
from glora_server.coordinator.views_history import Spread, VersionScore
from glora_server.coordinator.views_plots import Alert, QualityPoint, RunSeries, Severity, SpectrumCell, SpectrumMap
from glora_server.rounds.assignment import AssignmentPhase
from glora_server.rounds.ids import RunId
from glora_server.rounds.policy import RoundPolicy, Sampling, TooFew
from glora_server.rounds.round import RoundPhase
from glora_server.rounds.run import RunPhase


@pytest.fixture
async def view() -> RunView:
    return await FakeServer.with_things().run("demo")


def score(version: int, rank: int, accuracy: float, phase: MetricPhase = MetricPhase.BEFORE) -> RankScore:
    return RankScore(version_number=version, rank=rank, phase=phase, accuracy=accuracy, loss=1.0, rows=10, devices=1)


def point(version: int, rank: int, accuracy: float, *, largest: bool, phase: MetricPhase) -> QualityPoint:
    spread = Spread(least=0.1, lower=accuracy - 0.1, median=accuracy, upper=accuracy + 0.1, greatest=0.9)
    found = VersionScore(
        run_id=RunId("r"),
        version_number=version,
        phase=phase,
        rank=rank,
        devices=3,
        rows=30,
        accuracy=accuracy,
        loss=math.nan,
        accuracies=spread,
        losses=None,
    )
    return QualityPoint(score=found, largest=largest)


def series(*points: QualityPoint) -> RunSeries:
    return RunSeries(step=1, quality=points, versions=(), rounds=())


async def test_quality_is_that_of_the_largest_rank_before_local_training(view: RunView) -> None:
    scores = (score(0, 2, 0.1), score(0, 8, 0.2), score(1, 8, 0.5), score(1, 8, 0.9, MetricPhase.AFTER))
    points = best_by_version(replace(view, scores=(*scores, score(2, 16, math.nan))))
    assert [(item.version_number, item.accuracy) for item in points] == [(0, 0.2), (1, 0.5)]
    assert gain_words(points) == "+30.0 points since the start"
    assert gain_words(points[1:]) == ""


async def test_gain_names_the_version_that_it_is_measured_from(view: RunView) -> None:
    points = best_by_version(replace(view, scores=(score(951, 8, 0.5), score(1000, 8, 0.4))))
    assert gain_words(points) == "-10.0 points since version 951"
    assert newest_words(points, 1000) == gain_words(points)
    assert newest_words(points, 1004) == "version 1,000, -10.0 points since version 951", "1,004 is not measured yet"
    assert newest_words((), 3) == ""


async def test_the_overview_says_of_which_version_an_older_accuracy_is(view: RunView) -> None:
    measured = replace(view, scores=(score(4, 8, 0.5),))
    assert "accuracy of version 4<" in run_card(replace(measured, version_number=5))
    assert "accuracy<" in run_card(replace(measured, version_number=4))
    assert "Not measured yet" in run_card(replace(view, scores=()))


@pytest.mark.parametrize(
    ("phase", "possible"),
    [
        (RunPhase.CREATED, {"start", "edit", "abort", "extend"}),
        (RunPhase.ACTIVE, {"pause", "edit", "abort", "extend"}),
        (RunPhase.PAUSED, {"resume", "edit", "abort", "extend"}),
        (RunPhase.COMPLETED, set()),
        (RunPhase.FAILED, set()),
        (RunPhase.ABORTED, set()),
    ],
)
async def test_only_what_is_possible_is_offered(view: RunView, phase: RunPhase, possible: set[str]) -> None:
    assert view.round is not None
    open_round = replace(view.round, round=replace(view.round.round, phase=RoundPhase.COLLECTING))
    shown = replace(view, run=replace(view.run, phase=phase), round=open_round)
    assert possible_actions(shown) == possible
    assert "extend" not in possible_actions(replace(shown, round=None))


async def test_a_run_says_what_it_waits_for_in_words_of_the_page(view: RunView) -> None:
    created = replace(view, run=replace(view.run, phase=RunPhase.CREATED), waiting="glora run start demo")
    assert "glora run" not in run_parts.sentence(created)
    done = replace(view, run=replace(view.run, phase=RunPhase.COMPLETED, rounds_done=12), waiting="")
    assert run_parts.sentence(done).startswith("All 12 rounds are done.")


async def test_names_are_escaped_wherever_they_stand(view: RunView) -> None:
    nasty = '"><script>alert(1)</script>'
    shown = replace(view, run=replace(view.run, name=nasty), waiting=nasty)
    for markup in (run_card(shown), run_parts.tiles(shown), run_parts.settings(shown), run_parts.this_round(shown)):
        assert "<script>" not in markup


def test_a_device_that_evaluates_does_not_train() -> None:
    assert work_sign(evaluation(phase=AssignmentPhase.DELIVERED)) == ("active", "evaluating")
    assert work_sign(evaluation(phase=AssignmentPhase.FAILED)) == ASSIGNMENT_SIGNS[AssignmentPhase.FAILED]
    assert work_sign(assignment(phase=AssignmentPhase.DELIVERED)) == ("active", "training")


@pytest.mark.parametrize(("points", "empty"), [([], True), ([(1, 0.5)], False)])
def test_a_chart_without_numbers_says_so(points: list[tuple[int, float | None]], empty: bool) -> None:
    title = plot([line("a", points, colour="red")])["title"]
    assert isinstance(title, dict)
    assert title["show"] is empty


def test_an_empty_heat_map_says_so() -> None:
    nothing = SpectrumMap(modules=(), numbers=(), cells=(), modules_left_out=0)
    title = run_charts.spectrum_options(nothing)["title"]
    assert isinstance(title, dict)
    assert title["show"] is True


def test_every_state_has_a_sign_of_its_own() -> None:
    assert set(RUN_TONES) == set(RunPhase)
    assert set(ROUND_TONES) == set(RoundPhase)
    assert set(ASSIGNMENT_SIGNS) == set(AssignmentPhase)
    assert set(SEVERITY_SIGNS) == set(Severity)
    shapes = [str(parts.icon(tone)) for tone in parts.TONES]
    assert len(set(shapes)) == len(shapes), "colour must not be the only difference"


def test_no_alert_leaves_no_trace() -> None:
    assert alert_list((), leads_to=lambda _: True) == ""


def curves(options: dict[str, Any]) -> dict[str, list[Any]]:
    """Data by name: ECharts' own format."""
    return {item.get("name", ""): item["data"] for item in options["series"]}


def test_quality_prefers_what_evaluating_devices_measured() -> None:
    both = series(
        point(1, 8, 0.5, largest=True, phase=MetricPhase.BEFORE),
        point(1, 8, 0.7, largest=True, phase=MetricPhase.VERSION),
    )
    assert run_charts.telling_phase(both) is MetricPhase.VERSION
    drawn = curves(run_charts.quality_options(both, loss=False))
    assert drawn["rank 8"] == [["1", 0.7]]
    assert "largest rank" not in drawn


def test_ranks_are_drawn_apart_from_the_largest_of_each_version() -> None:
    mixed = series(
        point(1, 4, 0.4, largest=True, phase=MetricPhase.BEFORE),
        point(2, 4, 0.5, largest=False, phase=MetricPhase.BEFORE),
        point(2, 8, 0.6, largest=True, phase=MetricPhase.BEFORE),
    )
    drawn = curves(run_charts.quality_options(mixed, loss=False))
    assert drawn["largest rank"] == [["1", 0.4], ["2", 0.6]]
    assert drawn["rank 4"] == [["1", 0.4], ["2", 0.5]]


def test_a_loss_that_is_no_number_leaves_a_gap() -> None:
    options = run_charts.quality_options(series(point(1, 4, 0.4, largest=True, phase=MetricPhase.BEFORE)), loss=True)
    assert curves(options)["rank 4"] == [["1", None]]


def test_charts_of_nothing_are_empty_not_broken() -> None:
    nothing = series()
    spectrum = SpectrumMap(modules=(), numbers=(), cells=(), modules_left_out=0)
    for draw in (
        run_charts.energy_options,
        run_charts.norm_options,
        run_charts.bytes_options,
        run_charts.seconds_options,
    ):
        assert draw(nothing)["series"]
    assert run_charts.quality_options(nothing, loss=False)["series"]
    assert curves(run_charts.spectrum_options(spectrum)) == {"": []}


def test_a_chart_s_numbers_are_a_table_too() -> None:
    first, second = (point(n, 8, 0.2 + 0.2 * n, largest=True, phase=MetricPhase.BEFORE) for n in (1, 2))
    drawn = series(replace(first, score=replace(first.score, accuracies=None)), second)
    table = numbers_of(run_charts.quality_options(drawn, loss=False), label="Accuracy")
    assert "middle half of devices, from" in table
    newest, oldest = '<tr><th scope="row">2</th>', '<tr><th scope="row">1</th>'
    assert table.index(newest) < table.index(oldest)
    assert f"{newest}<td>50.0 %</td><td>70.0 %</td><td>60.0 %</td></tr>" in table
    assert f"{oldest}<td>–</td><td>–</td><td>40.0 %</td></tr>" in table


def test_a_chart_s_table_is_bounded_and_says_so() -> None:
    many = [point(number, 4, 0.5, largest=True, phase=MetricPhase.BEFORE) for number in range(1, 501)]
    table = numbers_of(run_charts.quality_options(series(*many), loss=True), label="Loss")
    assert table.count('<th scope="row">') == MOST_ROWS
    assert f"The newest {MOST_ROWS} of 500." in table
    assert numbers_of(run_charts.quality_options(series(), loss=True), label="Loss") == ""


def test_the_heat_map_s_numbers_are_its_newest_columns() -> None:
    cells = tuple(
        SpectrumCell(
            module=0, number=index, shares=(1.0,), effective_rank=3.0, consensus=index / 16, captured_energy=0.9
        )
        for index in range(12)
    )
    spectrum = SpectrumMap(modules=("<query>",), numbers=tuple(range(1, 13)), cells=cells, modules_left_out=0)
    table = numbers_of(run_charts.spectrum_options(spectrum), label="Consensus")
    assert '<th scope="row">&lt;query&gt;</th><td>0.25</td>' in table
    assert "version 12</th>" in table
    assert "The newest 8 of 12 versions." in table


def test_the_heat_map_names_each_cell_by_module_and_version() -> None:
    cell = SpectrumCell(module=1, number=0, shares=(0.7, 0.3), effective_rank=1.84, consensus=0.52, captured_energy=0.9)
    spectrum = SpectrumMap(modules=("l.0.query", "l.1.<query>"), numbers=(7,), cells=(cell,), modules_left_out=0)
    [[column, row, value, words]] = curves(run_charts.spectrum_options(spectrum))[""]
    assert (column, row, value) == (0, 1, 0.52)
    assert "l.1.&lt;query&gt;" in words
    assert "version 7" in words
    assert "1.84 effective directions" in words
    assert "70 %, 30 %" in words


def test_a_strategy_without_a_spectrum_has_a_heat_map_too() -> None:
    cell = SpectrumCell(module=0, number=0, shares=(), effective_rank=None, consensus=-0.25, captured_energy=None)
    spectrum = SpectrumMap(modules=("query",), numbers=(1,), cells=(cell,), modules_left_out=0)
    options = run_charts.spectrum_options(spectrum)
    [[*_, value, words]] = curves(options)[""]
    assert value == -0.25
    assert "directions" not in words
    assert isinstance(options["visualMap"], dict)
    assert (options["visualMap"]["min"], options["visualMap"]["max"]) == (-0.25, 1.0)


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["a.b.0.q.w", "a.b.1.q.w"], ["0", "1"]),
        (["a.0.query", "a.0.value"], ["query", "value"]),
        (["a.0.query", "a.11.value"], ["0.query", "11.value"]),
        (["query", "value"], ["query", "value"]),
        (["x.y"], ["x.y"]),
        ([], []),
        (["same", "same"], ["same", "same"]),
        (["a", "a.b"], ["a", "a.b"]),
    ],
)
def test_module_names_lose_what_they_share(names: list[str], short: list[str]) -> None:
    assert run_charts.short_names(names) == short


def test_only_what_was_changed_in_the_policy_is_sent_with_its_type() -> None:
    before = RoundPolicy(rounds=10, tags=("lab",))
    same = {key: getattr(before, key) for key in POLICY_KEYS} | {"tags": "lab", "rounds": 10.0, "too_few": "fail"}
    assert changes_of(before, same) == {}
    entered = same | {"rounds": 12.0, "deadline_seconds": 60, "tags": " lab, gpu ,", "sampling": "rank", "quorum": None}
    assert changes_of(before, entered) == {
        "rounds": 12,
        "deadline_seconds": 60.0,
        "tags": ["lab", "gpu"],
        "sampling": Sampling.RANK.value,
        "quorum": None,
    }
    assert isinstance(changes_of(before, entered)["rounds"], int)
    assert changes_of(replace(before, too_few=TooFew.WAIT), same)["too_few"] == "fail"


def test_a_sparkline_stays_in_its_box() -> None:
    markup = parts.sparkline([0.2, 0.2, 0.2], label="flat")
    assert 'points="3.0,28.0 60.0,28.0 117.0,28.0"' in markup
    assert parts.sparkline([0.5], label="one") == ""


def test_only_the_worst_alerts_stand_before_the_runs() -> None:
    alerts = [
        Alert(severity=Severity.WARNING, code="device_rejected", message=f"m{i}", target=f"d{i}") for i in range(5)
    ]
    few = str(alert_list(alerts[:3], leads_to=lambda _: True))
    many = str(alert_list(alerts, leads_to=lambda address: address == "/devices/d4"))
    assert "<details" not in few
    assert "<summary>2 alerts more</summary>" in many
    assert many.index("m2") < many.index("<details") < many.index("m3")
    assert few.count("<a ") == 3
    assert many.count("<a ") == 1
