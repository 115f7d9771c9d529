"""Rows of the device's own data, read from JSONL, CSV, Parquet or a `datasets` name, checked against the labels.

Classification rows have `text` (and `text_b` for pairs) and `label` (name or number) or `label_name`; rows for causal
language models have `prompt`, or `instruction` with an optional `input`, and `response` or `output`. Numbers count
into the manifest's labels; where both are present the name wins. Imported by the agent too: nothing heavy here.
"""

from __future__ import annotations

import csv
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn, TextIO, TypeAlias, TypeVar

from glora_wire.errors import GloraError, Reason

DATASETS_PREFIX: Final = "datasets:"
_SECONDS: Final = 600.0
_TEXT_FIELDS: Final = ("text", "sentence", "sentence1")
_PAIR_FIELDS: Final = ("text_b", "sentence2")
_RESPONSE_FIELDS: Final = ("response", "output", "completion")

Raw: TypeAlias = Mapping[str, object]
Row = TypeVar("Row")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassificationRow:
    """A text, or a pair of texts, and the index of its label in the manifest."""

    text: str
    text_b: str | None
    label: int


@dataclass(frozen=True, slots=True, kw_only=True)
class InstructionRow:
    """What the model is told and what it should answer."""

    prompt: str
    response: str


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a row stands, for messages: the source and the line or row number from 1."""

    source: str
    word: str
    number: int

    def __str__(self) -> str:
        return f"{self.source}, {self.word} {self.number}"


def classification_rows(source: str, labels: Sequence[str]) -> list[ClassificationRow]:
    """All rows of `source` with label ids from `labels`.

    Raises GloraError DATA_EMPTY, DATA_INVALID (file, line, what was expected) or UNKNOWN_LABEL.
    """
    ids = {label: index for index, label in enumerate(labels)}
    return _some(source, [_classification(row, place, ids, labels) for row, place in _rows(source)])


def instruction_rows(source: str) -> list[InstructionRow]:
    """All rows of `source` for a causal language model; raises GloraError DATA_EMPTY or DATA_INVALID."""
    return _some(source, [_instruction(row, place) for row, place in _rows(source)])


def check_rows(source: str, *, task: str, labels: Sequence[str]) -> int:
    """How many rows `source` has for the task, every one of them checked and none kept; raises as the readers do."""
    ids = {label: index for index, label in enumerate(labels)}
    count = 0
    for row, place in _rows(source):
        if task == "sequence_classification":
            _classification(row, place, ids, labels)
        else:
            _instruction(row, place)
        count += 1
    if count == 0:
        _empty(source)
    return count


def count_rows(source: str) -> int:
    """How many rows `source` has; lines are counted, not parsed, where the format allows it.

    Raises GloraError DATA_EMPTY or DATA_INVALID.
    """
    if not source.startswith(DATASETS_PREFIX) and _suffix(source) == ".jsonl":
        with _open(source) as file:
            count = sum(1 for line in _decoded(source, file) if line.strip())
    else:
        count = sum(1 for _ in _rows(source))
    if count == 0:
        _empty(source)
    return count


def _some(source: str, rows: list[Row]) -> list[Row]:
    if not rows:
        _empty(source)
    return rows


def _empty(source: str) -> NoReturn:
    raise GloraError(
        Reason.DATA_EMPTY, f"{source} has no rows; a device needs at least one row to train or evaluate.", source=source
    )


def _rows(source: str) -> Iterator[tuple[Raw, _Place]]:
    if source.startswith(DATASETS_PREFIX):
        return _named_dataset(source)
    match _suffix(source):
        case ".jsonl" | ".ndjson" | ".json":
            return _json_lines(source)
        case ".csv" | ".tsv":
            return _csv(source)
        case ".parquet":
            return _parquet(source)
        case other:
            raise _invalid(
                source,
                f"its ending {other!r} is not known; use .jsonl, .csv, .tsv or .parquet, or datasets:NAME[:SPLIT]",
            )


def _suffix(source: str) -> str:
    return Path(source).suffix.lower()


def _open(source: str, newline: str | None = None) -> TextIO:
    try:
        return Path(source).open(encoding="utf-8-sig", newline=newline)
    except OSError as error:
        raise _invalid(source, f"it cannot be opened ({error.strerror}); check the path and the rights") from error


def _json_lines(source: str) -> Iterator[tuple[Raw, _Place]]:
    with _open(source) as file:
        for number, line in enumerate(_decoded(source, file), start=1):
            if not line.strip():
                continue
            place = _Place(source, "line", number)
            try:
                row = json.loads(line)
            except ValueError as error:
                raise _invalid(place, f"it is not JSON ({error}); every line must be one JSON object") from error
            if not isinstance(row, dict):
                raise _invalid(place, f"it is a JSON {type(row).__name__}; every line must be one JSON object")
            yield row, place


def _csv(source: str) -> Iterator[tuple[Raw, _Place]]:
    with _open(source, newline="") as file:
        reader = csv.DictReader(_decoded(source, file), delimiter="\t" if _suffix(source) == ".tsv" else ",")
        try:
            for row in reader:
                place = _Place(source, "line", reader.line_num)
                if None in row or None in row.values():
                    raise _invalid(place, f"it does not have the {len(reader.fieldnames or ())} columns of the header")
                # Every cell is text: an empty optional one (text_b, input) means that it is absent.
                yield {name: value for name, value in row.items() if value != ""}, place
        except csv.Error as error:
            raise _invalid(_Place(source, "line", reader.line_num), f"it is not CSV ({error})") from error


def _decoded(source: str, file: Iterator[str]) -> Iterator[str]:
    try:
        yield from file
    except UnicodeDecodeError as error:
        raise _invalid(source, f"it is not text in UTF-8 ({error.reason} at byte {error.start})") from error


def _parquet(source: str) -> Iterator[tuple[Raw, _Place]]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise _invalid(source, "reading Parquet needs pyarrow; pip install 'glora[client]'") from error
    arrow = importlib.import_module("pyarrow")
    try:
        with parquet.ParquetFile(source) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield (
                        {name: value for name, value in row.items() if value is not None},
                        _Place(source, "row", number),
                    )
    except (OSError, arrow.ArrowException) as error:
        raise _invalid(source, f"it cannot be read as Parquet ({error})") from error


def _named_dataset(source: str) -> Iterator[tuple[Raw, _Place]]:
    """Rows of `datasets:NAME[:SPLIT]` (split "train" unless said), through the `datasets` library."""
    name, _, split = source.removeprefix(DATASETS_PREFIX).partition(":")
    try:
        library = importlib.import_module("datasets")
    except ImportError as error:
        raise _invalid(source, "named data sets need the datasets library; pip install datasets") from error
    try:
        dataset = library.load_dataset(name, split=split or "train")
    except (OSError, ValueError, library.exceptions.DatasetsError) as error:
        raise _invalid(source, f"datasets could not load it ({error})") from error
    for number, row in enumerate(dataset, start=1):
        yield _present(row), _Place(source, "row", number)


def _present(row: Raw) -> Raw:
    return {name: value for name, value in row.items() if value is not None}


def _classification(row: Raw, place: _Place, ids: Mapping[str, int], labels: Sequence[str]) -> ClassificationRow:
    text = _text(row, _TEXT_FIELDS, place)
    if text is None:
        raise _invalid(place, f"it has no 'text'; it has {_names(row)}")
    label = row.get("label_name", row.get("label"))
    if label is None:
        raise _invalid(place, f"it has neither 'label' nor 'label_name'; it has {_names(row)}")
    return ClassificationRow(
        text=text, text_b=_text(row, _PAIR_FIELDS, place), label=_label_id(label, place, ids, labels)
    )


def _label_id(label: object, place: _Place, ids: Mapping[str, int], labels: Sequence[str]) -> int:
    if isinstance(label, str) and label in ids:
        return ids[label]
    # CSV has no numbers, so digits that are not themselves a label's name count into the list.
    number = int(label) if isinstance(label, str) and label.isascii() and label.isdigit() else label
    if isinstance(number, int) and not isinstance(number, bool) and 0 <= number < len(labels):
        return number
    if not isinstance(number, int | str) or isinstance(number, bool):
        raise _invalid(place, f"its label is a {type(label).__name__}; a label is a name or a whole number")
    known = ", ".join(repr(name) for name in labels[:20]) + (", …" if len(labels) > 20 else "")
    raise GloraError(
        Reason.UNKNOWN_LABEL,
        f"{place}: the label {label!r} is not one of the {len(labels)} labels of the run ({known}); "
        "correct the row, or ask the operator for a run whose manifest has it.",
        label=label,
        place=place,
    )


def _instruction(row: Raw, place: _Place) -> InstructionRow:
    prompt = _text(row, ("prompt",), place)
    if prompt is None:
        parts = [_text(row, (name,), place) for name in ("instruction", "definition", "input")]
        prompt = "\n\n".join(part for part in parts if part)
        if not prompt:
            raise _invalid(place, f"it has none of 'prompt', 'instruction' and 'input'; it has {_names(row)}")
        prompt += "\n"
    response = _text(row, _RESPONSE_FIELDS, place)
    if response is None:
        raise _invalid(place, f"it has neither 'response' nor 'output'; it has {_names(row)}")
    return InstructionRow(prompt=prompt, response=response)


def _text(row: Raw, names: Sequence[str], place: _Place) -> str | None:
    for name in names:
        value = row.get(name)
        # Some collections list every accepted answer; the first is the one to learn.
        if isinstance(value, list) and value:
            value = value[0]
        if isinstance(value, str):
            return value
        if value is not None:
            raise _invalid(place, f"its {name!r} is a {type(value).__name__}, not a text")
    return None


def _names(row: Raw) -> str:
    return ", ".join(repr(name) for name in list(row)[:12]) or "no fields"


def _invalid(place: object, what: str) -> GloraError:
    return GloraError(Reason.DATA_INVALID, f"{place}: {what}.", place=place)


def _main() -> int:
    """Answers one question of `separate`: a process of its own, so that pyarrow never stays in the agent's memory."""
    question = json.load(sys.stdin)
    source, task, labels = question["source"], question["task"], question["labels"]
    try:
        rows = check_rows(source, task=task, labels=labels) if task else count_rows(source)
        answer: dict[str, object] = {"rows": rows}
    except GloraError as error:
        answer = {"reason": error.reason.value, "message": error.message}
    sys.stdout.write(json.dumps(answer) + "\n")
    return 0


def rows_of(source: str | None, *, task: str = "", labels: Sequence[str] = ()) -> int:
    """How many rows the data has (0 for None), checked when `task` is given; light on the memory of this process.

    Raises GloraError DATA_EMPTY, DATA_INVALID, UNKNOWN_LABEL.
    """
    if source is None:
        return 0
    if not source.startswith(DATASETS_PREFIX) and _suffix(source) != ".parquet":
        return check_rows(source, task=task, labels=labels) if task else count_rows(source)
    question = json.dumps({"source": source, "task": task, "labels": list(labels)})
    command = [sys.executable, "-m", "glora_client.data"]
    done = subprocess.run(command, input=question, capture_output=True, text=True, timeout=_SECONDS, check=False)  # noqa: S603 - our own module
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
        if "rows" in answer:
            return int(answer["rows"])
        refusal = GloraError(Reason(answer["reason"]), answer["message"])
    except (IndexError, ValueError, KeyError) as error:
        raise _invalid(source, f"it could not be read ({done.stderr.strip()[-300:]})") from error
    raise refusal


if __name__ == "__main__":
    raise SystemExit(_main())
