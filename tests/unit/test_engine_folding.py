import json
import math
from dataclasses import replace
from pathlib import Path

import engine_cases as cases
import pytest
import torch
from safetensors.torch import load_file, save_file

from glora_server.aggregation import ClientUpdate, LayerState, aggregate
from glora_server.coordinator.model import StatePart
from glora_server.coordinator.ports import AggregateJob, StrategyChoice, UpdateRef
from glora_server.engines import folding, jobs
from glora_server.engines.states import module_state
from glora_server.engines.tensors import from_record
from glora_wire.errors import GloraError, Reason
from glora_wire.names import dense_key, lora_key
from glora_wire.payload import TensorDtype

RANKS = {"pi": 2, "laptop": 4, "desk": 8}
ROWS = {"pi": 100.0, "laptop": 50.0, "desk": 10.0}
FEDIT = StrategyChoice(name="fedit", options={})


def first_round(
    folder: Path, strategy: StrategyChoice = cases.GLORA, dtype: TensorDtype = TensorDtype.FLOAT32
) -> AggregateJob:
    """Three devices of ranks 2, 4, 8 over version 0."""
    parts = jobs.initialise(cases.initial(8, strategy), cases.CPU)
    torch_dtype = torch.bfloat16 if dtype is TensorDtype.BFLOAT16 else torch.float32
    updates: list[UpdateRef] = []
    for seed, (name, rank) in enumerate(RANKS.items()):
        sent = cases.header_only(folder / f"{name}.sent", rank, dtype)
        jobs.render(replace(cases.rendering(sent, parts, rank, version=0), strategy=strategy), cases.CPU)
        update = cases.trained(sent, folder / f"{name}.st", seed, dtype=torch_dtype)
        updates.append(cases.update_of(update, sent, ROWS[name]))
    return cases.folding(parts, tuple(updates), strategy=strategy)


def direct(job: AggregateJob, state: LayerState | None, module: str) -> LayerState:
    """The same by the aggregation package alone."""
    updates = [
        ClientUpdate(
            *cases.factors(update.path, module),
            update.scales[module],
            update.weight,
            sent=None if update.sent_path is None else cases.factors(update.sent_path, module),
        )
        for update in job.updates
    ]
    strategy = job.strategy
    return aggregate(strategy.name, state, updates, rank=job.rank, round_index=1, **strategy.options).state


def state_of(part: StatePart, strategy: StrategyChoice) -> LayerState:
    return module_state(part, strategy=strategy.name, device=cases.CPU)


@pytest.mark.parametrize("strategy", [cases.GLORA, FEDIT], ids=lambda choice: choice.name)
@pytest.mark.parametrize("dtype", [TensorDtype.FLOAT32, TensorDtype.BFLOAT16])
def test_two_rounds_equal_aggregation_called_directly(
    tmp_path: Path, strategy: StrategyChoice, dtype: TensorDtype
) -> None:
    job = first_round(tmp_path, strategy, dtype)
    states: dict[str, LayerState | None] = dict.fromkeys(cases.SHAPES)
    for _ in range(2):
        done = folding.fold(job, cases.CPU)
        assert [item.part.name for item in done] == [*cases.SHAPES, cases.HEAD]
        for item in done[:-1]:
            expected = direct(job, states[item.part.name], item.part.name)
            found = state_of(item.part, strategy)
            for name, value in {"u": expected.u, "a": expected.a, "sigma": expected.sigma, **expected.extra}.items():
                other = found.extra[name] if name in expected.extra else getattr(found, name)
                assert torch.equal(other, value), name
            assert found.rank > 0
            states[item.part.name] = expected
        job = replace(job, parts=tuple(item.part for item in done))


def test_head_is_the_weighted_mean_of_what_came(tmp_path: Path) -> None:
    job = first_round(tmp_path)
    head = folding.fold(job, cases.CPU)[-1]
    sent = [load_file(update.path)[dense_key(cases.HEAD)].double() * update.weight for update in job.updates]
    wanted = torch.stack(sent).sum(0) / sum(ROWS.values())
    value = head.part.tensors["value"]
    assert value.dtype == "float32"
    assert torch.allclose(from_record(value, cases.CPU).double(), wanted, rtol=1e-6)
    assert head.diagnostics_json == "{}"


def test_part_that_nobody_sent_stays_and_a_mean_counts_those_who_did(tmp_path: Path) -> None:
    job = first_round(tmp_path)
    for update in job.updates[1:]:
        kept = {key: value for key, value in load_file(update.path).items() if "classifier" not in key}
        save_file(kept, update.path)
    head = folding.fold(job, cases.CPU)[-1]
    only = load_file(job.updates[0].path)[dense_key(cases.HEAD)]
    assert torch.equal(from_record(head.part.tensors["value"], cases.CPU), only)
    nobody = folding.fold(replace(job, updates=job.updates[1:]), cases.CPU)[-1]
    assert nobody.part == job.parts[-1]


def test_diagnostics_are_json_and_name_the_devices(tmp_path: Path) -> None:
    job = first_round(tmp_path)
    measured = json.loads(folding.fold(job, cases.CPU)[0].diagnostics_json)
    assert [client["device_id"] for client in measured["clients"]] == list(RANKS)
    assert [client["rank"] for client in measured["clients"]] == list(RANKS.values())
    assert len(measured["sigma"]) == 8
    assert measured["coverage"][0] == pytest.approx(1.0)
    assert measured["angles"] is None


def test_numbers_that_json_does_not_have_become_null() -> None:
    values = {"a": (float("nan"), 1.5), "b": [{"c": float("-inf")}], "d": 3, "e": "nan", "f": None}
    cleaned = folding.finite_only(values)
    assert json.dumps(cleaned, allow_nan=False) == (
        '{"a": [null, 1.5], "b": [{"c": null}], "d": 3, "e": "nan", "f": null}'
    )


def test_diagnostics_with_nan_are_json_too() -> None:
    update = ClientUpdate(torch.ones(4, 1), torch.ones(1, 3), 1.0, 1.0)
    measured = aggregate("fedit", None, [update], rank=1).diagnostics
    text = folding._as_json(replace(measured, mean_norm=math.nan, clients=()), ())
    assert json.loads(text)["mean_norm"] is None
    assert json.loads(text)["coverage"] == [1.0]


def test_own_scale_of_a_device_is_folded_in(tmp_path: Path) -> None:
    job = replace(first_round(tmp_path), strategy=StrategyChoice(name="glora", options={"rule": "replace"}))
    update = replace(job.updates[2], sent_path=None)
    once, thrice = (
        state_of(folding.fold(replace(job, updates=(scaled,)), cases.CPU)[0].part, cases.GLORA)
        for scaled in (update, replace(update, scales=dict.fromkeys(cases.SHAPES, 3 * cases.SCALE)))
    )
    assert torch.allclose(thrice.sigma, 3 * once.sigma, rtol=1e-5)


def test_untouched_readouts_leave_the_state_untouched_also_at_another_plan_scale(tmp_path: Path) -> None:
    job = first_round(tmp_path)
    parts = tuple(item.part for item in folding.fold(job, cases.CPU))
    updates = []
    for name, rank in RANKS.items():
        sent = cases.header_only(tmp_path / f"{name}.second", rank)
        jobs.render(cases.rendering(sent, parts, rank), cases.CPU)
        updates.append(cases.update_of(sent, sent, ROWS[name]))
    again = folding.fold(cases.folding(parts, tuple(updates)), cases.CPU)
    for before, after in zip(parts[:-1], again[:-1], strict=True):
        old, new = state_of(before, cases.GLORA), state_of(after.part, cases.GLORA)
        assert torch.allclose(new.u @ new.a, old.u @ old.a, atol=1e-5)


def test_what_cannot_be_aggregated_says_which_device(tmp_path: Path) -> None:
    job = first_round(tmp_path)
    unsent = replace(job, updates=(job.updates[0], replace(job.updates[1], sent_path=None)))
    with pytest.raises(GloraError, match="1 = laptop") as caught:
        folding.fold(unsent, cases.CPU)
    assert caught.value.reason is Reason.AGGREGATION_FAILED
    assert caught.value.details["cause"] == "MISSING_SENT"

    job.updates[1].path.unlink()
    with pytest.raises(GloraError, match=r"laptop\.st cannot be read") as gone:
        folding.fold(job, cases.CPU)
    assert gone.value.reason is Reason.PAYLOAD_MALFORMED


def test_half_a_module_is_refused(tmp_path: Path) -> None:
    job = first_round(tmp_path)
    tensors = load_file(job.updates[0].path)
    del tensors[lora_key("enc.0.query", "B")]
    save_file(tensors, job.updates[0].path)
    with pytest.raises(GloraError, match="device pi has no factor B"):
        folding.fold(job, cases.CPU)
