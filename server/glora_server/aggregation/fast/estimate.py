r"""Diagnostics of strategies that average factors, for rounds whose joint frame would cost far more than the strategy.

The averaged model :math:`T = U\Sigma V^\top` has as many directions as the server keeps, so all that a device or the
mean M = Σp_iΔW_i has inside span(U) is computed, in float32, and norms of devices come from Gram cores. What lies
outside, and the cosines to M, are estimated with the probes of `survey`:
:math:`\|M - T\|^2 = \|U^\top M - \Sigma V^\top\|^2 + \|(I - P)M\|^2`, the last term estimated.

Cost O(Σr·(d + n)·(R + 16 + r)), linear in the number of devices; a joint frame costs O((d + n)·(Σr)²).
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from glora_server.aggregation.diagnostics import Diagnostics, coverage, principal_angles
from glora_server.aggregation.factors import ClientUpdate, CompactSvd
from glora_server.aggregation.fast.intake import VoteRule, module_round, read_groups
from glora_server.aggregation.fast.operator import probed_sum
from glora_server.aggregation.fast.survey import ROUNDING, Survey, fold, images
from glora_server.aggregation.rules import Rule
from glora_server.aggregation.state import LayerState
from glora_server.aggregation.subspace import Subspace, Voting

_AS_UPLOADED = VoteRule(rule=Rule.REPLACE, eta=1.0, rank_tol=1e-5, voting=Voting(subspace=Subspace.PROJECTOR))


def estimated_diagnostics(
    updates: Sequence[ClientUpdate],
    weights: Sequence[float],
    model: CompactSvd,
    *,
    previous: LayerState | None,
    new: LayerState,
    rank: int,
) -> Diagnostics:
    """The record of a round whose new model is `model`, all of which `new` keeps; nobody votes."""
    survey = _survey(updates, weights, model.u[:, : new.rank].float())
    target = model.sigma[: new.rank, None] * model.v[:, : new.rank].mT
    inside = survey.folded.inside[0].to(target.dtype)
    norm = math.hypot(_norm(inside), survey.lost[0])
    error = math.hypot(_norm(inside - target), survey.lost[0])
    error = error / norm if error > ROUNDING * norm else 0.0
    return Diagnostics(
        eigenvalues=(),
        eigengap=None,
        sigma=tuple(new.sigma.tolist()),
        mean_norm=norm,
        captured_energy=(_norm(target) / norm) ** 2 if norm else 1.0,
        truncation_error=error,
        aggregation_bias=error,
        coverage=coverage(updates, weights, rank),
        clients=tuple(replace(client, votes=None) for client in survey.clients[0]),
        angles=principal_angles(previous, new),
    )


def _survey(updates: Sequence[ClientUpdate], weights: Sequence[float], basis: Tensor) -> Survey:
    module = module_round(_AS_UPLOADED, None, updates, weights)
    groups = read_groups(_AS_UPLOADED, [module], stack=basis.is_cuda)
    probed = images(groups, _AS_UPLOADED, probed_sum(groups))
    return Survey(
        groups=groups,
        spectrum=basis.new_zeros((1, 0)),
        basis=basis[None],
        images=probed,
        folded=fold(groups, basis[None], probed),
    )


def _norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix))
