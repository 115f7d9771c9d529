"""HetLoRA's self-pruning: a device gives up the last directions of its adapter when it does not need them.

The loss gets λ·Σ‖B[:, k:]‖_F·‖A[k:, :]‖_F over the modules, with k = ⌊γr⌋; when that sum is smaller after training
than before, the device sends k directions only, and has that rank from then on. A run asks for it with
`hetlora_gamma` (between 0 and 1) and `hetlora_lambda` in training.extra. Source: arXiv 2401.06432.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from glora_wire.errors import GloraError, Reason

GAMMA: Final = "hetlora_gamma"
LAMBDA: Final = "hetlora_lambda"

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPruning:
    """The tails of the trained factors (B d×r, A r×n of each module), from direction `kept` on."""

    pairs: tuple[Pair, ...]
    kept: int
    strength: float
    before: float

    def penalty(self) -> Tensor:
        """What the loss gets, with a gradient."""
        return self.strength * _tail(self.pairs, self.kept)

    def rank(self) -> int | None:
        """The rank to send now that training is over; None: all that was granted."""
        with torch.no_grad():
            return self.kept if float(_tail(self.pairs, self.kept)) < self.before else None


def pruning(model: nn.Module, rank: int, extra: Mapping[str, str]) -> RankPruning | None:
    """The pruning that the plan's `extra` asks for; None when it asks for none or there is no direction to spare.

    Raises GloraError CONFIG_INVALID for numbers that cannot be used.
    """
    if GAMMA not in extra and LAMBDA not in extra:
        return None
    gamma, strength = _number(extra, GAMMA, 0.99), _number(extra, LAMBDA, 0.0)
    if not 0.0 < gamma < 1.0 or strength < 0.0:
        raise _unusable(f"{GAMMA} = {gamma:g} and {LAMBDA} = {strength:g}")
    kept = max(1, math.floor(gamma * rank))
    pairs = _pairs(model)
    if kept >= rank or not pairs:
        return None
    with torch.no_grad():
        before = float(_tail(pairs, kept))
    return RankPruning(pairs=pairs, kept=kept, strength=strength, before=before)


def _pairs(model: nn.Module) -> tuple[Pair, ...]:
    """(B, A) of every module whose factors are both trained."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    pairs = (
        (parameter, trained.get(name.replace(".lora_B.", ".lora_A.")))
        for name, parameter in trained.items()
        if ".lora_B." in name
    )
    return tuple((b, a) for b, a in pairs if a is not None)


def _tail(pairs: tuple[Pair, ...], kept: int) -> Tensor:
    products = [torch.linalg.vector_norm(b[:, kept:]) * torch.linalg.vector_norm(a[kept:]) for b, a in pairs]
    return torch.stack(products).sum()


def _number(extra: Mapping[str, str], name: str, default: float) -> float:
    try:
        value = float(extra.get(name, default))
    except ValueError as error:
        raise _unusable(f"{name} = {extra[name]!r}") from error
    if not math.isfinite(value):
        raise _unusable(f"{name} = {value}")
    return value


def _unusable(what: str) -> GloraError:
    return GloraError(
        Reason.CONFIG_INVALID,
        f"The run asks for pruning with {what}; {GAMMA} must be between 0 and 1, such as 0.99, and {LAMBDA} 0 or more.",
    )
