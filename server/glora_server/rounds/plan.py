"""Who takes part in a round and at which rank: deterministic given a seed."""

from __future__ import annotations

import math
import random
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass

from glora_server.rounds.ids import DeviceId
from glora_server.rounds.policy import RoundPolicy, Sampling
from glora_wire.errors import Reason, Refusal


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirements:
    """What a run asks of every device."""

    run_name: str
    fingerprint: str
    task: str
    max_rank: int
    min_rank: int
    tags: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A device that is there, as planning sees it."""

    device_id: DeviceId
    granted_rank: int
    """What the operator allows."""
    declared_rank: int
    """What the device says now; 0 = no opinion."""
    fingerprint: str
    task: str
    run_name: str
    """The one run that the device wants to work for; empty = any."""
    tags: frozenset[str]
    training_rows: int
    evaluation_rows: int
    trains: bool
    evaluates: bool
    declined: Refusal | None = None
    """Set when the device said that it can never work for this run as it is started now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pick:
    """A chosen device and the rank that it gets."""

    device_id: DeviceId
    rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Staffing:
    """The devices of a round; `target` updates close it early (0 = wait for all)."""

    picks: tuple[Pick, ...]
    target: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """Why a round cannot open yet."""

    message: str
    eligible: int


def rank_for(candidate: Candidate, max_rank: int) -> int:
    """The rank that the device gets: the smallest of what the run, the operator and the device allow."""
    ranks = [max_rank, candidate.granted_rank]
    if candidate.declared_rank:
        ranks.append(candidate.declared_rank)
    return min(ranks)


def refusal_for(candidate: Candidate, needs: Requirements) -> Refusal | None:
    """Why the device cannot work for the run at all; None when it can (training or evaluating)."""
    if candidate.declined is not None:
        return candidate.declined
    if not candidate.fingerprint:
        return Refusal(
            reason=Reason.BASE_MODEL_MISSING,
            message=f"Run {needs.run_name} needs a base model; start the device with --model.",
        )
    if candidate.fingerprint != needs.fingerprint:
        return Refusal(
            reason=Reason.BASE_MODEL_MISMATCH,
            message=(
                f"Run {needs.run_name} trains base model {needs.fingerprint[:12]}, but the device has "
                f"{candidate.fingerprint[:12]}; start it with --model pointing at the run's base model."
            ),
        )
    if candidate.task and candidate.task != needs.task:
        return Refusal(
            reason=Reason.TASK_MISMATCH,
            message=f"Run {needs.run_name} is {needs.task}, but the device was started for {candidate.task}.",
        )
    missing = needs.tags - candidate.tags
    if missing:
        return Refusal(
            reason=Reason.TAGS_MISMATCH,
            message=f"Run {needs.run_name} wants devices with the tags {', '.join(sorted(missing))}.",
        )
    return None


def training_refusal(candidate: Candidate, needs: Requirements) -> Refusal | None:
    """Why the device cannot train for the run; None when it can."""
    general = refusal_for(candidate, needs)
    if general is not None:
        return general
    if not candidate.trains:
        return Refusal(reason=Reason.ROLE_MISMATCH, message="The device only evaluates.")
    if candidate.training_rows < 1:
        return Refusal(reason=Reason.NO_TRAINING_DATA, message="The device has no training rows; give it --data.")
    rank = rank_for(candidate, needs.max_rank)
    if rank < needs.min_rank:
        return Refusal(
            reason=Reason.RANK_TOO_SMALL,
            message=f"Run {needs.run_name} needs rank {needs.min_rank} or more; the device may use {rank}.",
        )
    return None


def staff(
    candidates: Iterable[Candidate],
    policy: RoundPolicy,
    *,
    max_rank: int,
    seed: int,
    later: Container[DeviceId] = frozenset(),
) -> Staffing | Waiting:
    """The devices of the next round out of eligible `candidates`, or why it has to wait.

    Those of `later` are there, but still have something to do: they are drawn only where the others are too few.
    """
    pool = sorted(candidates, key=lambda c: c.device_id)
    if len(pool) < policy.quorum:
        return Waiting(
            eligible=len(pool),
            message=f"{len(pool)} of {policy.quorum} needed devices are online and eligible.",
        )
    wanted = policy.target_devices or len(pool)
    # 10 devices and a tenth more are 11, also where the product is 11.000000000000002.
    invited = min(len(pool), math.ceil(wanted * (1.0 + policy.over_selection) - 1e-9 * wanted))
    ready = [candidate for candidate in pool if candidate.device_id not in later]
    rest = [candidate for candidate in pool if candidate.device_id in later]
    rng = random.Random(seed)  # noqa: S311 - sampling, not a secret
    chosen = _draw(ready, invited, policy.sampling, rng)
    chosen += _draw(rest, invited - len(chosen), policy.sampling, rng)
    picks = tuple(Pick(device_id=c.device_id, rank=rank_for(c, max_rank)) for c in chosen)
    return Staffing(picks=picks, target=min(wanted, len(picks)) if policy.target_devices else 0)


def _draw(pool: Sequence[Candidate], count: int, sampling: Sampling, rng: random.Random) -> list[Candidate]:
    if count >= len(pool):
        return list(pool)
    match sampling:
        case Sampling.UNIFORM:
            return rng.sample(list(pool), count)
        case Sampling.WEIGHTED:
            # Efraimidis and Spirakis (2006): the largest u^(1/w) are a weighted sample without replacement.
            return sorted(pool, key=lambda c: -(rng.random() ** (1.0 / max(1, c.training_rows))))[:count]
        case Sampling.RANK:
            return sorted(pool, key=lambda c: (-c.granted_rank, rng.random()))[:count]
