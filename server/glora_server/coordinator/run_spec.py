"""A run as its owner describes it: read from run.toml, stored as JSON, edited only where that is harmless."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from functools import lru_cache
from typing import Final, Self, TypeVar, cast

from pydantic import Field, ValidationError

from glora_server.coordinator.policy_table import POLICY_KEYS, PolicySection
from glora_server.coordinator.run_sections import (
    EvaluationSpec,
    LimitsSpec,
    LoraSpec,
    ModelSpec,
    RetentionSpec,
    Section,
    StrategySpec,
    TrainingSpec,
    WireSpec,
)
from glora_server.coordinator.toml_lines import key_lines, line_of
from glora_server.rounds.policy import RoundPolicy
from glora_server.validation_text import nearest, problems_of, raise_problems
from glora_wire.errors import GloraError, Reason

__all__ = [
    "EvaluationSpec",
    "LimitsSpec",
    "LoraSpec",
    "ModelSpec",
    "RetentionSpec",
    "RunSpec",
    "StrategySpec",
    "TrainingSpec",
    "WireSpec",
    "parse_run_toml",
    "parse_toml",
]

Described = TypeVar("Described", bound=Section)
MAX_SPEC_CHARACTERS: Final = 1_000_000
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_TOML_PLACE: Final = re.compile(r"^(?P<what>.*) \(at (?:line (?P<line>\d+), column (?P<column>\d+)|end of document)\)$")


class RunSpec(Section):
    """Everything that a run needs besides its manifest; equal descriptions are equal objects."""

    name: str = Field(min_length=1, max_length=64, description="Name of the run, unique on the server.")
    seed: int = Field(default=0, ge=0, lt=2**63, description="Seed of everything that is drawn for the run.")
    model: ModelSpec
    lora: LoraSpec = Field(default_factory=LoraSpec)
    strategy: StrategySpec = Field(default_factory=StrategySpec)
    training: TrainingSpec = Field(default_factory=TrainingSpec)
    policy: PolicySection = Field(default_factory=RoundPolicy)
    wire: WireSpec = Field(default_factory=WireSpec)
    limits: LimitsSpec = Field(default_factory=LimitsSpec)
    evaluation: EvaluationSpec = Field(default_factory=EvaluationSpec)
    retention: RetentionSpec = Field(default_factory=RetentionSpec)

    def model_post_init(self, _context: object, /) -> None:
        """Check what no single section shows."""
        found: list[tuple[tuple[str | int, ...], str, object]] = []
        if _NAME.fullmatch(self.name) is None:
            found.append((("name",), "must be letters, digits, '.', '_' and '-', not starting with a sign", self.name))
        if self.policy.min_rank > self.lora.max_rank:
            sentence = f"must not be above lora.max_rank ({self.lora.max_rank})"
            found.append((("policy", "min_rank"), sentence, self.policy.min_rank))
        for index, rank in enumerate(self.evaluation.ranks):
            if rank > self.lora.max_rank:
                sentence = f"must not be above lora.max_rank ({self.lora.max_rank})"
                found.append((("evaluation", "ranks", index), sentence, rank))
        raise_problems("run", found)

    @property
    def evaluation_ranks(self) -> tuple[int, ...]:
        """Ranks at which every version is measured, rising; the server's own rank is always among the default ones."""
        if self.evaluation.ranks:
            return tuple(sorted(set(self.evaluation.ranks)))
        largest = self.lora.max_rank
        return tuple(sorted({largest} | {2**power for power in range(largest.bit_length())}))

    def to_json(self) -> str:
        """The description as one line of JSON, the same for equal descriptions."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str, source: str = "run description") -> Self:
        """The description that `text` holds; raises SPEC_INVALID naming every key that is wrong."""
        if len(text) > MAX_SPEC_CHARACTERS:
            raise _invalid([f"{source}: must not be longer than {MAX_SPEC_CHARACTERS} characters."])
        try:
            return cast("Self", _validated(cls, text))
        except ValidationError as error:
            problems = problems_of(error, cls)
        raise _invalid([problem.sentence(source) for problem in problems])

    def with_policy(self, changes: Mapping[str, object]) -> Self:
        """The description with some keys of its policy changed; raises SPEC_INVALID for every other key."""
        unknown = [key for key in changes if key.removeprefix("policy.") not in POLICY_KEYS]
        if unknown:
            editable = ", ".join(POLICY_KEYS)
            raise _invalid(
                [f"{key} cannot be changed ({nearest(key, POLICY_KEYS)})" for key in unknown[:10]]
                + [f"While a run is going on these keys of its policy can be changed: {editable}."]
            )
        document = self.model_dump(mode="json")
        document["policy"] |= {key.removeprefix("policy."): value for key, value in changes.items()}
        return self.from_json(_json(document), source="edit")


@lru_cache(maxsize=64)
def _validated(kind: type[Described], text: str) -> Described:
    """What the text describes; remembered, because every call of a device reads the same few descriptions."""
    return kind.model_validate_json(text)


def parse_run_toml(text: str, source: str = "run.toml") -> RunSpec:
    """The run that a TOML document describes; raises SPEC_INVALID with a line for every problem."""
    return parse_toml(text, RunSpec, source)


def parse_toml(text: str, kind: type[Described], source: str) -> Described:
    """What a TOML document describes, as a `kind`; raises SPEC_INVALID with a line for every problem."""
    if len(text) > MAX_SPEC_CHARACTERS:
        raise _invalid([f"{source}: must not be longer than {MAX_SPEC_CHARACTERS} characters."])
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _invalid([_syntax_sentence(str(error), source)]) from None
    except RecursionError:
        raise _invalid([f"{source}: is nested too deeply."]) from None
    try:
        return kind.model_validate_json(_json(document))
    except ValidationError as error:
        problems = problems_of(error, kind)
    lines = key_lines(text)
    placed = [(line_of(lines, problem.location), problem) for problem in problems]
    placed.sort(key=lambda pair: pair[0] or 0)
    raise _invalid([problem.sentence(source if line is None else f"{source} line {line}") for line, problem in placed])


def _json(document: object) -> str:
    """The document as JSON for strict validation; what JSON does not have becomes something that no key accepts."""
    return json.dumps(document, default=lambda value: {"a date or time": str(value)})


def _syntax_sentence(message: str, source: str) -> str:
    found = _TOML_PLACE.match(message)
    if found is None:
        return f"{source}: is not TOML: {message}."
    place = f" line {found['line']}, column {found['column']}" if found["line"] else ", at its end"
    return f"{source}{place}: is not TOML: {found['what']}."


def _invalid(sentences: list[str]) -> GloraError:
    return GloraError(Reason.SPEC_INVALID, "\n".join(sentences), problems=len(sentences))
