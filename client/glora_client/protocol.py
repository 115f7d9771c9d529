"""What the agent and its training process say to each other: one JSON object a line, no pickle.

    agent   -> process:  {"job": {...}} · {"cancel": number} · {"seconds_left": seconds or null}
    process -> agent:    {"number": job, "event": name, ...fields of the event}

One job at a time; its events end with `finished` or `failed`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from glora_client.plan import AdapterUse, DeliveredAdapter, LocalPlan
from glora_wire.errors import GloraError, Reason


class JobKind(StrEnum):
    """What a job is for."""

    TRAIN = "train"
    EVALUATE = "evaluate"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One thing to do. TRAIN writes `out`; EVALUATE measures every adapter on `evaluation_data`.

    `device` and `round_number` make the order of the data differ between devices and rounds, the same in a repeat.
    """

    number: int
    kind: JobKind
    model: str
    manifest_json: str
    plan: LocalPlan
    adapters: tuple[DeliveredAdapter, ...]
    data: str | None
    evaluation_data: str | None
    out: Path | None
    seconds_left: float | None
    device: str
    round_number: int

    def to_line(self) -> str:
        """The job as one line of JSON; `from_document` reads it back."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["plan"] = self.plan.to_json()
        values["adapters"] = [
            {"path": str(item.path), "config_json": item.config_json, "use": item.use, "rank": item.rank}
            for item in self.adapters
        ]
        values["out"] = None if self.out is None else str(self.out)
        return json.dumps({"job": values})

    @classmethod
    def from_document(cls, document: Mapping[str, object]) -> Job:
        """The job that `to_line` wrote."""
        values = dict(document)
        adapters, plan = values["adapters"], values["plan"]
        if not isinstance(adapters, list) or not isinstance(plan, dict):
            raise TypeError("a job has a list of adapters and a plan")
        values["adapters"] = tuple(
            DeliveredAdapter(
                path=Path(item["path"]),
                config_json=item["config_json"],
                use=AdapterUse(item["use"]),
                rank=int(item["rank"]),
            )
            for item in adapters
        )
        values["plan"] = LocalPlan.from_json(plan)
        values["kind"] = JobKind(str(values["kind"]))
        values["out"] = None if values["out"] is None else Path(str(values["out"]))
        return cls(**values)  # type: ignore[arg-type]  # the values were written by to_line


class Phase(StrEnum):
    """What the process is doing."""

    LOADING = "loading"
    EVALUATING = "evaluating"
    TRAINING = "training"


class Measured(StrEnum):
    """Which adapter an evaluation was made with: as received, as trained, or of an EVALUATE job."""

    BEFORE = "before"
    AFTER = "after"
    VERSION = "version"


@dataclass(frozen=True, slots=True, kw_only=True)
class Progressed:
    """How far the work is; `total` 0 where nobody knows."""

    phase: Phase
    done: int = 0
    total: int = 0
    loss: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """An evaluation on the device's held-out rows."""

    measured: Measured
    rank: int
    loss: float
    accuracy: float
    rows: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """The update lies in the job's `out`; an evaluation may follow. `rank` is what it has, 0: what was granted."""

    rows: int
    steps: int
    stopped_early: bool
    loss: float
    seconds: float
    rank: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The job is done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The job ended without a result; `cancelled` when that was asked for."""

    reason: str
    message: str
    cancelled: bool = False

    def as_error(self) -> GloraError:
        """The same as an exception."""
        return GloraError(Reason(self.reason), self.message)


Event = Progressed | Evaluated | Trained | Finished | Failed
_EVENTS: Final[Mapping[str, type[Event]]] = {
    "progressed": Progressed,
    "evaluated": Evaluated,
    "trained": Trained,
    "finished": Finished,
    "failed": Failed,
}
_NAMES: Final = {kind: name for name, kind in _EVENTS.items()}


def event_line(number: int, event: Event) -> str:
    """The event of job `number` as one line of JSON."""
    return json.dumps({"number": number, "event": _NAMES[type(event)]} | dataclasses.asdict(event))


def parse_event(line: str) -> tuple[int, Event]:
    """Job number and event in a line that `event_line` wrote; raises ValueError for anything else."""
    document = json.loads(line)
    try:
        number, kind = int(document.pop("number")), _EVENTS[document.pop("event")]
        if kind is Progressed:
            document["phase"] = Phase(document["phase"])
        if kind is Evaluated:
            document["measured"] = Measured(document["measured"])
        return number, kind(**document)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not an event of the training process: {line[:200]!r}") from error
