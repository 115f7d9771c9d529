"""A federation on a tiny encoder, for the tests of `glora simulate`."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from tiny_encoder import save_tiny_encoder, write_texts

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from glora_cli.simulate_data import read_corpus
from glora_cli.simulate_devices import Bench
from glora_cli.simulate_results import Result
from glora_cli.simulate_run import Setting, simulate_pair
from glora_cli.simulate_server import SimulatedServer
from glora_cli.simulate_spec import SimSpec, parse_sim_toml
from glora_client.manifest_builder import build_manifest
from glora_client.plan import Task
from glora_server.coordinator.run_spec import RunSpec

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
    """The tiny model, loaded once for all tests."""

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

    def server(self, strategy: str, folder: Path, changes: dict[str, str] | None = None) -> SimulatedServer:
        return SimulatedServer(self.run_spec(strategy, changes), self.setting.manifest, folder)

    def run_spec(self, strategy: str, changes: dict[str, str] | None = None) -> RunSpec:
        spec = self.spec(strategy, changes)
        return spec.run_spec(spec.strategies[0], seed=0, labels=self.setting.corpus.labels)


def make_world(folder: Path) -> World:
    """The world with its files in `folder`."""
    model = save_tiny_encoder(folder / "model")
    write_texts(folder / "train.jsonl", 90, seed=1)
    write_texts(folder / "held_out.jsonl", 30, seed=2)
    spec = parse_sim_toml(TOML + entry("glora"))
    corpus = read_corpus(spec.data, folder)
    manifest = build_manifest(
        str(model), task=Task.SEQUENCE_CLASSIFICATION, target_modules=["query", "value"], labels=corpus.labels
    )
    bench = Bench(model, manifest, corpus, max_length=16, batch_size=30)
    setting = Setting(spec=spec, manifest=manifest, corpus=corpus, digests={"glora": "x"})
    return World(setting=setting, bench=bench)


def entry(name: str, more: str = "") -> str:
    """A [[strategies]] table."""
    return f'\n[[strategies]]\nname = "{name}"\n{more}\n'
