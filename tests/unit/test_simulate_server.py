"""The server of a simulation: what devices are handed and what comes of their updates, against plain products."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from simulated_world import World, entry, make_world
from torch import Tensor

from glora_cli.simulate_server import SimulatedServer, Upload
from glora_client.plan import AdapterUse, DeliveredAdapter
from glora_server.aggregation import TrainMask
from glora_server.rounds.ids import DeviceId
from glora_wire.errors import Reason
from glora_wire.names import lora_key

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield make_world(tmp_path_factory.mktemp("simulate"))
    torch.set_num_threads(before)


def _products(adapter: DeliveredAdapter | Path, world: World, scale: float) -> dict[str, Tensor]:
    tensors = load_file(adapter.path if isinstance(adapter, DeliveredAdapter) else adapter)
    return {
        module.name: scale * tensors[lora_key(module.name, "B")].double() @ tensors[lora_key(module.name, "A")].double()
        for module in world.setting.manifest.modules
    }


def _trained(server: SimulatedServer, world: World, folder: Path, ranks: tuple[int, ...]) -> list[Upload]:
    """Updates with drawn factors instead of training: what a device sends after it was offered that rank."""
    uploads = []
    for number, rank in enumerate(ranks):
        offered = server.offer(rank)[0]
        tensors = load_file(offered.path)
        draw = torch.Generator().manual_seed(number)
        tensors = {name: value + 0.1 * torch.randn(value.shape, generator=draw) for name, value in tensors.items()}
        path = folder / f"upload-{server.version}-{number}.safetensors"
        save_file(tensors, path, metadata={"format": "pt"})
        device = DeviceId(f"device-{number}")
        uploads.append(Upload(device_id=device, path=path, config_json=offered.config_json, rank=rank, rows=number + 1))
    return uploads


def test_folding_is_the_weighted_mean_of_the_updates(world: World, tmp_path: Path) -> None:
    options = 'max_rank = 8\noptions = { subspace = "mean", rule = "replace" }'
    server = world.server(entry("glora", options), tmp_path)
    uploads = _trained(server, world, tmp_path, (1, 2, 4))
    assert [server.judge(upload) for upload in uploads] == [None, None, None]
    server.fold(uploads)
    found = _products(server.exhibit(8)[0], world, 2.0)
    for name, product in found.items():
        mean = sum(upload.rows / 6 * _products(upload.path, world, 2.0)[name] for upload in uploads)
        assert isinstance(mean, Tensor)
        torch.testing.assert_close(product, mean, rtol=1e-4, atol=1e-5)


def test_a_frozen_tail_is_what_the_readout_lacks(world: World, tmp_path: Path) -> None:
    server = world.server(entry("glora", 'options = { rule = "frozen_tail" }'), tmp_path)
    assert [item.use for item in server.offer(1)] == [AdapterUse.TRAIN]
    server.fold(_trained(server, world, tmp_path, (1, 2, 4)))
    main, tail = server.offer(1)
    assert (main.use, tail.use, tail.rank) == (AdapterUse.TRAIN, AdapterUse.FROZEN, 3)
    whole, head, rest = (_products(item, world, 2.0) for item in (server.exhibit(4)[0], main, tail))
    for name, product in whole.items():
        torch.testing.assert_close(head[name] + rest[name], product, rtol=1e-5, atol=1e-6)
    assert len(server.offer(4)) == 1


def test_accumulate_hands_out_a_fresh_adapter_over_the_whole_state(world: World, tmp_path: Path) -> None:
    server = world.server(entry("glora", 'options = { rule = "accumulate" }'), tmp_path)
    server.fold(_trained(server, world, tmp_path, (1, 2, 4)))
    main, frozen = server.offer(2)
    assert (main.use, main.rank, frozen.use, frozen.rank) == (AdapterUse.TRAIN, 2, AdapterUse.FROZEN, 4)
    fresh = load_file(main.path)
    for module in world.setting.manifest.modules:
        assert not fresh[lora_key(module.name, "B")].any()
        assert fresh[lora_key(module.name, "A")].any()
    assert frozen.path == server.readout(4)


def test_flora_merges_everything_that_was_ever_uploaded(world: World, tmp_path: Path) -> None:
    server = world.server(entry("flora"), tmp_path)
    total: dict[str, Tensor] = {}
    for _ in range(2):
        uploads = _trained(server, world, tmp_path, (1, 2, 4))
        for upload in uploads:
            for name, product in _products(upload.path, world, 2.0).items():
                total[name] = total.get(name, torch.zeros_like(product)) + upload.rows / 6 * product
        server.fold(uploads)
    main, merge = server.offer(2)
    assert (main.use, merge.use) == (AdapterUse.TRAIN, AdapterUse.MERGE)
    for name, product in _products(merge, world, 1.0).items():
        torch.testing.assert_close(product, total[name], rtol=1e-4, atol=1e-5)


def test_a_device_of_fedsa_gets_its_own_b_back(world: World, tmp_path: Path) -> None:
    server = world.server(entry("fedsa", "ranks = [2]"), tmp_path)
    uploads = _trained(server, world, tmp_path, (2, 2))
    server.fold(uploads)
    own = load_file(server.personal(2, uploads[0].path, AdapterUse.TRAIN).path)
    sent, common = load_file(uploads[0].path), load_file(server.readout(2))
    for module in world.setting.manifest.modules:
        a, b = lora_key(module.name, "A"), lora_key(module.name, "B")
        assert torch.equal(own[b], sent[b])
        assert torch.equal(own[a], common[a])


def test_the_factors_that_a_contract_freezes_come_back_unchanged(world: World, tmp_path: Path) -> None:
    run = world.run_spec(entry("ffa"))
    server = SimulatedServer(run, world.setting.manifest, tmp_path)
    assert server.contract().train is TrainMask.B
    offered, out = server.offer(2), tmp_path / "out.safetensors"
    world.bench.train(world.setting.corpus.train, offered, run, rank=2, mask=server.contract().train, seed=1, out=out)
    sent, back = load_file(offered[0].path), load_file(out)
    for module in world.setting.manifest.modules:
        a, b = lora_key(module.name, "A"), lora_key(module.name, "B")
        assert torch.equal(sent[a], back[a])
        assert not torch.equal(sent[b], back[b])


def test_judging_refuses_what_the_service_refuses(world: World, tmp_path: Path) -> None:
    server = world.server(entry("glora"), tmp_path)
    good = _trained(server, world, tmp_path, (2,))[0]
    wide = replace(good, rank=4)
    tensors = load_file(good.path)
    next(iter(tensors.values()))[0, 0] = float("nan")
    broken = replace(good, path=tmp_path / "broken.safetensors")
    save_file(tensors, broken.path, metadata={"format": "pt"})
    refusals = [server.judge(upload) for upload in (good, wide, broken)]
    assert [refusal.reason if refusal else None for refusal in refusals] == [None, Reason.RANK_WRONG, Reason.NON_FINITE]


def test_bfloat16_on_the_wire_is_rounded_as_the_service_does(world: World, tmp_path: Path) -> None:
    changes = {"[lora]": '[wire]\ndtype = "bfloat16"\n\n[lora]'}
    rows = world.run(entry("glora"), changes)
    plain = world.run(entry("glora"))
    assert all(row.updates == 3 for row in rows)
    assert rows[-1].bytes_up * 2 == plain[-1].bytes_up
    server = world.server(entry("glora"), tmp_path, changes)
    assert {tensor.dtype for tensor in load_file(server.readout(2)).values()} == {torch.bfloat16}
