"""Small parts of the coordinator: presence, signals, sentences, scores, limits, weights' inputs."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from coordinator_world import MANIFEST, PROFILE, config, eventually, payload, spec
from round_cases import Driver, offered, planned
from storage_records import measurement, run
from tiny_numerics import Array

from glora_server.coordinator import shards as coordinator_shards
from glora_server.coordinator.expectations import check_file, check_scales, config_json, max_upload_bytes, upload_specs
from glora_server.coordinator.folding import summarise
from glora_server.coordinator.hub import Hub, Signals
from glora_server.coordinator.model import MetricPhase
from glora_server.coordinator.scores import version_scores
from glora_server.coordinator.shards import shards
from glora_server.coordinator.staffing import standing_refusal
from glora_server.coordinator.views import AssignmentView, LiveProgress, RoundView
from glora_server.coordinator.waiting import span, why_it_waits
from glora_server.rounds.assignment import AssignmentPhase
from glora_server.rounds.ids import AssignmentId, DeviceId, RunId
from glora_server.rounds.run import RunPhase
from glora_wire.errors import GloraError, Reason, Refusal
from glora_wire.payload import payload_bytes
from glora_wire.tensors import TensorDtype

ME = DeviceId("me")
NO = Refusal(reason=Reason.UNKNOWN_LABEL, message="No.")


# --- hub


async def test_a_change_between_reading_and_waiting_is_not_missed() -> None:
    signals = Signals()
    seen = signals.revision("key")
    signals.notify("key")
    assert await signals.wait("key", seen, 60.0) == 1


async def test_everyone_who_waits_is_woken_and_nothing_is_left() -> None:
    signals = Signals()
    waiting = [asyncio.create_task(signals.wait("key", 0, 60.0)) for _ in range(3)]
    await eventually(lambda: len(signals._waiters.get("key", ())) >= 3)
    signals.forget("key")
    signals.notify("key")
    assert await asyncio.gather(*waiting) == [1, 1, 1]
    assert signals._waiters == {}
    signals.forget("key")
    assert signals._counts == {}


async def test_a_wait_without_a_change_ends_and_one_that_is_cancelled_leaves_nothing() -> None:
    signals = Signals()
    assert await signals.wait("key", 0, 0.0) == 0
    task = asyncio.create_task(signals.wait("key", 0, 60.0))
    await eventually(lambda: bool(signals._waiters))
    task.cancel()
    assert isinstance((await asyncio.gather(task, return_exceptions=True))[0], asyncio.CancelledError)
    assert signals._waiters == {}


async def test_a_wait_that_is_woken_and_cancelled_at_once_is_cancelled() -> None:
    signals = Signals()
    task = asyncio.create_task(signals.wait("key", 0, 60.0))
    await eventually(lambda: bool(signals._waiters))
    signals.notify("key")
    task.cancel()
    assert isinstance((await asyncio.gather(task, return_exceptions=True))[0], asyncio.CancelledError)


def test_a_device_is_there_while_it_asks_and_a_little_longer() -> None:
    hub = Hub()
    assert hub.arrive(ME, PROFILE, 0.0)
    assert ME in hub.available(1000.0), "its question is open"
    hub.leave(ME, 1000.0, lost=False)
    assert ME in hub.available(1009.0)
    assert ME not in hub.available(1010.0)
    assert hub.is_online(ME, 1059.0)
    assert not hub.is_online(ME, 1060.0)


def test_a_device_whose_connection_broke_is_not_there() -> None:
    hub = Hub()
    hub.arrive(ME, PROFILE, 0.0)
    hub.leave(ME, 20.0, lost=True)
    assert ME not in hub.available(20.0)


def test_a_second_connection_keeps_the_device_there() -> None:
    hub = Hub()
    hub.arrive(ME, PROFILE, 0.0)
    assert not hub.arrive(ME, PROFILE, 1.0)
    hub.leave(ME, 20.0, lost=True)
    assert ME in hub.available(500.0)


def test_a_silent_while_is_not_a_restart_and_a_new_profile_or_a_long_silence_is() -> None:
    hub = Hub()
    hub.arrive(ME, PROFILE, 0.0)
    hub.leave(ME, 1.0, lost=False)
    assert hub.arrive(ME, PROFILE, 31.0), "news for those who wait for devices"
    assert hub.since(ME) == 0.0
    hub.arrive(ME, replace(PROFILE, training_rows=1), 32.0)
    assert hub.since(ME) == 32.0
    hub.leave(ME, 33.0, lost=False)
    hub.leave(ME, 33.0, lost=False)
    hub.leave(ME, 33.0, lost=False)
    hub.arrive(ME, replace(PROFILE, training_rows=1), 100.0)
    assert hub.since(ME) == 100.0


def test_a_decline_counts_until_the_device_came_anew() -> None:
    declined = {ME: (50.0, NO)}
    assert standing_refusal(declined, ME, 50.0) == NO
    assert standing_refusal(declined, ME, None) == NO
    assert standing_refusal(declined, ME, 50.1) is None
    assert standing_refusal({}, ME, 0.0) is None


def test_signs_of_life_are_saved_now_and_then() -> None:
    hub = Hub()
    hub.arrive(ME, PROFILE, 100.0)
    assert hub.unsaved(100.0, 15.0) == {ME: (100.0, PROFILE)}
    hub.seen(ME, 110.0)
    assert hub.unsaved(110.0, 15.0) == {}
    hub.seen(ME, 116.0)
    assert hub.unsaved(116.0, 15.0) == {ME: (116.0, PROFILE)}


def test_a_round_that_is_over_leaves_nothing() -> None:
    hub = Hub()
    hub.moved(AssignmentId("x"), up=5)
    hub.moved(AssignmentId("x"), down=7)
    assert (hub.traffic[AssignmentId("x")].up, hub.traffic[AssignmentId("x")].down) == (5, 7)
    hub.drop_assignments([AssignmentId("x"), AssignmentId("never")])
    assert hub.traffic == {}


# --- sentences and scores


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-0.5, "no time"), (0.0, "0 s"), (119.0, "119 s"), (240.0, "4 min"), (7200.0, "2 h"), (200_000.0, "2 d")],
)
def test_a_duration_is_said_as_people_say_it(seconds: float, text: str) -> None:
    assert span(seconds) == text


def test_a_round_with_many_devices_names_a_few() -> None:
    driver = Driver(planned()).open(*"abcde")
    views = tuple(AssignmentView(assignment=offered(name), device_name=f"pi-{name}") for name in "abcde")
    live = LiveProgress(phase="training", done=1, total=0, loss=0.0, at=0.0)
    views = (replace(views[0], progress=live), *views[1:])
    view = RoundView(round=driver.round, assignments=views, counts={AssignmentPhase.OFFERED: 5})
    said = why_it_waits(run(), spec(), view, "", now=40.0)
    assert said == (
        "0 of 5 updates are in (at least 2 needed); pi-a training, pi-b offered, pi-c offered and 2 more; "
        "deadline in 60 s."
    )


@pytest.mark.parametrize("phase", [RunPhase.FAILED, RunPhase.ABORTED, RunPhase.COMPLETED])
def test_a_run_that_is_over_says_its_last_word(phase: RunPhase) -> None:
    assert why_it_waits(run(phase=phase, message="Because."), spec(), None, "planning", now=0.0) == "Because."


def test_before_the_first_round_planning_has_the_word() -> None:
    assert why_it_waits(run(), spec(), None, "1 of 2 needed.", now=0.0) == "1 of 2 needed."
    assert why_it_waits(run(), spec(), None, "", now=0.0) == "The next round is being planned."


def test_scores_are_means_weighted_by_rows() -> None:
    found = version_scores(
        RunId("id-first"),
        [
            measurement("a1", rows=30, accuracy=1.0, loss=1.0),
            measurement("a2", rows=10, accuracy=0.0, loss=5.0, device_id=DeviceId("other")),
            measurement("a1", rank=2, accuracy=0.5),
            measurement("a1", phase=MetricPhase.AFTER),
        ],
    )
    assert [(s.phase, s.rank) for s in found] == [
        (MetricPhase.AFTER, 8),
        (MetricPhase.BEFORE, 2),
        (MetricPhase.BEFORE, 8),
    ]
    assert (found[-1].accuracy, found[-1].loss, found[-1].rows, found[-1].devices) == (0.75, 2.0, 40, 2)
    assert found[-1].losses is not None
    assert (found[-1].losses.least, found[-1].losses.median, found[-1].losses.greatest) == (1.0, 3.0, 5.0)
    assert version_scores(RunId("id-first"), []) == ()


def test_a_summary_has_means_of_numbers_only() -> None:
    modules = [{"a": 1.0, "b": [1.0], "c": True, "d": float("nan")}, {"a": 2, "e": "x"}]
    assert summarise(modules) == {"a": 1.5}
    assert summarise([]) == {}


# --- what an update must look like


def zeros(rank: int) -> dict[str, Array]:
    return {item.name: np.zeros(item.shape, np.float32) for item in upload_specs(MANIFEST, rank, TensorDtype.FLOAT32)}


def test_the_limit_of_an_upload_follows_from_its_assignment() -> None:
    sizes = [max_upload_bytes(MANIFEST, rank, TensorDtype.FLOAT32) for rank in (1, 2, 4)]
    assert sizes == sorted(sizes)
    exact = payload_bytes(upload_specs(MANIFEST, 4, TensorDtype.FLOAT32))
    assert exact < sizes[-1] < exact + 100_000
    assert max_upload_bytes(MANIFEST, 4, TensorDtype.FLOAT16) < sizes[-1]


def test_a_config_of_ours_has_the_scales_of_the_run() -> None:
    text = config_json(MANIFEST, rank=3, scale=2.0)
    assert check_scales(text, MANIFEST, spec(), 3) == {"layer.0.query": 2.0, "layer.0.value": 2.0}


@pytest.mark.parametrize(
    ("text", "reason", "word"),
    [
        (config(4, 2.0), Reason.RANK_WRONG, "3 was granted"),
        (config(3, 1.0), Reason.SCALE_WRONG, "use lora_alpha = 6"),
        ("[]", Reason.CONFIG_INVALID, "JSON object"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(text: str, reason: Reason, word: str) -> None:
    with pytest.raises(GloraError, match=word) as caught:
        check_scales(text, MANIFEST, spec(), 3)
    assert caught.value.reason is reason


def test_a_device_may_have_its_own_scale_where_the_run_allows_it() -> None:
    own = spec(limits={"allow_own_scale": True})
    assert set(check_scales(config(3, 5.0), MANIFEST, own, 3).values()) == {5.0}


def test_a_file_must_hold_exactly_the_planned_tensors(tmp_path: Path) -> None:
    path = tmp_path / "update"
    path.write_bytes(payload(tmp_path, zeros(2)))
    check_file(path, MANIFEST, 2, TensorDtype.FLOAT32)
    for rank, dtype, reason in (
        (3, TensorDtype.FLOAT32, Reason.RANK_WRONG),
        (2, TensorDtype.BFLOAT16, Reason.TENSOR_DTYPE_WRONG),
    ):
        with pytest.raises(GloraError) as caught:
            check_file(path, MANIFEST, rank, dtype)
        assert caught.value.reason is reason
    fewer = zeros(2)
    del fewer["base_model.model.classifier.bias"]
    path.write_bytes(payload(tmp_path, fewer))
    with pytest.raises(GloraError) as caught:
        check_file(path, MANIFEST, 2, TensorDtype.FLOAT32)
    assert caught.value.reason is Reason.TENSOR_NAMES_WRONG


def test_shards_hold_every_part_once_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [*(module.name for module in MANIFEST.modules), *(dense.name for dense in MANIFEST.dense)]
    for size in (1, 100, 400, 10**9):
        monkeypatch.setattr(coordinator_shards, "SHARD_BYTES", size)
        groups = list(shards(names, MANIFEST, 4))
        assert [name for group in groups for name in group] == names
        assert all(groups)
    assert list(shards([], MANIFEST, 4)) == []
