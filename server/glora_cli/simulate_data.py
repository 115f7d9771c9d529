"""Rows of a simulation: read, cut to size, and dealt to virtual devices, all of it decided by seeds."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from glora_cli.simulate_spec import DataSection, DevicesSection
from glora_client.data import ClassificationRow
from glora_wire.errors import GloraError, Reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Rows to train on, rows to measure on (short texts first), and the classes that labels count into."""

    labels: tuple[str, ...]
    train: tuple[ClassificationRow, ...]
    held_out: tuple[ClassificationRow, ...]


def read_corpus(section: DataSection, folder: Path) -> Corpus:
    """The rows of the section's files; raises DATA_INVALID, DATA_EMPTY or UNKNOWN_LABEL naming the line."""
    train = _named_rows(section, folder / section.train)
    held_out = _named_rows(section, folder / section.held_out)
    labels = tuple(sorted({label for label, _ in train}))
    if len(labels) < 2:
        raise GloraError(Reason.DATA_INVALID, f"{folder / section.train} has one class only; two or more are needed.")
    ids = {label: index for index, label in enumerate(labels)}
    missing = sorted({label for label, _ in held_out} - set(labels))
    if missing:
        raise GloraError(
            Reason.UNKNOWN_LABEL,
            f"{folder / section.held_out} has the class {missing[0]!r}, which no row of {section.train} has.",
            label=missing[0],
        )
    measured = _sample([_with_id(label, row, ids) for label, row in held_out], section.held_out_rows, "held out")
    return Corpus(
        labels=labels,
        train=tuple(_sample([_with_id(label, row, ids) for label, row in train], section.train_rows, "train")),
        # Batches of equally long texts need little padding.
        held_out=tuple(sorted(measured, key=lambda row: len(row.text) + len(row.text_b or ""))),
    )


def files_digest(section: DataSection, folder: Path) -> str:
    """SHA-256 (hex) over the section's files; raises DATA_INVALID for one that cannot be read."""
    digest = hashlib.sha256()
    for name in (section.train, section.held_out):
        digest.update(hashlib.sha256(_content(folder / name)).digest())
    return digest.hexdigest()


def deal(
    rows: Sequence[ClassificationRow], section: DataSection, devices: int, *, seed: int
) -> tuple[tuple[ClassificationRow, ...], ...]:
    """Rows by device, nobody's rows anybody else's; the same for the same seed.

    dirichlet: the rows of each class are cut into shares drawn from Dirichlet(α, …, α), as in Hsu et al. (2019).
    Raises DATA_EMPTY when there are too few rows to give `min_rows` to everyone.
    """
    require_rows(len(rows), section, devices)
    generator = random.Random(f"deal {seed}")  # noqa: S311 - anybody can repeat it
    shuffled = generator.sample(list(rows), len(rows))
    if section.split == "iid":
        return tuple(tuple(shuffled[start::devices]) for start in range(devices))
    hands: list[list[ClassificationRow]] = [[] for _ in range(devices)]
    for label in sorted({row.label for row in rows}):
        ours = [row for row in shuffled if row.label == label]
        for hand, part in zip(hands, _cut(ours, _shares(section.alpha, devices, generator)), strict=True):
            hand.extend(part)
    for poor in hands:
        while len(poor) < section.min_rows:
            poor.append(max(hands, key=len).pop())
    return tuple(map(tuple, hands))


def require_rows(rows: int, section: DataSection, devices: int) -> None:
    """Raise DATA_EMPTY when so many rows are too few to give `min_rows` to everyone; else `deal` can, with any seed."""
    if rows < devices * section.min_rows:
        raise GloraError(
            Reason.DATA_EMPTY,
            f"{rows} rows are too few for {devices} devices with data.min_rows = {section.min_rows}; "
            "simulate fewer devices, or lower data.min_rows.",
        )


def device_ranks(section: DevicesSection, ranks: Sequence[int], *, seed: int) -> tuple[int, ...]:
    """One rank per device: `ranks` in turn, or drawn with the section's odds when they are its own ranks."""
    if section.rank_weights and tuple(ranks) == section.ranks:
        generator = random.Random(f"ranks {seed}")  # noqa: S311 - anybody can repeat it
        return tuple(generator.choices(list(ranks), weights=list(section.rank_weights), k=section.count))
    return tuple(ranks[number % len(ranks)] for number in range(section.count))


def _shares(alpha: float, count: int, generator: random.Random) -> list[float]:
    drawn = [generator.gammavariate(alpha, 1.0) for _ in range(count)]
    total = sum(drawn)
    if total <= 0:  # every gamma variate of a tiny α can underflow: then one device has it all
        lucky = generator.randrange(count)
        return [float(number == lucky) for number in range(count)]
    return [value / total for value in drawn]


def _cut(rows: Sequence[ClassificationRow], shares: Sequence[float]) -> list[Sequence[ClassificationRow]]:
    parts, start, so_far = [], 0, 0.0
    for share in shares:
        so_far += share
        end = min(len(rows), round(len(rows) * so_far))
        parts.append(rows[start:end])
        start = end
    return parts


def _sample(rows: list[ClassificationRow], count: int, what: str) -> list[ClassificationRow]:
    if count == 0 or count >= len(rows):
        return rows
    return random.Random(what).sample(rows, count)  # noqa: S311 - anybody can repeat it


def _with_id(label: str, row: ClassificationRow, ids: Mapping[str, int]) -> ClassificationRow:
    return ClassificationRow(text=row.text, text_b=row.text_b, label=ids[label])


def _named_rows(section: DataSection, path: Path) -> list[tuple[str, ClassificationRow]]:
    try:
        lines = _content(path).decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise _invalid(f"{path} is not text in UTF-8") from error
    rows = [_named_row(section, line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise GloraError(Reason.DATA_EMPTY, f"{path} has no rows.")
    return rows


def _named_row(section: DataSection, line: str, place: str) -> tuple[str, ClassificationRow]:
    try:
        values = json.loads(line)
    except ValueError:
        raise _invalid(f"{place}: it is not JSON; every line must be one JSON object") from None
    if not isinstance(values, dict):
        raise _invalid(f"{place}: it must be a JSON object")
    text, second, label = (values.get(key) for key in (section.text, section.text_b, section.label))
    if not isinstance(text, str) or not text.strip():
        raise _invalid(f'{place}: it must have a text under "{section.text}" (data.text names the key)')
    if isinstance(label, bool) or not isinstance(label, str | int) or label == "":
        raise _invalid(f'{place}: it must have a class under "{section.label}" (data.label names the key)')
    return str(label), ClassificationRow(text=text, text_b=second if isinstance(second, str) else None, label=0)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _invalid(
            f"{path} cannot be read ({error.strerror}); say with --data which folder the paths of [data] start from"
        ) from error


def _invalid(what: str) -> GloraError:
    return GloraError(Reason.DATA_INVALID, f"{what}.")
