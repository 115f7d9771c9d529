"""What a round's contract means for a device: adapters to download, tensors to upload, ranks that are taken."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import engine_cases as cases
import pytest
import torch
from coordinator_world import MANIFEST, config, spec
from tiny_numerics import TinyNumerics

from glora_server.coordinator.catalogue import Catalogue
from glora_server.coordinator.expectations import max_upload_bytes, upload_specs, uploaded_rank
from glora_server.coordinator.offers import offered_adapters
from glora_server.coordinator.ports import StrategyInfo
from glora_server.engines import folding, jobs
from glora_server.engines.states import module_state
from glora_server.rounds.assignment import Assignment, AssignmentKind
from glora_server.rounds.ids import AssignmentId, DeviceId, RoundId, RunId, VersionId
from glora_wire.names import LoraKey, split_key
from glora_wire.tensors import TensorDtype

PLAIN = StrategyInfo(name="glora", summary="", train_mask="both", init="readout", upload_set="both", mixed_ranks=True)
TAIL = replace(PLAIN, frozen="tail")
STATE = replace(PLAIN, frozen="state", init="fresh")
MODULE = "enc.0.query"


def assignment(rank: int, ranks: tuple[int, ...] = ()) -> Assignment:
    return Assignment(
        id=AssignmentId("a"),
        run_id=RunId("r"),
        round_id=None if ranks else RoundId("o"),
        device_id=DeviceId("d"),
        kind=AssignmentKind.EVALUATE if ranks else AssignmentKind.TRAIN,
        rank=rank,
        ranks=ranks,
        version_id=VersionId("v"),
        offered_at=0.0,
        deadline_at=1.0,
    )


@pytest.mark.parametrize(
    ("wanted", "held", "expected"),
    [
        (PLAIN, 8, [("train", "train", 4, 0)]),
        (TAIL, 8, [("frozen", "tail", 4, 4), ("train", "train", 4, 0)]),
        (TAIL, 5, [("frozen", "tail", 1, 4), ("train", "train", 4, 0)]),
        (TAIL, 4, [("train", "train", 4, 0)]),
        (TAIL, 0, [("train", "train", 4, 0)]),
        (STATE, 8, [("frozen", "state", 8, 0), ("train", "fresh", 4, 0)]),
        (STATE, 2, [("frozen", "state", 2, 0), ("train", "fresh", 4, 0)]),
        (STATE, 0, [("train", "fresh", 4, 0)]),
    ],
)
def test_frozen_parts_come_first_and_only_where_there_is_something_in_them(
    wanted: StrategyInfo, held: int, expected: list[tuple[str, str, int, int]]
) -> None:
    offers = offered_adapters(assignment(4), wanted, held)
    assert [(offer.use, offer.variant, offer.rank, offer.first) for offer in offers] == expected
    assert len({offer.key for offer in offers}) == len(offers)


def test_evaluations_get_the_model_at_each_rank_whatever_the_strategy_trains_on() -> None:
    offers = offered_adapters(assignment(4, (1, 4)), STATE, 8)
    assert [(offer.use, offer.variant, offer.rank) for offer in offers] == [
        ("evaluate", "train", 1),
        ("evaluate", "train", 4),
    ]


@pytest.mark.parametrize(("upload_set", "factors"), [("both", {"A", "B"}), ("a", {"A"}), ("b", {"B"})])
def test_an_update_has_the_factors_of_the_upload_set_and_every_dense_tensor(upload_set: str, factors: set[str]) -> None:
    specs = upload_specs(MANIFEST, 3, TensorDtype.FLOAT32, upload_set)
    keys = [split_key(item.name) for item in specs]
    assert {key.factor for key in keys if isinstance(key, LoraKey)} == factors
    assert sum(isinstance(key, LoraKey) for key in keys) == len(factors) * len(MANIFEST.modules)
    assert sum(not isinstance(key, LoraKey) for key in keys) == len(MANIFEST.dense)


def test_half_an_update_may_be_half_as_large() -> None:
    whole, a, b = (max_upload_bytes(MANIFEST, 512, TensorDtype.FLOAT32, part) for part in ("both", "a", "b"))
    slack = whole - 4 * 512 * (4 + 6 + 3 + 6)
    assert abs(a + b - whole - slack) < 2048
    assert min(a, b) > slack - 2048


def test_a_smaller_rank_is_taken_only_where_devices_may_shrink() -> None:
    assert uploaded_rank(config(2, 2.0), MANIFEST, 4, may_shrink=True) == 2
    assert uploaded_rank(config(2, 2.0), MANIFEST, 4, may_shrink=False) == 4
    assert uploaded_rank(config(8, 2.0), MANIFEST, 4, may_shrink=True) == 4, "never more than was granted"


async def test_a_contract_is_asked_for_once_for_even_and_once_for_odd_rounds() -> None:
    numerics = TinyNumerics()
    catalogue = Catalogue(numerics)
    for number in range(6):
        assert (await catalogue.of_round(spec(), number)).name == "glora"
    assert numerics.jobs["describe"] == 2
    await catalogue.of_round(spec(strategy={"options": {"rule": "replace"}}), 1)
    assert numerics.jobs["describe"] == 3


def test_variants_of_a_readout_are_parts_of_one_state(tmp_path: Path) -> None:
    parts = jobs.initialise(cases.initial(8), cases.CPU)
    sent = cases.header_only(tmp_path / "sent", 8)
    jobs.render(cases.rendering(sent, parts, 8, version=0), cases.CPU)
    update = cases.update_of(cases.trained(sent, tmp_path / "up", 3), sent, 1.0)
    parts = tuple(item.part for item in folding.fold(cases.folding(parts, (update,)), cases.CPU))
    dense = {}
    for name, variant, rank, first in (
        ("train", "train", 3, 0),
        ("tail", "tail", 5, 3),
        ("state", "state", 8, 0),
        ("wide", "state", 11, 0),
    ):
        path = cases.header_only(tmp_path / name, rank)
        job = replace(cases.rendering(path, parts, rank), variant=variant, first=first)  # type: ignore[arg-type]
        jobs.render(job, cases.CPU)
        b, a = cases.factors(path, MODULE)
        dense[name] = cases.SCALE * (b.double() @ a.double())
    state = module_state(next(p for p in parts if p.name == MODULE), strategy="glora", device=cases.CPU)
    whole = state.u.double() @ state.a.double()
    torch.testing.assert_close(dense["train"] + dense["tail"], whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dense["state"], whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dense["wide"], whole, rtol=1e-5, atol=1e-6)
    assert float(dense["tail"].norm()) > 0.01


def test_a_fresh_adapter_is_the_one_of_an_empty_state(tmp_path: Path) -> None:
    empty = jobs.initialise(cases.initial(8), cases.CPU)
    sent = cases.header_only(tmp_path / "sent", 8)
    jobs.render(cases.rendering(sent, empty, 8, version=0), cases.CPU)
    update = cases.update_of(cases.trained(sent, tmp_path / "up", 3), sent, 1.0)
    grown = tuple(item.part for item in folding.fold(cases.folding(empty, (update,)), cases.CPU))
    files = {}
    for name, parts, variant in (("plain", empty, "train"), ("fresh", grown, "fresh")):
        files[name] = cases.header_only(tmp_path / name, 4)
        job = replace(cases.rendering(files[name], parts, 4, version=1), variant=variant)  # type: ignore[arg-type]
        jobs.render(job, cases.CPU)
    for module in cases.SHAPES:
        for one, other in zip(
            cases.factors(files["plain"], module), cases.factors(files["fresh"], module), strict=True
        ):
            assert torch.equal(one, other)
    assert not cases.factors(files["fresh"], MODULE)[0].any()
