"""Simulated runs on a tiny encoder: every strategy, the same numbers twice, and what devices are really handed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_encoder import save_tiny_encoder, write_texts
from torch import Tensor

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from glora_cli.simulate_data import read_corpus
from glora_cli.simulate_devices import Bench
from glora_cli.simulate_results import Result
from glora_cli.simulate_run import Setting, simulate_pair
from glora_cli.simulate_server import SimulatedServer, Upload
from glora_cli.simulate_spec import SimSpec, parse_sim_toml
from glora_client.manifest_builder import build_manifest
from glora_client.plan import AdapterUse, DeliveredAdapter, Task
from glora_client.training import FitReport
from glora_server.aggregation import STRATEGIES, TrainMask
from glora_server.rounds.ids import DeviceId
from glora_wire.errors import GloraError, Reason
from glora_wire.names import lora_key

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")

TOML = """\
name = "tiny"
seeds = [0]
rounds = 2

[data]
train = "train.jsonl"
held_out = "held_out.jsonl"
min_rows = 8

[devices]
count = 3
ranks = [1, 2, 4]

[lora]
max_rank = 4

[training]
steps = 2
batch_size = 8
max_length = 16
learning_rate = 3e-2
"""

LONG = {"steps = 2": "steps = 15", "rounds = 2": "rounds = 6", "min_rows = 8": 'split = "iid"'}


@dataclass(frozen=True)
class World:
    """The tiny model, loaded once for all tests, as one process has it for all runs."""

    folder: Path
    setting: Setting
    bench: Bench

    def run(self, entries: str, changes: dict[str, str] | None = None, *, seed: int = 0) -> tuple[Result, ...]:
        """Results of the first of these strategies."""
        setting = self.with_spec(self.spec(entries, changes))
        return simulate_pair(setting, self.bench, setting.spec.strategies[0], seed)

    def spec(self, entries: str, changes: dict[str, str] | None = None) -> SimSpec:
        text = TOML
        for old, new in (changes or {}).items():
            assert old in text
            text = text.replace(old, new)
        return parse_sim_toml(text + entries)

    def with_spec(self, spec: SimSpec) -> Setting:
        return replace(self.setting, spec=spec, digests=dict.fromkeys((e.title for e in spec.strategies), "x"))

    def server(self, entry: str, folder: Path, changes: dict[str, str] | None = None) -> SimulatedServer:
        spec = self.spec(entry, changes)
        run = spec.run_spec(spec.strategies[0], seed=0, labels=self.setting.corpus.labels)
        return SimulatedServer(run, self.setting.manifest, folder)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("simulate")
    model = save_tiny_encoder(folder / "model")
    write_texts(folder / "train.jsonl", 90, seed=1)
    write_texts(folder / "held_out.jsonl", 30, seed=2)
    spec = parse_sim_toml(TOML + _entry("glora"))
    corpus = read_corpus(spec.data, folder)
    manifest = build_manifest(
        str(model), task=Task.SEQUENCE_CLASSIFICATION, target_modules=["query", "value"], labels=corpus.labels
    )
    bench = Bench(model, manifest, corpus, max_length=16, batch_size=30)
    yield World(
        folder=folder, setting=Setting(spec=spec, manifest=manifest, corpus=corpus, digests={"glora": "x"}), bench=bench
    )
    torch.set_num_threads(before)


def _entry(name: str, more: str = "") -> str:
    return f'\n[[strategies]]\nname = "{name}"\n{more}\n'


def _numbers(rows: tuple[Result, ...]) -> list[Result]:
    """All but the label and the seconds, which no two runs have in common."""
    return [replace(row, strategy="", seconds=0.0, aggregation_seconds=0.0) for row in rows]


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_every_strategy_runs_to_the_end(world: World, name: str) -> None:
    mixed = STRATEGIES[name].properties.mixed_ranks
    rows = world.run(_entry(name, "" if mixed else "ranks = [2]"))
    assert [(row.round, row.rank) for row in rows] == [(1, 4), *((2, r) for r in ((1, 2, 4) if mixed else (2, 4)))]
    assert all(row.updates == 3 and row.failed == row.rejected == 0 for row in rows)
    assert all(row.accuracy is not None and row.loss is not None and row.truncation_error is not None for row in rows)
    assert all(row.bytes_up > 0 and row.bytes_down > 0 for row in rows)
    assert sum(row.devices for row in rows if row.round == 2) == 3


@pytest.mark.parametrize("rule", ["frozen_tail", "accumulate"])
def test_the_same_run_gives_the_same_numbers(world: World, rule: str) -> None:
    first, again = (world.run(_entry("glora", f'options = {{ rule = "{rule}" }}')) for _ in range(2))
    assert _numbers(first) == _numbers(again)


def test_strategies_of_one_seed_start_alike_and_see_the_same_batches(world: World) -> None:
    """With one rank r = R the rules replace and delta are the same matrix, so any difference would be the pairing."""
    replaced, delta = (
        world.run(_entry("glora", f'ranks = [4]\noptions = {{ rule = "{rule}" }}')) for rule in ("replace", "delta")
    )
    for one, other in zip(replaced, delta, strict=True):
        assert one.accuracy == other.accuracy
        assert one.loss == pytest.approx(other.loss, rel=1e-4)
        assert one.training_loss == pytest.approx(other.training_loss, rel=1e-4)
    other_seed = world.run(_entry("glora", "ranks = [4]"), seed=1)
    assert other_seed[-1].loss != pytest.approx(delta[-1].loss, rel=1e-4)


def test_a_run_learns(world: World) -> None:
    rows = world.run(_entry("glora"), LONG)
    assert rows[-1].accuracy is not None
    assert rows[-1].accuracy > 0.8


def test_participation_limits_the_round(world: World) -> None:
    rows = world.run(_entry("fedit"), {"[devices]": "[devices]\nparticipation = 0.6"})
    assert {row.updates for row in rows} == {2}


def test_a_device_that_diverges_is_counted_and_the_round_goes_on(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    train: Callable[..., FitReport] = Bench.train
    calls: list[int] = []

    def sometimes(bench: Bench, *arguments: object, **options: object) -> FitReport:
        calls.append(1)
        if len(calls) in {1, 4, 5, 6}:
            raise GloraError(Reason.TRAINING_DIVERGED, "Training diverged.")
        return train(bench, *arguments, **options)

    monkeypatch.setattr(Bench, "train", sometimes)
    rows = world.run(_entry("glora"))
    assert [(row.updates, row.failed) for row in rows if row.rank == 4] == [(2, 1), (0, 3)]
    # Nobody is left in the second round, so that the model stays what it was.
    assert rows[-1].accuracy == rows[0].accuracy
    assert rows[-1].truncation_error is None


def test_an_update_over_the_norm_limit_is_rejected(world: World) -> None:
    rows = world.run(_entry("glora"), {"[lora]": "[limits]\nmax_update_norm = 1e-9\n\n[lora]"})
    assert all(row.rejected == 3 and row.updates == 0 for row in rows)


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
    server = world.server(_entry("glora", options), tmp_path)
    uploads = _trained(server, world, tmp_path, (1, 2, 4))
    assert [server.judge(upload) for upload in uploads] == [None, None, None]
    server.fold(uploads)
    found = _products(server.exhibit(8)[0], world, 2.0)
    for name, product in found.items():
        mean = sum(upload.rows / 6 * _products(upload.path, world, 2.0)[name] for upload in uploads)
        assert isinstance(mean, Tensor)
        torch.testing.assert_close(product, mean, rtol=1e-4, atol=1e-5)


def test_a_frozen_tail_is_what_the_readout_lacks(world: World, tmp_path: Path) -> None:
    server = world.server(_entry("glora", 'options = { rule = "frozen_tail" }'), tmp_path)
    assert [item.use for item in server.offer(1)] == [AdapterUse.TRAIN]
    server.fold(_trained(server, world, tmp_path, (1, 2, 4)))
    main, tail = server.offer(1)
    assert (main.use, tail.use, tail.rank) == (AdapterUse.TRAIN, AdapterUse.FROZEN, 3)
    whole, head, rest = (_products(item, world, 2.0) for item in (server.exhibit(4)[0], main, tail))
    for name, product in whole.items():
        torch.testing.assert_close(head[name] + rest[name], product, rtol=1e-5, atol=1e-6)
    assert len(server.offer(4)) == 1


def test_accumulate_hands_out_a_fresh_adapter_over_the_whole_state(world: World, tmp_path: Path) -> None:
    server = world.server(_entry("glora", 'options = { rule = "accumulate" }'), tmp_path)
    server.fold(_trained(server, world, tmp_path, (1, 2, 4)))
    main, frozen = server.offer(2)
    assert (main.use, main.rank, frozen.use, frozen.rank) == (AdapterUse.TRAIN, 2, AdapterUse.FROZEN, 4)
    fresh = load_file(main.path)
    for module in world.setting.manifest.modules:
        assert not fresh[lora_key(module.name, "B")].any()
        assert fresh[lora_key(module.name, "A")].any()
    assert frozen.path == server.readout(4)


def test_flora_merges_everything_that_was_ever_uploaded(world: World, tmp_path: Path) -> None:
    server = world.server(_entry("flora"), tmp_path)
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
    server = world.server(_entry("fedsa", "ranks = [2]"), tmp_path)
    uploads = _trained(server, world, tmp_path, (2, 2))
    server.fold(uploads)
    own = load_file(server.personal(2, uploads[0].path, AdapterUse.TRAIN).path)
    sent, common = load_file(uploads[0].path), load_file(server.readout(2))
    for module in world.setting.manifest.modules:
        a, b = lora_key(module.name, "A"), lora_key(module.name, "B")
        assert torch.equal(own[b], sent[b])
        assert torch.equal(own[a], common[a])


def test_the_factors_that_a_contract_freezes_come_back_unchanged(world: World, tmp_path: Path) -> None:
    spec = world.spec(_entry("ffa"))
    run = spec.run_spec(spec.strategies[0], seed=0, labels=world.setting.corpus.labels)
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
    server = world.server(_entry("glora"), tmp_path)
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
    rows = world.run(_entry("glora"), changes)
    plain = world.run(_entry("glora"))
    assert all(row.updates == 3 for row in rows)
    assert rows[-1].bytes_up * 2 == plain[-1].bytes_up
    server = world.server(_entry("glora"), tmp_path, changes)
    assert {tensor.dtype for tensor in load_file(server.readout(2)).values()} == {torch.bfloat16}
