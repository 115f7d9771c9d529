"""Rows of a simulation: nobody's rows are lost or dealt twice, and the skew is what was asked for."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glora_cli.simulate_data import deal, device_ranks, files_digest, read_corpus
from glora_cli.simulate_spec import DataSection, DevicesSection
from glora_client.data import ClassificationRow
from glora_wire.errors import GloraError, Reason

ROWS = tuple(ClassificationRow(text=f"row {number}", text_b=None, label=number % 4) for number in range(400))


def _section(**changes: object) -> DataSection:
    values = {"train": "train.jsonl", "held_out": "held_out.jsonl", "min_rows": 5} | changes
    return DataSection.model_validate(values)


def _write(path: Path, rows: Sequence[object]) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


@given(
    devices=st.integers(1, 20),
    alpha=st.floats(1e-3, 1e3),
    seed=st.integers(0, 1000),
    split=st.sampled_from(["dirichlet", "iid"]),
)
def test_every_row_has_one_owner_and_nobody_is_poor(devices: int, alpha: float, seed: int, split: str) -> None:
    hands = deal(ROWS, _section(alpha=alpha, split=split), devices, seed=seed)
    assert len(hands) == devices
    assert Counter(row for hand in hands for row in hand) == Counter(ROWS)
    assert min(map(len, hands)) >= 5


@given(devices=st.integers(1, 40), alpha=st.floats(1e-3, 1e3), seed=st.integers(0, 1000))
def test_as_many_rows_as_everyone_needs_are_enough_with_any_seed(devices: int, alpha: float, seed: int) -> None:
    hands = deal(ROWS[: 5 * devices], _section(alpha=alpha), devices, seed=seed)
    assert {len(hand) for hand in hands} == {5}


def test_the_same_seed_deals_alike_and_another_one_does_not() -> None:
    first, again, other = (deal(ROWS, _section(), 8, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_a_small_alpha_makes_devices_differ_more() -> None:
    def largest_share(alpha: float) -> float:
        hands = [hand for seed in range(5) for hand in deal(ROWS, _section(alpha=alpha), 8, seed=seed)]
        return sum(max(Counter(row.label for row in hand).values()) / len(hand) for hand in hands) / len(hands)

    assert largest_share(0.1) > 0.6
    assert largest_share(100.0) < 0.4


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(GloraError, match="simulate fewer devices") as caught:
        deal(ROWS[:20], _section(), 8, seed=0)
    assert caught.value.reason is Reason.DATA_EMPTY


def test_ranks_take_turns_or_are_drawn() -> None:
    assert device_ranks(DevicesSection(count=5), (2, 4), seed=0) == (2, 4, 2, 4, 2)
    drawn = DevicesSection(count=400, ranks=(2, 4, 8), rank_weights=(0.0, 3.0, 1.0))
    found = Counter(device_ranks(drawn, drawn.ranks, seed=3))
    assert set(found) == {4, 8}
    assert found[4] > 2 * found[8]


def test_own_keys_pairs_and_samples_are_read(tmp_path: Path) -> None:
    _write(tmp_path / "train.jsonl", [{"q": f"question {n}", "p": "more", "kind": n % 3} for n in range(30)])
    _write(tmp_path / "held_out.jsonl", [{"q": "w" * (20 - n), "kind": "1"} for n in range(10)])
    section = _section(text="q", text_b="p", label="kind", train_rows=12, held_out_rows=6)
    corpus = read_corpus(section, tmp_path)
    assert corpus.labels == ("0", "1", "2")
    assert len(corpus.train) == 12
    assert corpus.train[0].text_b == "more"
    assert [len(row.text) for row in corpus.held_out] == sorted(len(row.text) for row in corpus.held_out)
    assert len(corpus.held_out) == 6
    assert corpus == read_corpus(section, tmp_path)


@pytest.mark.parametrize(
    ("line", "reason", "expected"),
    [
        ("[1]", Reason.DATA_INVALID, "line 2: it must be a JSON object"),
        ("{", Reason.DATA_INVALID, "line 2: it is not JSON"),
        ('{"text": "x"}', Reason.DATA_INVALID, 'a class under "label_name"'),
        ('{"label_name": "a"}', Reason.DATA_INVALID, 'a text under "text"'),
        ('{"text": "x", "label_name": "c"}', Reason.UNKNOWN_LABEL, "the class 'c'"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, line: str, reason: Reason, expected: str) -> None:
    _write(tmp_path / "train.jsonl", [{"text": "x", "label_name": label} for label in "ab"])
    (tmp_path / "held_out.jsonl").write_text('{"text": "x", "label_name": "a"}\n' + line + "\n")
    with pytest.raises(GloraError) as caught:
        read_corpus(_section(), tmp_path)
    assert caught.value.reason is reason
    assert expected in caught.value.message


def test_a_missing_file_says_what_the_paths_start_from(tmp_path: Path) -> None:
    with pytest.raises(GloraError, match="--data"):
        files_digest(_section(), tmp_path)
