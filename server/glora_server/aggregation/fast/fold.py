r"""One round of glora in float32 and less: :math:`S' = U\,(U^\top\Sigma_ip_iX_i)`, U from `span`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from glora_server.aggregation.factors import ClientUpdate, CompactSvd
from glora_server.aggregation.fast.intake import Group, ModuleRound, VoteRule, module_round, read_groups
from glora_server.aggregation.fast.span import leading, pays
from glora_server.aggregation.fast.survey import Survey, fold, images
from glora_server.aggregation.state import LayerState, state_from_svd
from glora_server.aggregation.strategies.base import AggregationResult

_FINEST_RANK_TOL = 1e-6
_ROUNDING = 1e-7


def can_do(rule: VoteRule, updates: Sequence[ClientUpdate]) -> bool:
    """Whether these options and uploads are for `fast_round` at all.

    They are not for float64 uploads, for a rank tolerance below what float64 Gram cores resolve, and for anchors and
    votes by rank.
    """
    plain = not rule.voting.anchor and not rule.voting.rank_normalised
    return plain and updates[0].b.dtype != torch.float64 and rule.rank_tol >= _FINEST_RANK_TOL


def fast_round(
    rule: VoteRule,
    state: LayerState | None,
    updates: Sequence[ClientUpdate],
    weights: Sequence[float],
    *,
    rank: int,
) -> AggregationResult | None:
    """The next state of one module and its diagnostics; None where the exact computation is to be used instead.

    That is where `can_do` says so, for modules so small beside R that the exact computation is no slower, and where
    fewer than R directions are strong enough to be seen: weak ones would never get into a state that has room. Beyond
    the inputs this holds at most 10 MiB of reduced copies, one block of factors side by side (2 MiB, or 128 columns
    where those are more), about (3R + 64)·d numbers, some thirty of r² for each device, and of the iteration (R + 16)·d
    for each step and 5 MiB of coefficients.
    """
    if not can_do(rule, updates):
        return None
    (found,) = _computed(rule, [module_round(rule, state, updates, weights)], rank=rank, stack=False)
    return found


def fast_rounds(rule: VoteRule, modules: Sequence[ModuleRound], *, rank: int) -> list[AggregationResult | None]:
    """The same for many modules, which `can_do`: all those of one layout together, as a GPU wants it.

    Beyond the inputs this takes about three times their size in float32, so the caller bounds how many come at once.
    """
    alike: dict[tuple[object, ...], list[int]] = {}
    for position, module in enumerate(modules):
        alike.setdefault(module.layout(), []).append(position)
    results: list[AggregationResult | None] = [None] * len(modules)
    for positions in alike.values():
        found = _computed(rule, [modules[i] for i in positions], rank=rank, stack=True)
        for position, result in zip(positions, found, strict=True):
            results[position] = result
    return results


def _computed(
    rule: VoteRule, modules: Sequence[ModuleRound], *, rank: int, stack: bool
) -> list[AggregationResult | None]:
    groups = read_groups(rule, modules, stack=stack)
    rank = min(rank, groups[0].devices.shape.d)
    if not pays(groups, rank):
        return [None] * len(modules)
    known = [None if module.held is None else module.held.u for module in modules]
    span = leading(groups, rule.voting.subspace, rank, known=known)
    if not any(span.whole):
        return [None] * len(modules)
    probed = images(groups, rule, span.probed)
    folded = fold(groups, span.basis, probed)
    states = _states(groups, span.basis, folded.inside, rank=rank)
    survey = Survey(groups=groups, spectrum=span.spectrum, basis=span.basis, images=probed, folded=folded)
    told = survey.diagnostics(modules, states, rank=rank)
    return [
        AggregationResult(state=state, diagnostics=diagnostics) if whole else None
        for state, diagnostics, whole in zip(states, told, span.whole, strict=True)
    ]


def _states(groups: Sequence[Group], basis: Tensor, inside: Tensor, *, rank: int) -> list[LayerState]:
    """U·(UᵀM) of each module in its canonical gauge; float32 rounds what float64 has turned."""
    wide = inside.double()
    turn = torch.linalg.eigh(wide @ wide.mT).eigenvectors.flip(2).float()
    turned = turn.mT @ inside
    sigma = turned.double().square().sum(dim=2).sqrt().float()  # float32 may lack the squares
    v = (turned / sigma.clamp(min=torch.finfo(sigma.dtype).tiny)[..., None]).mT
    u = basis @ turn
    floors = sum((_ROUNDING * group.magnitude for group in groups), sigma.new_zeros(sigma.shape[0])).tolist()
    return [
        state_from_svd(
            CompactSvd(u=u[i], sigma=sigma[i], v=v[i]), rank=rank, dtype=torch.float32, strategy="glora", floor=floor
        )
        for i, floor in enumerate(floors)
    ]
