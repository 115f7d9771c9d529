"""What is remembered as JSON text: written once, read by this release and the next ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from glora_server.coordinator.views_history import (
    ModuleFigures,
    Outcome,
    RoundFigures,
    Spread,
    Stage,
    VersionScore,
)
from glora_server.rounds.ids import RoundId, RunId
from glora_server.rounds.round import RoundPhase

_KEYS = {"round_id", "run_id", "number", "attempt"}


def round_figures_text(figures: RoundFigures) -> str:
    """Everything but the keys, which are columns."""
    return _text({name: value for name, value in asdict(figures).items() if name not in _KEYS})


def round_figures_from(text: str, *, round_id: RoundId, run_id: RunId, number: int, attempt: int) -> RoundFigures:
    """The figures of a round."""
    values = json.loads(text)
    return RoundFigures(
        round_id=round_id,
        run_id=run_id,
        number=number,
        attempt=attempt,
        phase=RoundPhase(values["phase"]),
        outcomes={Outcome(name): count for name, count in values["outcomes"].items()},
        bytes_down=values["bytes_down"],
        bytes_up=values["bytes_up"],
        seconds=values["seconds"],
        aggregating_seconds=values["aggregating_seconds"],
        stages={Stage(name): Spread(**spread) for name, spread in values["stages"].items()},
        update_norms=_spread(values["update_norms"]),
    )


def modules_text(modules: Sequence[ModuleFigures]) -> str:
    """A list of lists in the order of the record's fields: names would be most of the text."""
    return _text([list(asdict(module).values()) for module in modules])


def modules_from(text: str) -> tuple[ModuleFigures, ...]:
    """The figures of all modules of a version."""
    names = [field.name for field in fields(ModuleFigures)]
    found = []
    for entry in json.loads(text):
        # A list of an earlier server lacks the fields that came later; they stand at the end and have defaults.
        values: dict[str, Any] = dict(zip(names, entry, strict=False))
        values["spectrum"] = tuple(values["spectrum"])
        found.append(ModuleFigures(**values))
    return tuple(found)


def spreads_text(score: VersionScore) -> str:
    """How accuracies and losses lie."""
    return _text(
        {
            "accuracies": score.accuracies and asdict(score.accuracies),
            "losses": score.losses and asdict(score.losses),
        }
    )


def spreads_from(text: str) -> tuple[Spread | None, Spread | None]:
    """The same: accuracies, losses."""
    values = json.loads(text)
    return _spread(values["accuracies"]), _spread(values["losses"])


def _spread(values: dict[str, float] | None) -> Spread | None:
    return None if values is None else Spread(**values)


def _text(value: Any) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":"))
