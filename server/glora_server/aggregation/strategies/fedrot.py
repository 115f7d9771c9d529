r"""FedRot-LoRA: each device's factors are rotated towards the ones that were broadcast, then averaged.

.. math::
    \text{align A:}\quad A_iA_{ref}^\top = USV^\top,\qquad \text{align B:}\quad B_i^\top B_{ref} = USV^\top,\qquad
    R_i = UV^\top

    \bar B = \Sigma p_iB_iR_i,\qquad \bar A = \Sigma p_iR_i^\top A_i

R_i minimises ‖RᵀA_i − A_ref‖ or ‖B_iR − B_ref‖ (orthogonal Procrustes); each device's product B_iA_i is untouched, the
mean is still B̄Ā. The reference is the state's own pair of factors, so the server rotates and devices do nothing. The
first round (t = 0) is not rotated; then one factor is aligned in odd rounds and the other in even ones.

`orthogonal`: R ∈ O(r), invariant to Q_i ∈ O(r) (while the overlap has full rank). `special`: R ∈ SO(r), the row of Vᵀ
of the smallest singular value flipped where det = −1. `soft`: R ← polar((1 − λ)I + λR) of that; λ → 0 is FedIT.
No variant is invariant to scaling or shear.

O(N((d + n)r² + r³)). Source: arXiv 2602.23638; its released code defaults to λ = 1.5, which silently means O(r).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import StrEnum

import torch
from torch import Tensor
from typing_extensions import override

from glora_server.aggregation.factors import COMPUTE_DTYPE, ClientUpdate, normalised_weights, state_dtype, svd
from glora_server.aggregation.state import LayerState, ReadoutStyle, RefillKey
from glora_server.aggregation.strategies.averages import (
    SPLIT,
    Factors,
    averaged_a,
    averaged_b,
    equal_rank,
    factor_readout,
    factor_result,
    kept_factors,
    started,
)
from glora_server.aggregation.strategies.base import AggregationResult, ClientContract, Properties, Strategy
from glora_server.aggregation.strategies.options import ChoiceOption, NumberOption, Option, OptionValue, number

_SINGULAR = 1e-8
_STEP_ASIDE = 1e-3


class Rotation(StrEnum):
    """The group that rotations are taken from."""

    ORTHOGONAL = "orthogonal"
    SPECIAL = "special"
    SOFT = "soft"


class Fedrot(Strategy):
    """The strategy `fedrot`; `extra` holds b (d×r) and a (r×n), √s on both."""

    name = "fedrot"
    summary = "factors rotated towards the broadcast ones before they are averaged; one rank for all"
    properties = Properties(
        gauge_invariant=False,
        exact=False,
        mixed_ranks=False,
        cost="O(N(d+n)r² + Nr³)",
        source="FedRot-LoRA (arXiv 2602.23638)",
        note="rotation = orthogonal is invariant to orthogonal gauges",
    )
    options: tuple[Option, ...] = (
        ChoiceOption(
            name="rotation",
            summary="soft: part of the way; special: rotations; orthogonal: also reflections",
            default=Rotation.SOFT.value,
            choices=tuple(Rotation),
        ),
        NumberOption(name="rotate_lambda", summary="how far rotation soft goes", default=0.5, at_most=1.0),
        ChoiceOption(name="initial_share", summary="the factor aligned in odd rounds", default="a", choices=("a", "b")),
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
        """The averaged rotated factors."""
        r = equal_rank(updates, rank=rank, name=self.name)
        weights = normalised_weights([update.weight for update in updates])
        dtype = state_dtype(updates[0].b.dtype)
        turned = [replace(update, b=update.b.to(dtype), a=update.a.to(dtype)) for update in updates]
        if state is not None and started(state) and round_index > 0:
            reference = _columns(kept_factors(state), r)
            on_a = (round_index % 2 == 1) == (options["initial_share"] == "a")
            turned = [_turned(update, reference, on_a=on_a, options=options) for update in turned]
        b = averaged_b(turned, weights, r, power=SPLIT)
        a = averaged_a(turned, weights, r, power=SPLIT)
        return factor_result(self.name, b, a, updates, weights, previous=state, rank=rank)

    @override
    def readout(
        self, state: LayerState, rank: int, scale: float, *, key: RefillKey, style: ReadoutStyle
    ) -> tuple[Tensor, Tensor]:
        """The averaged factors, each divided by √scale; `style` has no meaning here."""
        return factor_readout(state, rank, scale, key=key, power=SPLIT)


def rotation(overlap: Tensor, kind: Rotation, strength: float) -> Tensor:
    """R (r×r, orthogonal) for the overlap M = A_iA_refᵀ or B_iᵀB_ref; the identity for M = 0."""
    found = svd(overlap)
    right = found.v.mT
    if kind is Rotation.ORTHOGONAL:
        return found.u @ right
    if float(torch.linalg.det(found.u @ right)) < 0:
        right = torch.cat([right[:-1], -right[-1:]])
    turn: Tensor = found.u @ right
    return turn if kind is Rotation.SPECIAL else _part_of_the_way(turn, strength)


def _part_of_the_way(turn: Tensor, strength: float) -> Tensor:
    """polar((1 − λ)I + λR). A half turn at λ = ½ has no polar factor; the limit from below is taken, nearest to I."""
    eye = torch.eye(turn.shape[0], dtype=turn.dtype, device=turn.device)
    found = svd((1 - strength) * eye + strength * turn)
    if float(found.sigma[-1]) < _SINGULAR:
        strength -= _STEP_ASIDE
        found = svd((1 - strength) * eye + strength * turn)
    return found.u @ found.v.mT


def _turned(
    update: ClientUpdate, reference: Factors, *, on_a: bool, options: Mapping[str, OptionValue]
) -> ClientUpdate:
    left, right = (update.a, reference[1].mT) if on_a else (update.b.mT, reference[0])
    left = left.to(COMPUTE_DTYPE)
    overlap = left @ right
    size = torch.linalg.matrix_norm(left) * torch.linalg.matrix_norm(right)
    if not float(torch.linalg.matrix_norm(overlap)) > 32 * torch.finfo(overlap.dtype).eps * float(size):
        return update
    turn = rotation(overlap, Rotation(str(options["rotation"])), number(options, "rotate_lambda"))
    turn = turn.to(update.b.dtype)
    return replace(update, b=update.b @ turn, a=turn.mT @ update.a)


def _columns(reference: Factors, r: int) -> Factors:
    """The reference with r columns, float64: cut, or filled with zeros, which pull nowhere."""
    b, a = (part.to(COMPUTE_DTYPE) for part in reference)
    wide = max(0, r - b.shape[1])
    b = torch.nn.functional.pad(b[:, :r], (0, wide))
    a = torch.nn.functional.pad(a[:r], (0, 0, 0, wide))
    return b, a
