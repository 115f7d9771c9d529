"""What a simulation found: rows of JSONL by strategy, seed, round and rank, kept from one start to the next."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import Any

from glora_cli.simulate_folder import writing
from glora_cli.simulate_spec import SimSpec, StrategyEntry
from glora_wire.errors import GloraError, Reason

Pair = tuple[str, int]
"""A strategy by its label, and a seed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceRecord:
    """A device's update of a round, as means over modules: ‖ΔW‖, its cosine with the mean update, the share of it that
    the consensus subspace holds, ‖PΔW‖/‖ΔW‖, and how far the mean would move without it (None in older files)."""

    device: str
    update_norm: float | None
    cosine: float | None
    capture: float | None
    influence: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Consensus:
    """How far the devices of a round agreed, as means over modules.

    `eigenvalues` are those of K, the R largest, item by item (empty for a strategy without K); the angles (radians) are
    the mean and the largest one between the column spaces of the state before the round and after it, None when either
    is the zero state.
    """

    eigenvalues: tuple[float, ...]
    mean_angle: float | None
    largest_angle: float | None
    devices: tuple[DeviceRecord, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One rank of one round; what belongs to the whole round is repeated for every rank.

    `accuracy` and `loss` are those of the readout of `rank` on the held-out rows, null where it was not measured.
    `devices` is the number of devices of exactly this rank. `truncation_error`, `aggregation_bias` (the part of it that
    no larger rank mends), `captured_energy`, `eigengap` and `mean_norm` are means over the modules, `sigma` (of the new
    state) and `coverage` too, item by item. `failed` counts devices whose training diverged, `rejected` those whose
    update was refused. `bytes_up` and `bytes_down` are what the method moves, all devices together: numbers times the
    width of the wire's format, no headers. `seconds` are those of the whole round with its measurements, on this
    machine. `consensus` stands in the row of the server's rank only, of which every round has one; it is None where
    nobody's update was accepted. Files of versions that did not keep `consensus` or `aggregation_bias` have None there.
    """

    settings: str
    strategy: str
    seed: int
    round: int
    rank: int
    server_rank: int
    devices: int
    accuracy: float | None
    loss: float | None
    training_loss: float | None
    truncation_error: float | None
    captured_energy: float | None
    eigengap: float | None
    mean_norm: float | None
    sigma: tuple[float, ...]
    coverage: tuple[float, ...]
    updates: int
    failed: int
    rejected: int
    bytes_up: int
    bytes_down: int
    seconds: float
    aggregation_seconds: float
    consensus: Consensus | None = None
    aggregation_bias: float | None = None

    def to_json(self) -> str:
        """The row as one line."""
        return json.dumps(dataclasses.asdict(self), allow_nan=False)

    @classmethod
    def from_json(cls, line: str, place: str) -> Result:
        """The row that `to_json` wrote; raises DATA_INVALID naming the place."""
        try:
            values = json.loads(line)
            values["sigma"], values["coverage"] = tuple(values["sigma"]), tuple(values["coverage"])
            if values.get("consensus") is not None:
                values["consensus"] = _consensus(values["consensus"])
            return cls(**values)
        except (ValueError, KeyError, TypeError) as error:
            raise GloraError(
                Reason.DATA_INVALID,
                f"{place}: it is not a result of this version of `glora simulate`; give a new folder with --out.",
            ) from error


def settings_digest(spec: SimSpec, entry: StrategyEntry, data: str) -> str:
    """Names all that a strategy's results depend on besides the seed: 16 hex digits; `data` is the files' digest."""
    common = spec.model_dump(mode="json", exclude={"name", "seeds", "strategies"})
    own = entry.model_dump(mode="json", exclude={"label"})
    text = json.dumps([common, own, data], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_results(path: Path) -> tuple[Result, ...]:
    """The rows of a file, none when there is no such file.

    Raises DATA_INVALID naming the line, REQUEST_INVALID for a file that cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (FileNotFoundError, NotADirectoryError):
        return ()
    except UnicodeDecodeError as error:
        raise GloraError(
            Reason.DATA_INVALID, f"{path} is not text in UTF-8; give a new folder with --out, or delete the file."
        ) from error
    except OSError as error:
        raise GloraError(
            Reason.REQUEST_INVALID, f"{path} cannot be read ({error.strerror}); name another folder with --out."
        ) from error
    return tuple(Result.from_json(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line)


def append_results(path: Path, rows: Iterable[Result]) -> None:
    """Add the rows of one finished pair in one piece, so that a file has all rows of a pair or none.

    Raises REQUEST_INVALID when they cannot be written; the file is then what it was.
    """
    content = "".join(f"{row.to_json()}\n" for row in rows).encode()
    with writing(path), path.open("ab", buffering=0) as file:
        before = file.tell()
        try:
            _write_all(file, content)
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(before)
            raise


def wanted_rows(rows: Sequence[Result], spec: SimSpec, digests: dict[str, str], path: Path) -> tuple[Result, ...]:
    """The rows that answer to this simulation; `digests` has the settings of every strategy by label.

    Raises SPEC_INVALID when one of its pairs was made with other settings or is not whole.
    """
    pairs = {(entry.title, seed) for entry in spec.strategies for seed in spec.seeds}
    ours = tuple(row for row in rows if (row.strategy, row.seed) in pairs)
    other = sorted({row.strategy for row in ours if row.settings != digests[row.strategy]})
    if other:
        raise GloraError(
            Reason.SPEC_INVALID,
            f"{path} has results of {', '.join(other)} that were made with other settings or other data; give a new "
            "folder with --out, or delete the file.",
        )
    finished = {pair_of(row) for row in ours if row.round == spec.rounds}
    return tuple(row for row in ours if pair_of(row) in finished)


def pair_of(row: Result) -> Pair:
    """The strategy and seed of a row."""
    return row.strategy, row.seed


def _write_all(file: RawIOBase, content: bytes) -> None:
    """Write the bytes without a buffer, which would write again what failed when the file is closed."""
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) or 0 :]


def _consensus(values: Mapping[str, Any]) -> Consensus:
    return Consensus(
        eigenvalues=tuple(values["eigenvalues"]),
        mean_angle=values["mean_angle"],
        largest_angle=values["largest_angle"],
        devices=tuple(DeviceRecord(**device) for device in values["devices"]),
    )
