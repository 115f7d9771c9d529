"""Which rows every device of the demo holds: dealt from one pile with a label skew, a part of it held out."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from glora_cli.demo_corpus import Row
from glora_wire.errors import GloraError, Reason

SEED: Final = 2024
HELD_OUT_SHARE: Final = 0.2
MAX_HELD_OUT: Final = 480
"""Measured at every rank of every version; more rows would cost minutes and narrow the error by little."""
DIRICHLET_ALPHA: Final = 0.5
FEWEST_ROWS: Final = 16
"""A device has at least so many rows: one batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Rows by holder; nobody's rows are anybody else's."""

    labels: tuple[str, ...]
    held_out: tuple[Row, ...]
    devices: tuple[tuple[Row, ...], ...]


def split_rows(rows: Sequence[Row], devices: int, *, seed: int = SEED) -> Split:
    """A fifth held out, the rest dealt to `devices` with a label skew of Dirichlet(0.5).

    The same for the same rows in any order. Raises DATA_EMPTY when the rows do not suffice.
    """
    labels = tuple(sorted({row.label for row in rows}))
    shuffled = sorted(set(rows), key=lambda row: (_lot(row, seed), row))
    held_out = int(len(shuffled) * HELD_OUT_SHARE)
    training = shuffled[held_out:]
    if len(training) < devices * FEWEST_ROWS or len(labels) < 2:
        raise GloraError(
            Reason.DATA_EMPTY,
            f"{len(shuffled)} different rows with {len(labels)} labels are too few for {devices} devices: give at "
            f"least {int(devices * FEWEST_ROWS / (1 - HELD_OUT_SHARE)) + 1} rows with 2 labels, or fewer --devices.",
            rows=len(shuffled),
        )
    return Split(
        labels=labels,
        # By length: batches of equal texts need little padding, and the order does not matter to an accuracy.
        held_out=tuple(sorted(shuffled[: min(held_out, MAX_HELD_OUT)], key=lambda row: (len(row.text), row))),
        devices=_deal(training, labels, devices, random.Random(seed)),  # noqa: S311 - anybody can repeat it
    )


def _deal(
    rows: Sequence[Row], labels: Sequence[str], devices: int, generator: random.Random
) -> tuple[tuple[Row, ...], ...]:
    """Rows by device: of every label each device gets a share of its own, and nobody less than FEWEST_ROWS."""
    hands: list[list[Row]] = [[] for _ in range(devices)]
    for label in labels:
        shares = [generator.gammavariate(DIRICHLET_ALPHA, 1.0) for _ in range(devices)]
        ours = [row for row in rows if row.label == label]
        start, sum_so_far = 0, 0.0
        for hand, share in zip(hands, shares, strict=True):
            sum_so_far += share
            end = round(len(ours) * sum_so_far / sum(shares))
            hand.extend(ours[start:end])
            start = end
    for poor in hands:
        while len(poor) < FEWEST_ROWS:
            poor.append(max(hands, key=len).pop())
    return tuple(map(tuple, hands))


def _lot(row: Row, seed: int) -> bytes:
    """The row's place in the shuffle: its own, so that a corpus with some other rows is dealt almost alike."""
    return hashlib.sha256(f"{seed} {row.text}".encode()).digest()


def read_rows(path: Path) -> tuple[Row, ...]:
    """Rows of a JSONL file with "text" and "label_name" or "label"; raises DATA_INVALID naming the line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise _invalid(f"{path} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise _invalid(f"{path} is not text in UTF-8") from error
    rows = [_row(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1) if line.strip()]
    labelled: dict[str, set[str]] = {}
    for row in rows:
        labelled.setdefault(row.text, set()).add(row.label)
    # A text with two labels could be held out under one and trained under the other.
    return tuple(sorted(Row(text, *labels) for text, labels in labelled.items() if len(labels) == 1))


def _row(line: str, place: str) -> Row:
    try:
        values = json.loads(line)
    except ValueError:
        raise _invalid(f"{place}: it is not JSON; every line must be one JSON object") from None
    text = values.get("text") if isinstance(values, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise _invalid(f'{place}: it must be a JSON object with a "text"')
    label = values.get("label_name", values.get("label"))
    if isinstance(label, bool) or not isinstance(label, str | int) or label == "":
        raise _invalid(f'{place}: it must have a "label_name" (text) or a "label" (text or whole number)')
    return Row(text, str(label))


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as JSONL, as a device reads them."""
    lines = (json.dumps({"text": row.text, "label_name": row.label}, ensure_ascii=False) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _invalid(what: str) -> GloraError:
    return GloraError(Reason.DATA_INVALID, f"{what}.")
