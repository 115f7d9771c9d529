r"""One round of glora in float32 and less: :math:`S' = U\,(U^\top\Sigma_ip_iX_i)`, U from `span`."""

import math
from collections.abc import Sequence

import torch

from glora_server.aggregation.factors import ClientUpdate, CompactSvd
from glora_server.aggregation.fast.intake import Group, VoteRule, read_groups
from glora_server.aggregation.fast.span import leading, pays
from glora_server.aggregation.fast.survey import diagnostics, fold, probe
from glora_server.aggregation.state import LayerState, state_from_svd
from glora_server.aggregation.strategies.base import AggregationResult

_FINEST_RANK_TOL = 1e-6
_ROUNDING = 1e-7


def fast_round(
    rule: VoteRule,
    state: LayerState | None,
    updates: Sequence[ClientUpdate],
    weights: Sequence[float],
    *,
    rank: int,
) -> AggregationResult | None:
    """The next state and its diagnostics; None where the exact computation is to be used instead.

    That is for float64 uploads, for a rank tolerance below what float64 Gram cores resolve, and for modules so small
    beside R that the exact computation is no slower. Beyond the inputs about (3R + 64)·d numbers, a few MB of a chunk
    and at most 12 MB of a reduced copy are held.
    """
    voting = rule.voting
    if updates[0].b.dtype == torch.float64 or rule.rank_tol < _FINEST_RANK_TOL:
        return None
    if voting.anchor or voting.rank_normalised:
        return None
    groups = read_groups(rule, state, updates, weights)
    if not pays(groups, rank):
        return None
    known = state.u if state is not None and state.rank else None
    span = leading(groups, voting.subspace, rank, start=known)
    probes = probe(groups, rule)
    folded = fold(groups, span.basis, probes)
    inside = folded.inside.double()
    _, turn = torch.linalg.eigh(inside @ inside.mT)
    turned = turn.flip(1).mT @ inside
    sigma = torch.linalg.vector_norm(turned, dim=1)
    magnitude = math.fsum(float((group.batch.share * group.batch.gain * _magnitudes(group)).sum()) for group in groups)
    new = state_from_svd(
        CompactSvd(
            u=span.basis @ turn.flip(1),
            sigma=sigma,
            v=(turned / sigma.clamp(min=torch.finfo(sigma.dtype).tiny)[:, None]).mT,
        ),
        rank=rank,
        dtype=torch.float32,
        strategy="glora",
        floor=_ROUNDING * magnitude,
    )
    return AggregationResult(
        state=new,
        diagnostics=diagnostics(
            groups, updates, weights, span=span, probes=probes, folded=folded, previous=state, new=new, rank=rank
        ),
    )  # fmt: skip


def _magnitudes(group: Group) -> torch.Tensor:
    """Σ_j‖b_j‖‖a_j‖ of each device: what float32 rounding of its product is relative to."""
    products = group.gram_b.diagonal(dim1=1, dim2=2) * group.gram_a.diagonal(dim1=1, dim2=2)
    return products.clamp(min=0).sqrt().sum(dim=1)
