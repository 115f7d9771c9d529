"""What strategies ask of a device, done by the training job: masks, half uploads, frozen parts, smaller ranks."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_encoder import WORDS, save_tiny_encoder, write_texts
from torch import Tensor

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from glora_client.batches import RoundControl
from glora_client.job_run import _with_rank
from glora_client.jobs import JobRunner
from glora_client.manifest_builder import build_manifest
from glora_client.plan import AdapterUse, DeliveredAdapter, FactorSet, LocalPlan, Task
from glora_client.protocol import Evaluated, Event, Job, JobKind, Measured, Trained
from glora_wire.adapter_config import adapter_config_json, scales_from_config
from glora_wire.errors import GloraError, Reason
from glora_wire.manifest import Manifest
from glora_wire.names import dense_key, lora_key
from glora_wire.tensors import TensorDtype

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
SCALE = 2.0
Tensors = dict[str, Tensor]
PLAN = LocalPlan(
    task=Task.SEQUENCE_CLASSIFICATION,
    rank=4,
    scale=SCALE,
    steps=3,
    batch_size=8,
    max_length=16,
    learning_rate=1e-2,
    wire_dtype=TensorDtype.FLOAT32,
    evaluate_before=True,
    evaluate_after=True,
)


class NoControls:
    """Nobody interferes."""

    def begin(self, number: int, control: RoundControl) -> None:
        assert not control.cancelled
        assert number


@dataclass(frozen=True)
class Device:
    """A tiny model with data, and the process that keeps it."""

    folder: Path
    manifest: Manifest
    runner: JobRunner

    def adapter(
        self, name: str, factors: Mapping[str, tuple[Tensor, Tensor]], use: AdapterUse, dense: Tensors
    ) -> DeliveredAdapter:
        """A payload of these (B, A) by module, with the dense tensors."""
        tensors = dict(dense)
        rank = 0
        for module, (b, a) in factors.items():
            tensors |= {lora_key(module, "B"): b.contiguous(), lora_key(module, "A"): a.contiguous()}
            rank = b.shape[1]
        path = self.folder / f"{name}.safetensors"
        save_file(tensors, path)
        config = adapter_config_json(
            rank=rank,
            scale=SCALE,
            target_modules=[module.name for module in self.manifest.modules],
            task_type="SEQ_CLS",
            base_model_name="tiny",
            modules_to_save=["classifier"],
        )
        return DeliveredAdapter(path=path, config_json=config, use=use, rank=rank)

    def run(self, plan: LocalPlan, *adapters: DeliveredAdapter, kind: JobKind = JobKind.TRAIN) -> list[Event]:
        """Events of one job; its update lies in `out.safetensors`."""
        job = Job(
            number=1,
            kind=kind,
            model=str(self.folder / "model"),
            manifest_json=self.manifest.to_json(),
            plan=plan,
            adapters=adapters,
            data=str(self.folder / "train.jsonl"),
            evaluation_data=str(self.folder / "held_out.jsonl"),
            out=self.folder / "out.safetensors",
            seconds_left=None,
            device="devices/a",
            round_number=1,
        )
        events: list[Event] = []
        self.runner.run(job, events.append, NoControls())
        return events

    def trained(self) -> Tensors:
        """What the last job wrote."""
        return load_file(self.folder / "out.safetensors")


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Device]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("device")
    save_tiny_encoder(folder / "model")
    write_texts(folder / "train.jsonl", 24, seed=1)
    write_texts(folder / "held_out.jsonl", 12, seed=2)
    manifest = build_manifest(
        str(folder / "model"),
        task=Task.SEQUENCE_CLASSIFICATION,
        target_modules=["query", "value"],
        labels=tuple(sorted(WORDS)),
    )
    yield Device(folder, manifest, JobRunner())
    torch.set_num_threads(before)


def drawn(device: Device, rank: int, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        module.name: (
            0.3 * torch.randn(module.out_features, rank, generator=generator),
            0.3 * torch.randn(rank, module.in_features, generator=generator),
        )
        for module in device.manifest.modules
    }


def head(device: Device) -> Tensors:
    generator = torch.Generator().manual_seed(9)
    return {dense_key(item.name): 0.1 * torch.randn(item.shape, generator=generator) for item in device.manifest.dense}


def loss(events: list[Event], measured: Measured) -> float:
    (found,) = (event for event in events if isinstance(event, Evaluated) and event.measured is measured)
    return found.loss


@pytest.mark.parametrize("factor", [FactorSet.A, FactorSet.B])
def test_one_factor_is_trained_and_sent_on_top_of_a_frozen_part(device: Device, factor: FactorSet) -> None:
    train, tail = drawn(device, 4, 1), drawn(device, 6, 2)
    joined = {name: (torch.cat([b, tail[name][0]], 1), torch.cat([a, tail[name][1]])) for name, (b, a) in train.items()}
    whole = device.adapter("joined", joined, AdapterUse.EVALUATE, head(device))
    expected = loss(device.run(PLAN, whole, kind=JobKind.EVALUATE), Measured.VERSION)
    plan = replace(PLAN, train_mask=factor, upload_set=factor)
    events = device.run(
        plan,
        device.adapter("frozen", tail, AdapterUse.FROZEN, {}),
        device.adapter("train", train, AdapterUse.TRAIN, head(device)),
    )
    assert loss(events, Measured.BEFORE) == pytest.approx(expected, abs=1e-5)
    sent = device.trained()
    names = {lora_key(module.name, "A" if factor is FactorSet.A else "B") for module in device.manifest.modules}
    assert set(sent) == names | set(head(device))
    for name, (b, a) in train.items():
        key = lora_key(name, "A" if factor is FactorSet.A else "B")
        assert not torch.equal(sent[key], a if factor is FactorSet.A else b)
        trained = (b, sent[key]) if factor is FactorSet.A else (sent[key], a)
        joined[name] = torch.cat([trained[0], tail[name][0]], 1), torch.cat([trained[1], tail[name][1]])
    dense = {key: sent[key] for key in head(device)}
    after = device.adapter("after", joined, AdapterUse.EVALUATE, dense)
    expected = loss(device.run(PLAN, after, kind=JobKind.EVALUATE), Measured.VERSION)
    assert loss(events, Measured.AFTER) == pytest.approx(expected, abs=1e-5), "what is not sent did not move"


def test_a_device_that_can_spare_directions_sends_fewer(device: Device) -> None:
    plan = replace(PLAN, extra={"hetlora_gamma": "0.5", "hetlora_lambda": "20"})
    delivered = device.adapter("train", drawn(device, 4, 1), AdapterUse.TRAIN, head(device))
    events = device.run(plan, delivered)
    (trained,) = (event for event in events if isinstance(event, Trained))
    assert trained.rank == 2
    sent = device.trained()
    pairs = {m.name: (sent[lora_key(m.name, "B")], sent[lora_key(m.name, "A")]) for m in device.manifest.modules}
    assert {(b.shape[1], a.shape[0]) for b, a in pairs.values()} == {(2, 2)}
    small = device.adapter("small", pairs, AdapterUse.EVALUATE, {key: sent[key] for key in head(device)})
    expected = loss(device.run(PLAN, small, kind=JobKind.EVALUATE), Measured.VERSION)
    assert loss(events, Measured.AFTER) == pytest.approx(expected, abs=1e-5), "what is measured is what is sent"
    scales = scales_from_config(_with_rank(delivered.config_json, 2, 4), list(pairs))
    assert {(item.rank, item.scale) for item in scales.values()} == {(2, SCALE)}


def test_a_device_whose_last_directions_grew_keeps_them(device: Device) -> None:
    factors = {name: (torch.zeros_like(b), a) for name, (b, a) in drawn(device, 4, 1).items()}
    plan = replace(PLAN, extra={"hetlora_gamma": "0.5"})
    events = device.run(plan, device.adapter("train", factors, AdapterUse.TRAIN, head(device)))
    (trained,) = (event for event in events if isinstance(event, Trained))
    assert trained.rank == 4
    assert {value.shape[0] for key, value in device.trained().items() if "lora_A" in key} == {4}


@pytest.mark.parametrize(
    "extra", [{"hetlora_gamma": "1.5"}, {"hetlora_gamma": "much"}, {"hetlora_lambda": "-1"}, {"hetlora_lambda": "nan"}]
)
def test_pruning_with_numbers_that_cannot_be_used_is_refused(device: Device, extra: dict[str, str]) -> None:
    delivered = device.adapter("train", drawn(device, 4, 1), AdapterUse.TRAIN, head(device))
    with pytest.raises(GloraError, match="hetlora") as caught:
        device.run(replace(PLAN, extra=extra), delivered)
    assert caught.value.reason is Reason.CONFIG_INVALID
