r"""LoRA-FAIR: A is averaged, and the averaged B gets a correction that brings B̄Ā back to the mean of the updates.

.. math::
    \text{closed:}\quad &\Delta B = \arg\min \|M - (\bar B+\Delta B)\bar A\|_F^2 + \lambda\|\Delta B\|_F^2
        = (M-\bar B\bar A)\bar A^\top(\bar A\bar A^\top+\lambda I)^{-1} \\
    \text{sgd:}\quad &\Delta B = \arg\min\; 1-\cos\big(M,\ (\bar B+\Delta B)\bar A\big) + \lambda\|\Delta B\|_F

With :math:`\bar A = P\,\mathrm{diag}(\alpha)\,V^\top` the closed form is
:math:`(MV-\bar BP\,\mathrm{diag}(\alpha))\,\mathrm{diag}(\alpha/(\alpha^2+\lambda))P^\top`, and
:math:`MV = \Sigma p_is_iB_i(A_iV)`: nothing is dense and no condition number is squared. `sgd` is the paper's
objective, descended from ΔB = 0 in exact gradients (the server has no samples to be stochastic about): with
:math:`Y = \bar B+\Delta B,\ G = M\bar A^\top,\ C = \bar A\bar A^\top` it needs :math:`\langle G,Y\rangle` and
:math:`\langle YC,Y\rangle` only. Where B̄Ā = 0, which has no cosine, it starts from the closed form. It answers with the
best ΔB that it has met.

λ of the closed form is in units of ĀĀᵀ, √s folded in: with tiny A it holds B back more.

O((d + n)(Σr)r), sgd + (d + n)(Σr)² for ‖M‖ + T·dr². Depends on the gauge through Ā. Source: arXiv 2411.14961; the
closed form is ours.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from glora_server.aggregation.factors import COMPUTE_DTYPE, ClientUpdate, normalised_weights, svd
from glora_server.aggregation.state import LayerState, ReadoutStyle, RefillKey
from glora_server.aggregation.strategies.averages import (
    SPLIT,
    averaged_a,
    averaged_b,
    equal_rank,
    factor_readout,
    factor_result,
)
from glora_server.aggregation.strategies.base import AggregationResult, ClientContract, Properties, Strategy
from glora_server.aggregation.strategies.options import ChoiceOption, NumberOption, Option, OptionValue, number


class LoraFair(Strategy):
    """The strategy `lora_fair`; `extra` holds b = B̄ + ΔB (d×r) and a = Ā (r×n), √s on both."""

    name = "lora_fair"
    summary = "factors averaged, then B corrected towards the mean of the true updates; one rank for all"
    properties = Properties(
        gauge_invariant=False,
        exact=False,
        mixed_ranks=False,
        cost="O((d+n)(Σr)r), sgd + O((d+n)(Σr)² + T·dr²)",
        source="LoRA-FAIR (arXiv 2411.14961)",
        note="the best B for the averaged A, which is what depends on the gauge",
    )
    options: tuple[Option, ...] = (
        ChoiceOption(
            name="solver",
            summary="closed: squared error, exact; sgd: the paper's cosine objective",
            default="closed",
            choices=("closed", "sgd"),
        ),
        NumberOption(name="fair_lambda", summary="λ, the weight of staying near B̄", default=0.01),
        NumberOption(name="steps", summary="steps of sgd", default=200.0, at_most=100_000.0, whole=True),
        NumberOption(
            name="step_size",
            summary="first step of sgd relative to ‖B̄‖, or to the closed ΔB where that is larger",
            default=0.1,
            at_most=10.0,
        ),
    )

    @override
    def contract(self, options: Mapping[str, OptionValue], *, round_index: int = 0) -> ClientContract:
        """Readouts are trained and come back whole."""
        return ClientContract()

    @override
    def aggregate(
        self,
        state: LayerState | None,
        updates: Sequence[ClientUpdate],
        *,
        rank: int,
        round_index: int,
        options: Mapping[str, OptionValue],
    ) -> AggregationResult:
        """B̄ + ΔB and Ā."""
        r = equal_rank(updates, rank=rank, name=self.name)
        weights = normalised_weights([update.weight for update in updates])
        b, a = averaged_b(updates, weights, r, power=SPLIT), averaged_a(updates, weights, r, power=SPLIT)
        strength = number(options, "fair_lambda")
        if options["solver"] == "closed":
            correction = closed_correction(updates, weights, b, a, strength=strength)
        else:
            steps, size = int(number(options, "steps")), number(options, "step_size")
            correction = descended_correction(updates, weights, b, a, strength=strength, steps=steps, step_size=size)
        return factor_result(self.name, b + correction, a, updates, weights, previous=state, rank=rank)

    @override
    def readout(
        self, state: LayerState, rank: int, scale: float, *, key: RefillKey, style: ReadoutStyle
    ) -> tuple[Tensor, Tensor]:
        """The corrected factors, each divided by √scale; `style` has no meaning here."""
        return factor_readout(state, rank, scale, key=key, power=SPLIT)


def closed_correction(
    updates: Sequence[ClientUpdate], weights: Sequence[float], b: Tensor, a: Tensor, *, strength: float
) -> Tensor:
    """ΔB (d×r, float64) of the squared objective; λ = `strength` > 0."""
    found = svd(a)  # P, α, V
    missing = _mean_times(updates, weights, found.v) - (b @ found.u) * found.sigma
    correction: Tensor = (missing * (found.sigma / (found.sigma.square() + strength))) @ found.u.mT
    return correction


def descended_correction(
    updates: Sequence[ClientUpdate],
    weights: Sequence[float],
    b: Tensor,
    a: Tensor,
    *,
    strength: float,
    steps: int,
    step_size: float,
) -> Tensor:
    """ΔB (d×r, float64) of the cosine objective, the best of `steps` normalised steps that shrink as 1/√t.

    Their length follows the closed form's where B̄ nearly cancels: relative to B̄ alone they would lead nowhere.
    """
    objective = _CosineObjective(
        b=b,
        g=_mean_times(updates, weights, a.mT),
        c=a @ a.mT,
        norm_m=_mean_norm(updates, weights),
        strength=strength,
    )
    closed = closed_correction(updates, weights, b, a, strength=strength)
    size = step_size * max(float(torch.linalg.matrix_norm(part)) for part in (b, closed))
    best = torch.zeros_like(b)
    least, slope = objective.at(best)
    here = best if bool(slope.any()) else closed
    value, slope = objective.at(here)
    if value < least:
        least, best = value, here
    for t in range(steps):
        length = float(torch.linalg.matrix_norm(slope))
        if not length > 0:
            break
        here = here - slope * (size / length / (t + 1) ** 0.5)
        value, slope = objective.at(here)
        if value < least:
            least, best = value, here
    return best


@dataclass(frozen=True, slots=True, kw_only=True)
class _CosineObjective:
    """1 − cos(M, YĀ) + λ‖ΔB‖ with Y = B̄ + ΔB, from G = MĀᵀ (d×r), C = ĀĀᵀ and ‖M‖."""

    b: Tensor
    g: Tensor
    c: Tensor
    norm_m: float
    strength: float

    def at(self, correction: Tensor) -> tuple[float, Tensor]:
        """Value and gradient (d×r) at ΔB; 1 + λ‖ΔB‖ and zero where the cosine is not defined."""
        y = self.b + correction
        yc = y @ self.c
        norm_y = float((yc * y).sum().clamp(min=0).sqrt())
        distance = float(torch.linalg.matrix_norm(correction))
        if not self.norm_m * norm_y > 0:
            return 1.0 + self.strength * distance, torch.zeros_like(y)
        cosine = float((self.g * y).sum()) / (self.norm_m * norm_y)
        slope = yc * (cosine / norm_y**2) - self.g / (self.norm_m * norm_y)
        if distance > 0:
            slope = slope + correction * (self.strength / distance)
        return 1.0 - cosine + self.strength * distance, slope


def _mean_times(updates: Sequence[ClientUpdate], weights: Sequence[float], right: Tensor) -> Tensor:
    """M·right = Σ p_is_iB_i(A_i·right) for right (n×k)."""
    total = right.new_zeros((updates[0].b.shape[0], right.shape[1]))
    for update, weight in zip(updates, weights, strict=True):
        inner = update.a.to(COMPUTE_DTYPE) @ right
        total.add_(update.b.to(COMPUTE_DTYPE) @ inner, alpha=weight * update.scale)
    return total


def _mean_norm(updates: Sequence[ClientUpdate], weights: Sequence[float]) -> float:
    left = torch.cat([u.b.to(COMPUTE_DTYPE) * (p * u.scale) for u, p in zip(updates, weights, strict=True)], dim=1)
    right = torch.cat([update.a.to(COMPUTE_DTYPE) for update in updates])
    t_left, t_right = (torch.linalg.qr(part, mode="r").R for part in (left, right.mT))
    return float(torch.linalg.matrix_norm(t_left @ t_right.mT))
