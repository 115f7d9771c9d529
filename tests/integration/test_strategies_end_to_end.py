"""Every strategy that can be chosen, through the services and the real worker, round after round.

Devices follow the plan that they are handed: they train and send what it names, and nothing tells them the strategy.
What is published is compared with a plain float64 computation, or with the pure function on the same updates.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import pytest_asyncio
import torch
from coordinator_world import MANIFEST, Phone, Trained, World, a_world, config, payload
from people_cases import ADMIN
from tiny_numerics import Array, read_tensors
from torch import Tensor

from glora_server.aggregation import STRATEGIES, ClientUpdate, LayerState, aggregate
from glora_server.coordinator.messages import WorkOffer
from glora_server.coordinator.model import Run
from glora_server.engines.local import LocalEngine
from glora_server.engines.states import module_state
from glora_wire.digests import digest_bytes
from glora_wire.errors import GloraError, Reason
from glora_wire.names import Factor, lora_key

pytestmark = pytest.mark.asyncio(loop_scope="module")

MODULES = tuple(module.name for module in MANIFEST.modules)
SCALE = 2.0
ROWS = (300, 100)
MIXED, EQUAL = (2, 4), (4, 4)
Tensors = dict[str, Array]
Options = Mapping[str, str | float | int]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def engine() -> AsyncIterator[LocalEngine]:
    """One worker for all tests, since starting one costs seconds."""
    worker = LocalEngine(device="cpu", threads=1)
    await worker.start()
    yield worker
    await worker.close()


@pytest_asyncio.fixture(loop_scope="module")
async def world(tmp_path: Path, engine: LocalEngine) -> AsyncIterator[World]:
    async with a_world(tmp_path, real_numerics=engine) as made:
        yield made


@dataclass(frozen=True, kw_only=True)
class Said:
    """What a device was handed, and all of what it has after training."""

    offer: WorkOffer
    frozen: Tensors
    sent: Tensors
    trained: Tensors


def pair(tensors: Mapping[str, Array], module: str) -> tuple[Tensor, Tensor]:
    """(B, A) of a module."""
    b, a = (torch.from_numpy(np.array(tensors[lora_key(module, factor)])) for factor in ("B", "A"))
    return b, a


def product(tensors: Mapping[str, Array], module: str) -> Tensor:
    """s·B·A of a module, dense, float64; zero where there is no adapter."""
    if not tensors:
        shape = next(m for m in MANIFEST.modules if m.name == module)
        return torch.zeros((shape.out_features, shape.in_features), dtype=torch.float64)
    b, a = pair(tensors, module)
    dense: Tensor = SCALE * (b.double() @ a.double())
    return dense


async def take_part(phone: Phone, offer: WorkOffer, rows: int) -> Said:
    """One assignment of a device that trains by moving what the mask lets it move."""
    devices = phone.world.now.devices
    await devices.accepted(await phone.me(), offer.assignment.id)
    handed = {adapter.use: await phone.pull(offer, adapter.key) for adapter in offer.adapters}
    sent = handed["train"]
    rng = np.random.default_rng(offer.seed)
    trained = dict(sent)
    for module in MODULES:
        for factor in trained_factors(offer.strategy.train_mask):
            key = lora_key(module, factor)
            trained[key] = (sent[key] + 0.3 * rng.standard_normal(sent[key].shape)).astype(np.float32)
    for dense in MANIFEST.dense:
        trained[f"base_model.model.{dense.name}"] = rng.standard_normal(dense.shape).astype(np.float32)
    status = await phone.push(offer, update_file(phone, offer, trained, rows), piece=4096)
    assert status.state == "accepted", status.refusal
    return Said(offer=offer, frozen=handed.get("frozen", {}), sent=sent, trained=trained)


def trained_factors(mask: str) -> tuple[Factor, ...]:
    """Factors that a mask or an upload set names."""
    factors: dict[str, tuple[Factor, ...]] = {"both": ("A", "B"), "a": ("A",), "b": ("B",)}
    return factors[mask]


def update_file(
    phone: Phone, offer: WorkOffer, trained: Mapping[str, Array], rows: int, *, upload_set: str | None = None
) -> Trained:
    """The update as the plan wants it: the dense tensors and the factors of the upload set."""
    wanted = {
        lora_key(module, factor)
        for module in MODULES
        for factor in trained_factors(upload_set or offer.strategy.upload_set)
    }
    data = payload(
        phone.world.folder, {key: value for key, value in trained.items() if ".lora_" not in key or key in wanted}
    )
    return Trained(data=data, header=replace(phone.train(offer, rows=rows).header, digest=digest_bytes(data)))


async def play(world: World, run: Run, phones: Sequence[Phone], number: int) -> tuple[Said, ...]:
    """One whole round."""
    offers = await asyncio.gather(*(phone.offer() for phone in phones))
    assert {offer.round_number for offer in offers} == {number}
    said = await asyncio.gather(
        *(take_part(phone, offer, rows) for phone, offer, rows in zip(phones, offers, ROWS, strict=True))
    )
    await world.until(run.id, lambda uow: uow.runs.get(run.id).rounds_done == number)
    return tuple(said)


async def published(world: World, run: Run, number: int, module: str) -> LayerState:
    """The state of a module in a version."""
    version = await world.read(lambda uow: uow.versions.by_number(run.id, number))
    part = await world.read(lambda uow: uow.versions.parts(version.id, [module])[0])
    return module_state(part, strategy=version.strategy, device=torch.device("cpu"))


def dense(state: LayerState) -> Tensor:
    """S = U·A, float64."""
    found: Tensor = state.u.double() @ state.a.double()
    return found


async def started(
    world: World, name: str, options: Options, ranks: tuple[int, int], **changes: Any
) -> tuple[Run, list[Phone]]:
    phones = [await world.phone(f"device-{number}", rank=rank) for number, rank in enumerate(ranks)]
    minimum: dict[str, Any] = {"min_rank": 4} if ranks == EQUAL else {}
    run = await world.start_run(
        quorum=2, rounds=3, strategy={"name": name, "options": dict(options)}, **minimum, **changes
    )
    return run, phones


@pytest.mark.parametrize("ranks", [MIXED, EQUAL], ids=["mixed", "equal"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("glora", {"rule": "replace"}),
        ("glora", {"rule": "delta", "subspace": "mean"}),
        ("glora", {"rule": "frozen_tail"}),
        ("glora", {"rule": "accumulate", "eta": 0.5}),
        ("flexlora", {}),
        ("florist", {"energy": 1.0}),
        ("ffa", {}),
        ("rolora", {}),
        ("fedsvd", {"refresh": 2}),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else value,
)
async def test_strategies_that_are_exact_publish_the_mean_of_the_true_updates(
    world: World, name: str, options: Options, ranks: tuple[int, int]
) -> None:
    """R spans every module here, so that nothing is cut and the mean of what was said is the next state."""
    if ranks == MIXED and not STRATEGIES[name].properties.mixed_ranks:
        with pytest.raises(GloraError, match="one rank") as caught:
            await started(world, name, options, ranks)
        assert caught.value.reason is Reason.SPEC_INVALID
        return
    run, phones = await started(world, name, options, ranks)
    rule, eta = options.get("rule"), float(options.get("eta", 1.0))
    before = {module: product({}, module) for module in MODULES}
    for number in (1, 2, 3):
        said = await play(world, run, phones, number)
        for module in MODULES:
            held, expected = before[module], torch.zeros_like(before[module])
            for device, rows in zip(said, ROWS, strict=True):
                change = product(device.trained, module)
                if rule in {"delta", "frozen_tail"}:
                    change = held + eta * (change - product(device.sent, module))
                elif rule == "accumulate":
                    change = held + eta * change
                expected += rows / sum(ROWS) * change
            state = await published(world, run, number, module)
            torch.testing.assert_close(dense(state), expected, rtol=1e-4, atol=1e-4)
            before[module] = dense(state)


@pytest.mark.parametrize("ranks", [MIXED, EQUAL], ids=["mixed", "equal"])
@pytest.mark.parametrize("name", ["fedit", "fedrot", "hetlora", "lora_fair", "raflora"])
async def test_other_strategies_publish_what_the_pure_function_makes_of_the_updates(
    world: World, name: str, ranks: tuple[int, int]
) -> None:
    if ranks == MIXED and not STRATEGIES[name].properties.mixed_ranks:
        with pytest.raises(GloraError, match="one rank"):
            await started(world, name, {}, ranks)
        return
    run, phones = await started(world, name, {}, ranks)
    states: dict[str, LayerState | None] = dict.fromkeys(MODULES)
    for number in (1, 2, 3):
        said = await play(world, run, phones, number)
        for module in MODULES:
            updates = [
                ClientUpdate(*pair(device.trained, module), SCALE, rows, sent=pair(device.sent, module))
                for device, rows in zip(said, ROWS, strict=True)
            ]
            made = aggregate(name, states[module], updates, rank=4, round_index=number - 1)
            state = await published(world, run, number, module)
            torch.testing.assert_close(dense(state), dense(made.state), rtol=1e-4, atol=1e-5)
            states[module] = made.state


async def test_every_strategy_that_can_be_chosen_is_played_above() -> None:
    exact = {"glora", "flexlora", "florist", "ffa", "rolora", "fedsvd"}
    others = {"fedit", "fedrot", "hetlora", "lora_fair", "raflora"}
    assert exact | others | {"fedsa", "fedex", "flora"} == set(STRATEGIES)


async def test_the_tail_that_a_device_cannot_train_lies_frozen_under_its_adapter(world: World) -> None:
    run, phones = await started(world, "glora", {"rule": "frozen_tail"}, MIXED)
    first = await play(world, run, phones, 1)
    assert all(not device.frozen for device in first), "an empty state has no tail"
    small, big = await play(world, run, phones, 2)
    assert [(a.use, a.rank) for a in small.offer.adapters] == [("frozen", 2), ("train", 2)]
    assert [(a.use, a.rank) for a in big.offer.adapters] == [("train", 4)]
    for module in MODULES:
        state = dense(await published(world, run, 1, module))
        torch.testing.assert_close(
            product(small.frozen, module) + product(small.sent, module), state, rtol=1e-5, atol=1e-6
        )
        left = torch.linalg.svdvals(state)
        torch.testing.assert_close(torch.linalg.svdvals(product(small.sent, module))[:2], left[:2])
    assert not any("classifier" in key for key in small.frozen), "dense tensors come with what is trained"


async def test_a_fresh_adapter_is_trained_on_top_of_the_whole_state(world: World) -> None:
    run, phones = await started(world, "glora", {"rule": "accumulate"}, MIXED)
    await play(world, run, phones, 1)
    small, big = await play(world, run, phones, 2)
    assert [(a.use, a.rank) for a in small.offer.adapters] == [("frozen", 4), ("train", 2)]
    assert small.offer.strategy.init == "fresh"
    for module in MODULES:
        state = dense(await published(world, run, 1, module))
        torch.testing.assert_close(product(small.frozen, module), state, rtol=1e-5, atol=1e-6)
        b, a = pair(small.sent, module)
        assert not b.any()
        assert torch.linalg.matrix_rank(a) == 2
        assert torch.equal(pair(big.sent, module)[1][:2], a), "seeded rows are nested across ranks"
    later = (await play(world, run, phones, 3))[0]
    assert not np.array_equal(later.sent[lora_key(MODULES[0], "A")], small.sent[lora_key(MODULES[0], "A")])


async def test_rolora_takes_turns_and_sends_half(world: World) -> None:
    run, phones = await started(world, "rolora", {}, EQUAL)
    seen = [(await play(world, run, phones, number))[0].offer for number in (1, 2, 3)]
    assert [offer.strategy.train_mask for offer in seen] == ["b", "a", "b"]
    assert [offer.strategy.upload_set for offer in seen] == ["b", "a", "b"]
    assert all(offer.max_upload_bytes < 64 * 1024 + 256 * 6 + 4096 for offer in seen)


async def test_the_norm_of_half_an_update_is_taken_with_the_factor_that_was_sent(world: World) -> None:
    run, phones = await started(world, "ffa", {}, MIXED, limits={"max_update_norm": 5.0})
    offer, _ = await asyncio.gather(*(phone.offer() for phone in phones))
    sent = await phones[0].pull(offer)
    large = {key: np.full_like(value, 3.0) if ".lora_B." in key else value for key, value in sent.items()}
    large |= {f"base_model.model.{d.name}": np.zeros(d.shape, np.float32) for d in MANIFEST.dense}
    status = await phones[0].push(offer, update_file(phones[0], offer, large, 10), piece=4096)
    assert status.state == "rejected"
    assert status.refusal is not None
    assert status.refusal.reason is Reason.NORM_TOO_LARGE
    norm = np.sqrt(sum(float(torch.linalg.matrix_norm(product(large, module)) ** 2) for module in MODULES))
    assert f"{norm:.6g}" in status.refusal.message
    assert norm > 5.0
    assert await world.read(lambda uow: uow.runs.get(run.id).rounds_done) == 0


async def test_an_update_with_a_factor_that_was_not_asked_for_is_refused(world: World) -> None:
    _, phones = await started(world, "ffa", {}, MIXED)
    offer, _ = await asyncio.gather(*(phone.offer() for phone in phones))
    sent = await phones[0].pull(offer)
    sent |= {f"base_model.model.{d.name}": np.zeros(d.shape, np.float32) for d in MANIFEST.dense}
    status = await phones[0].push(offer, update_file(phones[0], offer, sent, 10, upload_set="both"), piece=4096)
    assert status.state == "rejected"
    assert status.refusal is not None
    assert status.refusal.reason is Reason.TENSOR_NAMES_WRONG


@pytest.mark.parametrize("name", ["fedsa", "fedex", "flora"])
async def test_strategies_that_devices_cannot_follow_are_refused_at_creation(world: World, name: str) -> None:
    with pytest.raises(GloraError, match=name) as caught:
        await started(world, name, {}, EQUAL)
    assert caught.value.reason is Reason.STRATEGY_OPTIONS


async def test_other_ranks_cannot_be_let_in_later_where_the_method_has_one(world: World) -> None:
    run, _ = await started(world, "rolora", {}, EQUAL)
    with pytest.raises(GloraError, match="one rank"):
        await world.now.commands.edit_policy(ADMIN, run.name, {"min_rank": 2})
    kept = await world.now.commands.edit_policy(ADMIN, run.name, {"quorum": 1})
    assert json.loads(kept.spec_json)["policy"]["min_rank"] == 4


def smaller(phone: Phone, offer: WorkOffer, sent: Mapping[str, Array], rank: int) -> tuple[Tensors, Trained]:
    """The first directions of an adapter as an update of that rank."""
    cut = {
        key: value[:rank] if ".lora_A." in key else value[:, :rank] if ".lora_B." in key else value
        for key, value in sent.items()
    }
    cut |= {f"base_model.model.{d.name}": np.zeros(d.shape, np.float32) for d in MANIFEST.dense}
    made = update_file(phone, offer, cut, 100)
    return cut, replace(made, header=replace(made.header, adapter_config_json=config(rank, SCALE)))


async def test_a_device_that_shrank_has_the_smaller_rank_from_then_on(world: World) -> None:
    run, (small, big) = await started(world, "hetlora", {}, MIXED)
    said = await play(world, run, (small, big), 1)
    before = {module: await published(world, run, 1, module) for module in MODULES}
    offers = await asyncio.gather(small.offer(), big.offer())
    assert [offer.assignment.rank for offer in offers] == [2, 4]
    other = await take_part(small, offers[0], 300)
    cut, update = smaller(big, offers[1], await big.pull(offers[1]), 3)
    assert (await big.push(offers[1], update, piece=4096)).state == "accepted"
    await world.until(run.id, lambda uow: uow.runs.get(run.id).rounds_done == 2)
    for module in MODULES:
        updates = [
            ClientUpdate(*pair(tensors, module), SCALE, rows) for tensors, rows in ((other.trained, 300), (cut, 100))
        ]
        made = aggregate("hetlora", before[module], updates, rank=4, round_index=1)
        state = await published(world, run, 2, module)
        torch.testing.assert_close(dense(state), dense(made.state), rtol=1e-4, atol=1e-5)
    assert [device.offer.assignment.rank for device in said] == [2, 4]
    assert [device.offer.assignment.rank for device in await play(world, run, (small, big), 3)] == [2, 3]


async def test_a_smaller_rank_is_refused_by_strategies_that_grant_one(world: World) -> None:
    _, phones = await started(world, "glora", {}, MIXED)
    _, offer = await asyncio.gather(*(phone.offer() for phone in phones))
    _, update = smaller(phones[1], offer, await phones[1].pull(offer), 3)
    status = await phones[1].push(offer, update, piece=4096)
    assert status.state == "rejected"
    assert status.refusal is not None
    assert status.refusal.reason is Reason.RANK_WRONG
    with pytest.raises(GloraError, match="hetlora_gamma"):
        await world.start_run("second", strategy={"name": "fedit"}, training={"extra": {"hetlora_gamma": "0.9"}})


@pytest.mark.parametrize("flavour", ["peft", "serving"])
@pytest.mark.parametrize("name", ["ffa", "fedit", "glora"])
async def test_an_export_is_the_best_part_of_the_model_whatever_the_strategy_keeps(
    world: World, tmp_path: Path, name: str, flavour: Literal["peft", "serving"]
) -> None:
    """The module of three outputs has a state of rank 3, and the averaged factors of `ffa` have four columns."""
    run, phones = await started(world, name, {}, MIXED)
    await play(world, run, phones, 1)
    for rank in (4, 1):
        folder = tmp_path / f"{rank}"
        await world.now.commands.export(ADMIN, run.name, rank=rank, version_number=1, flavour=flavour, folder=folder)
        written = read_tensors(folder / "adapter_model.safetensors")
        for module in MODULES:
            u, sigma, vh = torch.linalg.svd(dense(await published(world, run, 1, module)))
            kept = min(rank, sigma.numel())
            best = u[:, :kept] @ torch.diag(sigma[:kept]) @ vh[:kept]
            torch.testing.assert_close(product(written, module) / SCALE, best, rtol=1e-4, atol=1e-5)
        assert any("classifier" in key for key in written)


async def test_what_was_measured_is_stored_for_every_module(world: World) -> None:
    run, phones = await started(world, "glora", {}, MIXED)
    await play(world, run, phones, 1)
    version = await world.read(lambda uow: uow.versions.by_number(run.id, 1))
    stored = await world.read(lambda uow: uow.versions.diagnostics(version.id))
    assert {item.module for item in stored} == set(MODULES)
    for item in stored:
        values = json.loads(item.values_json)
        assert {"eigenvalues", "eigengap", "sigma", "captured_energy", "truncation_error", "coverage"} <= set(values)
        assert len(values["clients"]) == 2
        assert {"update_norm", "cosine", "capture", "share"} <= set(values["clients"][0])
