from __future__ import annotations

import json
from pathlib import Path

import pytest

from glora_cli.demo_corpus import MAX_CHARACTERS, MIN_CHARACTERS, TOPICS, Row, collect_corpus
from glora_cli.demo_data import FEWEST_ROWS, MAX_HELD_OUT, read_rows, split_rows, write_rows
from glora_client.data import classification_rows
from glora_wire.errors import GloraError, Reason


@pytest.fixture(scope="module")
def corpus() -> tuple[Row, ...]:
    return collect_corpus()


def _rows(count: int) -> list[Row]:
    return [Row(f"text number {number}", f"class {number % 3}") for number in range(count)]


def test_corpus_has_thousands_of_paragraphs_of_eight_classes(corpus: tuple[Row, ...]) -> None:
    assert 6_000 <= len(corpus) <= 14_000
    assert {row.label for row in corpus} == set(TOPICS)
    shares = {label: sum(row.label == label for row in corpus) / len(corpus) for label in TOPICS}
    assert min(shares.values()) > 0.02
    assert max(shares.values()) < 0.30


def test_corpus_is_the_same_every_time(corpus: tuple[Row, ...]) -> None:
    assert collect_corpus() == corpus


def test_paragraphs_have_a_usable_length_and_one_label(corpus: tuple[Row, ...]) -> None:
    assert all(MIN_CHARACTERS <= len(row.text) <= MAX_CHARACTERS for row in corpus)
    assert len({row.text for row in corpus}) == len(corpus)


def test_a_text_of_two_topics_is_dropped(tmp_path: Path) -> None:
    both = "This sentence stands in two modules that belong to different topics."
    texts = "\n".join(
        f'def f{n}():\n    """The paragraph with the number {n} of a module about queues."""' for n in range(1100)
    )
    (tmp_path / "queue.py").write_text(f'"""{both}"""\n{texts}\n')
    (tmp_path / "socket.py").write_text(f'"""{both}"""\n')
    found = collect_corpus(tmp_path)
    assert len(found) == 1100
    assert both not in {row.text for row in found}


def test_a_library_without_sources_is_explained(tmp_path: Path) -> None:
    with pytest.raises(GloraError, match="--data FILE") as caught:
        collect_corpus(tmp_path)
    assert caught.value.reason is Reason.DATA_EMPTY


def test_no_row_is_held_twice(corpus: tuple[Row, ...]) -> None:
    split = split_rows(corpus, 4)
    texts = [row.text for part in (split.held_out, *split.devices) for row in part]
    assert len(set(texts)) == len(texts)
    assert len(split.held_out) == MAX_HELD_OUT
    assert sum(map(len, split.devices)) == len(corpus) - int(len(corpus) * 0.2)


def test_split_depends_on_the_rows_and_the_seed_alone(corpus: tuple[Row, ...]) -> None:
    assert split_rows(corpus, 4) == split_rows(corpus[::-1], 4)
    assert split_rows(corpus, 4) != split_rows(corpus, 4, seed=1)


def test_some_other_rows_change_little(corpus: tuple[Row, ...]) -> None:
    """Another Python has another corpus; the demo must not depend on which rows go where."""
    before, after = split_rows(corpus, 4), split_rows(corpus[::50] + corpus[100:], 4)
    for old, new in zip(before.devices, after.devices, strict=True):
        assert len({*old} & {*new}) > 0.9 * len(old)


def test_devices_are_skewed(corpus: tuple[Row, ...]) -> None:
    """With equal shares every device would have about an eighth to a quarter of each label."""
    split = split_rows(corpus, 4)
    shares = [
        sum(row.label == label for row in part) / sum(row.label == label for other in split.devices for row in other)
        for part in split.devices
        for label in split.labels
    ]
    assert min(shares) < 0.05
    assert max(shares) > 0.5


@pytest.mark.parametrize("devices", [1, 2, 16, 40])
def test_every_device_gets_at_least_a_batch(devices: int) -> None:
    split = split_rows(_rows(1000), devices)
    assert len(split.devices) == devices
    assert min(map(len, split.devices)) >= FEWEST_ROWS


@pytest.mark.parametrize("rows", [_rows(70), [Row(f"text {n}", "the only label") for n in range(1000)], []])
def test_too_few_rows_or_labels_are_refused(rows: list[Row]) -> None:
    with pytest.raises(GloraError, match="too few for 4 devices"):
        split_rows(rows, 4)


def test_written_rows_are_what_a_device_reads(tmp_path: Path) -> None:
    rows = [Row('quotes " and\nnew lines', "first"), Row("umlauts äöü \u2028 and other ends of lines", "second")]
    path = tmp_path / "rows.jsonl"
    write_rows(path, rows)
    assert read_rows(path) == tuple(rows)
    read = classification_rows(str(path), ["first", "second"])
    assert [(row.text, row.label) for row in read] == [(rows[0].text, 0), (rows[1].text, 1)]


def test_rows_of_a_file_are_read(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    lines = [
        {"text": "a", "label": 3},
        {"text": "b", "label_name": "x"},
        {"text": "c", "label": 1},
        {"text": "c", "label": 2},
    ]
    path.write_text("\n\n".join(map(json.dumps, lines)))
    assert read_rows(path) == (Row("a", "3"), Row("b", "x"))


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "it is not JSON"),
        ("[]", 'with a "text"'),
        ('{"label": "x"}', 'with a "text"'),
        ('{"text": " ", "label": "x"}', 'with a "text"'),
        ('{"text": "a"}', '"label_name"'),
        ('{"text": "a", "label": true}', '"label_name"'),
        ('{"text": "a", "label": 1.5}', '"label_name"'),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, complaint: str) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text('{"text": "fine", "label": "x"}\n' + line)
    with pytest.raises(GloraError, match=complaint) as caught:
        read_rows(path)
    assert caught.value.reason is Reason.DATA_INVALID
    assert "own.jsonl, line 2" in caught.value.message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(GloraError, match=r"own\.jsonl cannot be read"):
        read_rows(tmp_path / "own.jsonl")
