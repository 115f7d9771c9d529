"""The [policy] section of a run: how a RoundPolicy is read from what people write."""

from __future__ import annotations

import json
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, PlainValidator, ValidationError

from glora_server.rounds.policy import RoundPolicy, Sampling, TooFew, policy_problems
from glora_server.validation_text import problems_of, raise_complete, raise_problems

MAX_ROUNDS: Final = 100_000
MAX_DEVICES: Final = 1_000_000


class PolicyTable(BaseModel):
    """Staffing and timing of the rounds; every key may be edited while the run is going on."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    rounds: int = Field(default=10, ge=1, le=MAX_ROUNDS, description="Rounds until the run is complete.")
    target_devices: int = Field(
        default=0, ge=0, le=MAX_DEVICES, description="Updates a round wants; 0 = every eligible device that is there."
    )
    quorum: int = Field(
        default=1, ge=1, le=MAX_DEVICES, description="Fewest accepted updates a round is aggregated from."
    )
    over_selection: float = Field(
        default=0.0, ge=0, le=10, description="Share of extra devices to invite (0.2 = a fifth)."
    )
    deadline_seconds: float = Field(
        default=3600.0, ge=1, le=30 * 86400, description="Seconds from the opening of a round to its deadline."
    )
    grace_seconds: float = Field(
        default=300.0, ge=0, le=30 * 86400, description="Seconds of one extension when the quorum is missing; 0 = none."
    )
    max_round_seconds: float = Field(
        default=0.0,
        ge=0,
        le=90 * 86400,
        description="Seconds until which a device whose transfer is moving may go on; 0 = three deadlines.",
    )
    gather_seconds: float = Field(
        default=2.0, ge=0, le=86400, description="Seconds that a round which could open waits for more devices."
    )
    too_few: TooFew = Field(
        default=TooFew.FAIL, description='When the quorum was missed after the grace: "wait" or "fail".'
    )
    max_attempts: int = Field(default=3, ge=1, le=1000, description="Attempts of one round before the run fails.")
    retry_seconds: float = Field(
        default=10.0, ge=0, le=86400, description="Seconds before a failed round is tried again; doubles each time."
    )
    sampling: Sampling = Field(
        default=Sampling.UNIFORM,
        description='How devices are drawn: "uniform", "weighted" (by rows), "rank" (largest first).',
    )
    tags: tuple[Annotated[str, Field(min_length=1, max_length=64)], ...] = Field(
        default=(), max_length=64, description="Only devices that carry all of these tags."
    )
    min_rank: int = Field(default=1, ge=1, le=4096, description="Only devices that were granted at least this rank.")


POLICY_KEYS: Final = tuple(PolicyTable.model_fields)
"""What may be edited while a run is going on."""


def _policy_from(value: object) -> RoundPolicy:
    """The policy of a table (or of a policy); raises ValidationError with a place for every problem."""
    policy = value if isinstance(value, RoundPolicy) else _policy_from_table(value)
    raise_problems(
        "policy", (((field,), sentence, getattr(policy, field)) for field, sentence in policy_problems(policy))
    )
    return policy


def _policy_from_table(value: object) -> RoundPolicy:
    try:
        table = PolicyTable.model_validate_json(json.dumps(value))
    except ValidationError as error:
        raise_complete("policy", problems_of(error, PolicyTable))
    return RoundPolicy(**{name: getattr(table, name) for name in POLICY_KEYS})


def _table_of(policy: RoundPolicy) -> PolicyTable:
    return PolicyTable(**{name: getattr(policy, name) for name in POLICY_KEYS})


PolicySection = Annotated[
    RoundPolicy,
    PlainValidator(_policy_from, json_schema_input_type=PolicyTable),
    PlainSerializer(_table_of, return_type=PolicyTable),
]
"""A RoundPolicy as a field of a pydantic model."""
