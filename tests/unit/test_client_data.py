"""Rows of a device's own data: formats, labels, and errors that name the place."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from glora_client.data import ClassificationRow, InstructionRow, classification_rows, count_rows, instruction_rows
from glora_wire.errors import GloraError, Reason

LABELS = ("negative", "positive", "7")


def _write(path: Path, *rows: object) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def test_label_names_win_over_numbers(tmp_path: Path) -> None:
    source = _write(
        tmp_path / "a.jsonl",
        {"text": "good", "label": 0, "label_name": "positive"},
        "",
        {"text": "bad", "text_b": "very", "label": 0},
        {"text": "seven", "label": "7"},
    )
    assert classification_rows(source, LABELS) == [
        ClassificationRow(text="good", text_b=None, label=1),
        ClassificationRow(text="bad", text_b="very", label=0),
        ClassificationRow(text="seven", text_b=None, label=2),
    ]
    assert count_rows(source) == 3


def test_one_class_alone_is_fine(tmp_path: Path) -> None:
    source = _write(tmp_path / "a.jsonl", {"text": "x", "label": 1}, {"text": "y", "label": 1})
    assert {row.label for row in classification_rows(source, LABELS)} == {1}


@pytest.mark.parametrize("ending", [".csv", ".tsv"])
def test_csv_cells_are_text_and_empty_ones_absent(tmp_path: Path, ending: str) -> None:
    comma = "," if ending == ".csv" else "\t"
    lines = [("text", "text_b", "label"), ("first", "", "1"), ('"two\nlines"', "pair", "negative")]
    path = tmp_path / f"rows{ending}"
    path.write_text("\n".join(comma.join(line) for line in lines) + "\n")
    assert classification_rows(str(path), LABELS) == [
        ClassificationRow(text="first", text_b=None, label=1),
        ClassificationRow(text="two\nlines", text_b="pair", label=0),
    ]
    assert count_rows(str(path)) == 2


def test_parquet_gives_the_same_rows(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    parquet = importlib.import_module("pyarrow.parquet")

    table = pyarrow.table({"text": ["a", "b"], "text_b": [None, "c"], "label": [1, 0]})
    parquet.write_table(table, tmp_path / "rows.parquet")
    assert classification_rows(str(tmp_path / "rows.parquet"), LABELS) == [
        ClassificationRow(text="a", text_b=None, label=1),
        ClassificationRow(text="b", text_b="c", label=0),
    ]
    assert count_rows(str(tmp_path / "rows.parquet")) == 2


def test_instructions_join_their_parts(tmp_path: Path) -> None:
    source = _write(
        tmp_path / "a.jsonl",
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"prompt": "Q: ", "response": "A"},
        {"input": "only", "output": ["first", "second"]},
    )
    assert instruction_rows(source) == [
        InstructionRow(prompt="Add.\n\n1 2\n", response="3"),
        InstructionRow(prompt="Q: ", response="A"),
        InstructionRow(prompt="only\n", response="first"),
    ]


def test_unknown_label_names_the_place_and_the_known_ones(tmp_path: Path) -> None:
    source = _write(tmp_path / "a.jsonl", {"text": "x", "label": 1}, {"text": "y", "label_name": "neutral"})
    with pytest.raises(GloraError) as caught:
        classification_rows(source, LABELS)
    assert caught.value.reason is Reason.UNKNOWN_LABEL
    assert "a.jsonl, line 2" in caught.value.message
    assert "'neutral'" in caught.value.message
    assert "'positive'" in caught.value.message


@pytest.mark.parametrize("label", [3, -1])
def test_label_numbers_beyond_the_list_are_unknown(tmp_path: Path, label: int) -> None:
    source = _write(tmp_path / "a.jsonl", {"text": "x", "label": label})
    with pytest.raises(GloraError) as caught:
        classification_rows(source, LABELS)
    assert caught.value.reason is Reason.UNKNOWN_LABEL


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", '{"text": "x", "label": 1}\nnot json\n', "line 2: it is not JSON"),
        ("a.jsonl", "[1]\n", "line 1: it is a JSON list"),
        ("a.jsonl", '{"sentense": "x", "label": 1}\n', "line 1: it has no 'text'; it has 'sentense', 'label'"),
        ("a.jsonl", '{"text": "x"}\n', "line 1: it has neither 'label' nor 'label_name'"),
        ("a.jsonl", '{"text": 5, "label": 1}\n', "line 1: its 'text' is a int, not a text"),
        ("a.jsonl", '{"text": "x", "label": true}\n', "line 1: its label is a bool"),
        ("a.jsonl", '{"text": "x", "label": 1.5}\n', "line 1: its label is a float"),
        ("a.csv", "text,label\nx,1,surplus\n", "line 2: it does not have the 2 columns"),
        ("a.txt", "x\n", "its ending '.txt' is not known"),
        ("a.parquet", "not parquet", "cannot be read as Parquet"),
    ],
)
def test_invalid_rows_say_what_was_expected(tmp_path: Path, name: str, content: str, expected: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(GloraError) as caught:
        classification_rows(str(tmp_path / name), LABELS)
    assert caught.value.reason is Reason.DATA_INVALID
    assert expected in caught.value.message


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\xff\xfe"}\n')
    with pytest.raises(GloraError, match="not text in UTF-8"):
        classification_rows(str(tmp_path / "a.jsonl"), LABELS)


def test_missing_file_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(GloraError, match="cannot be opened") as caught:
        count_rows(str(tmp_path / "none.jsonl"))
    assert caught.value.reason is Reason.DATA_INVALID


@pytest.mark.parametrize(("name", "content"), [("a.jsonl", "\n\n"), ("a.csv", "text,label\n")])
def test_empty_data_is_refused(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    for read in (count_rows, lambda source: classification_rows(source, LABELS)):
        with pytest.raises(GloraError) as caught:
            read(str(tmp_path / name))
        assert caught.value.reason is Reason.DATA_EMPTY


def test_long_lists_of_labels_are_cut_in_messages(tmp_path: Path) -> None:
    source = _write(tmp_path / "a.jsonl", {"text": "x", "label_name": "none"})
    with pytest.raises(GloraError) as caught:
        classification_rows(source, [f"label{number}" for number in range(1000)])
    assert len(caught.value.message) < 600
