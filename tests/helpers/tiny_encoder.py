"""A BERT of two layers with random weights and texts that it can tell apart; made in a moment, nothing downloaded."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from transformers import BertConfig, BertModel, BertTokenizer

WORDS = {"fruit": ("apple", "pear", "plum", "fig"), "tool": ("saw", "file", "drill", "axe"), "sea": ("tide", "reef")}
FILLER = ("the", "a", "one", "old", "new", "red")


def save_tiny_encoder(folder: Path) -> Path:
    """Write the model's folder and return it."""
    folder.mkdir()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *FILLER, *(w for ws in WORDS.values() for w in ws)]
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in vocabulary))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        initializer_range=0.1,  # with 0.02 the first token would hardly see the others
    )
    BertModel(config).save_pretrained(folder)
    BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def write_texts(path: Path, count: int, *, seed: int, field: str = "text") -> Path:
    """Write `count` short texts with their classes as JSONL."""
    draw = random.Random(seed)
    lines = []
    for number in range(count):
        label = sorted(WORDS)[number % len(WORDS)]
        words = [draw.choice(FILLER) for _ in range(draw.randint(1, 4))] + [draw.choice(WORDS[label])]
        lines.append(json.dumps({field: " ".join(words), "label_name": label}))
    path.write_text("\n".join(lines) + "\n")
    return path
