"""What is remembered of rounds and versions: figures, outcomes, agreement, outliers, scores."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from coordinator_world import a_world
from storage_records import assignment, measurement, round_

from glora_server.coordinator.history import (
    agreement,
    module_figures,
    outcome_of,
    round_figures,
    stage_seconds,
    with_outliers,
)
from glora_server.coordinator.messages import EvaluationRecord
from glora_server.coordinator.model import MetricPhase, Page
from glora_server.coordinator.queries_plots import evenly
from glora_server.coordinator.scores import spread_of, version_scores
from glora_server.coordinator.views_history import Contribution, Outcome, Stage, reliability
from glora_server.rounds.assignment import AssignmentPhase
from glora_server.rounds.ids import AssignmentId, DeviceId, RunId, VersionId
from glora_server.rounds.round import RoundPhase
from glora_server.storage.history_codec import modules_from, modules_text
from glora_wire.errors import Reason

DONE = assignment(
    phase=AssignmentPhase.ACCEPTED_UPDATE,
    offered_at=100.0,
    accepted_at=101.0,
    delivered_at=104.0,
    upload_started_at=164.0,
    received_at=170.0,
    closed_at=170.5,
    bytes_down=10,
    bytes_up=20,
)


def made(name: str, capture: float | None, cosine: float | None = 0.6) -> Contribution:
    return Contribution(
        version_id=VersionId("v1"),
        run_id=RunId("r"),
        number=1,
        device_id=DeviceId(name),
        at=0.0,
        share=0.1,
        rows=10,
        update_norm=1.0,
        capture=capture,
        cosine=cosine,
        deviation=None,
        outlier=False,
    )


def test_the_stages_of_a_device_are_the_times_between_its_marks() -> None:
    assert stage_seconds(DONE) == {
        Stage.ACCEPTING: 1.0,
        Stage.DOWNLOADING: 3.0,
        Stage.TRAINING: 60.0,
        Stage.UPLOADING: 6.0,
        Stage.JUDGING: 0.5,
    }
    assert stage_seconds(replace(DONE, delivered_at=None, received_at=None)) == {Stage.ACCEPTING: 1.0}


@pytest.mark.parametrize(
    ("phase", "reason", "outcome"),
    [
        (AssignmentPhase.ACCEPTED_UPDATE, None, Outcome.ACCEPTED),
        (AssignmentPhase.REJECTED, Reason.NON_FINITE, Outcome.REJECTED),
        (AssignmentPhase.EXPIRED, Reason.DEADLINE_PASSED, Outcome.EXPIRED),
        (AssignmentPhase.EXPIRED, Reason.ROUND_CLOSED, Outcome.NOT_NEEDED),
        (AssignmentPhase.COMPLETED, None, None),
        (AssignmentPhase.UPLOADING, None, None),
    ],
)
def test_a_device_is_not_blamed_for_a_round_that_had_enough(
    phase: AssignmentPhase, reason: Reason | None, outcome: Outcome | None
) -> None:
    assert outcome_of(replace(DONE, phase=phase, reason=reason)) is outcome


def test_reliability_counts_rounds_that_waited() -> None:
    assert reliability({Outcome.ACCEPTED: 3, Outcome.FAILED: 1, Outcome.NOT_NEEDED: 9}) == 0.75
    assert reliability({Outcome.NOT_NEEDED: 9}) is None
    assert reliability({}) is None


def test_a_round_is_summed_up() -> None:
    late = replace(DONE, id=AssignmentId("a2"), phase=AssignmentPhase.EXPIRED, reason=Reason.DEADLINE_PASSED)
    round__ = round_(
        phase=RoundPhase.COMMITTED, assignments=(DONE, late), opened_at=100.0, closed_at=172.0, created_at=99.0
    )
    found = round_figures(round__, [2.0, 4.0])
    assert found.outcomes == {Outcome.ACCEPTED: 1, Outcome.EXPIRED: 1}
    assert (found.bytes_down, found.bytes_up, found.seconds, found.aggregating_seconds) == (20, 40, 72.0, 1.5)
    assert found.update_norms is not None
    assert (found.update_norms.least, found.update_norms.median) == (2.0, 3.0)
    never = round_figures(round_(phase=RoundPhase.ABORTED, created_at=5.0, closed_at=6.0), [])
    assert (never.seconds, never.stages, never.update_norms) == (0.0, {}, None)


def test_figures_of_an_earlier_server_are_read() -> None:
    made = module_figures("m", {"eigenvalues": [3.0, 1.0], "clients": [{"share": 1.0, "change_cosine": 0.5}]})
    text = modules_text([made])
    assert modules_from(text) == (made,)
    earlier = json.dumps([entry[:-1] for entry in json.loads(text)])
    assert modules_from(earlier) == (replace(made, consensus=None),)


def test_a_module_is_summed_up() -> None:
    one = module_figures("m", {"eigenvalues": [4.0, 0.0], "captured_energy": 0.9, "truncation_error": None})
    assert (one.spectrum, one.effective_rank) == ((1.0, 0.0), 1.0)
    assert (one.captured_energy, one.truncation_error, one.mean_norm) == (0.9, None, None)
    assert one.consensus is None, "no device was measured"
    clients = [{"share": 0.75, "change_cosine": 1.0}, {"share": 0.25, "change_cosine": -1.0}]
    assert module_figures("m", {"clients": clients}).consensus == pytest.approx(0.5)
    even = module_figures("m", {"eigenvalues": [1.0, 1.0, 1.0, 1.0]})
    assert even.effective_rank == pytest.approx(4.0)
    nothing = module_figures("m", {"eigenvalues": []})
    assert (nothing.spectrum, nothing.effective_rank) == ((), None)


def test_agreement_weighs_modules_with_squared_norms() -> None:
    def client(norm: float, capture: float | None, cosine: float) -> dict[str, object]:
        return {"device_id": "a", "update_norm": norm, "capture": capture, "cosine": cosine}

    modules: list[dict[str, object]] = [
        {"clients": [client(1.0, 1.0, 0.0)]},
        {"clients": [client(2.0, 0.5, 1.0)]},
        {"clients": None},
    ]
    found = agreement(modules)
    assert found.keys() == {DeviceId("a")}
    capture, cosine = found[DeviceId("a")]
    assert capture == pytest.approx((1.0 + 4 * 0.5) / 5)
    assert cosine == pytest.approx(0.8)
    assert agreement([{"clients": [client(0.0, 1.0, 0.0)]}]) == {"a": (None, None)}
    assert agreement([{"clients": [client(1.0, None, 0.0)]}]) == {}


def test_who_lies_far_below_the_others_is_an_outlier() -> None:
    usual = [made(f"d{place}", 0.9 + 0.005 * place) for place in range(9)]
    marked = with_outliers([*usual, made("away", 0.4)])
    assert [item.outlier for item in marked] == [False] * 9 + [True]
    assert marked[-1].deviation is not None
    assert marked[-1].deviation > 10
    by_cosine = with_outliers([*usual, made("away", 0.92, -0.5)])
    assert by_cosine[-1].outlier


def test_devices_that_agree_to_the_third_digit_have_no_outliers() -> None:
    marked = with_outliers([made(f"d{place}", 0.99) for place in range(9)] + [made("near", 0.97)])
    assert not any(item.outlier for item in marked)


def test_a_few_devices_have_no_majority_and_no_outliers() -> None:
    marked = with_outliers([made("a", 0.9), made("b", 0.9), made("c", 0.1)])
    assert [(item.outlier, item.deviation) for item in marked] == [(False, None)] * 3
    unmeasured = with_outliers([made(f"d{place}", None, None) for place in range(6)])
    assert all(item.deviation is None for item in unmeasured)


def test_spreads_are_quartiles_of_what_is_finite() -> None:
    found = spread_of([4.0, 1.0, math.nan, 2.0, 3.0, 5.0, math.inf])
    assert found is not None
    assert (found.least, found.lower, found.median, found.upper, found.greatest) == (1.0, 2.0, 3.0, 4.0, 5.0)
    assert spread_of([math.nan]) is None


def test_a_loss_that_is_no_number_does_not_spoil_the_mean() -> None:
    run_id = RunId("id-first")
    (score,) = version_scores(
        run_id, [measurement("a", loss=1.0, rows=10), measurement("b", loss=math.nan, device_id=DeviceId("x"))]
    )
    assert (score.loss, score.devices) == (1.0, 2)


@pytest.mark.parametrize(("last", "most"), [(0, 10), (9, 10), (10, 10), (1000, 500), (999, 7), (1, 1)])
def test_points_are_left_out_evenly_and_the_newest_stays(last: int, most: int) -> None:
    numbers, step = evenly(0, last, most)
    assert numbers[-1] == last
    assert len(numbers) <= most or most == 1
    assert all(b - a == step for a, b in itertools.pairwise(numbers))


async def test_what_is_measured_while_a_round_goes_on_is_summed_up_when_it_ends(tmp_path: Path) -> None:
    item = EvaluationRecord(phase=MetricPhase.AFTER, rank=4, loss=0.5, accuracy=0.75, rows=10, seconds=0.1)
    async with a_world(tmp_path) as world:
        phones = [await world.phone(name) for name in "ab"]
        run = await world.start_run(quorum=2, target_devices=2, rounds=1)
        offers = await asyncio.gather(*(phone.offer() for phone in phones))

        async def push(place: int) -> None:
            phone, offer = phones[place], offers[place]
            assert (await phone.push(offer, phone.train(offer))).state == "accepted"

        async def report(place: int) -> None:
            await world.now.devices.measured(
                await phones[place].me(), offers[place].assignment.id, [item], complete=False
            )

        async def devices() -> list[int]:
            found = await world.read(lambda uow: uow.history.scores(run.id, [0]))
            return [score.devices for score in found if score.phase is MetricPhase.AFTER]

        await push(0)
        await report(0)
        assert await devices() == [], "a thousand devices would each read what the others measured"
        assert [score.devices for score in (await world.run()).scores] == [1], "it can be seen at once all the same"
        await push(1)
        await world.until(run.id, lambda uow: uow.runs.get(run.id).rounds_done == 1)
        assert await devices() == [1]
        await report(1)
        assert await devices() == [2]


async def test_a_whole_round_is_remembered(tmp_path: Path) -> None:
    async with a_world(tmp_path) as world:
        phones = [await world.phone(name) for name in "ab"]
        asking = [asyncio.create_task(phone.work()) for phone in phones]
        run = await world.start_run(quorum=2, target_devices=2, rounds=1)
        await asyncio.gather(*asking)
        await world.until(run.id, lambda uow: uow.runs.get(run.id).rounds_done == 1)
        queries = world.now.queries
        (ancestor, start) = (await queries.lineage("first", Page())).items
        assert (ancestor.version.number, ancestor.parent_number, ancestor.contributors) == (1, 0, 2)
        assert sum(item.share for item in ancestor.largest) == pytest.approx(1.0)
        assert (start.version.number, start.parent_number, start.contributors) == (0, None, 0)
        series = await queries.series("first")
        assert [figures.outcomes for figures in series.rounds] == [{Outcome.ACCEPTED: 2}]
        assert series.rounds[0].bytes_up > 0
        detail = await queries.device_detail("a")
        assert (detail.outcomes, detail.reliability) == ({Outcome.ACCEPTED: 1}, 1.0)
        assert [item.number for item in detail.agreement] == [1]
        work = (await queries.device_history("a", Page())).items
        assert (work[-1].run_name, work[-1].round_number) == ("first", 1)
        view = await queries.round("first", 1)
        assert (view.devices, view.accepted) == (2, 2)
