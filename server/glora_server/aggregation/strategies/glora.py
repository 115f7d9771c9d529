r"""GLoRA: average the true updates, project on the column space that the clients agree on.

:math:`S' = P\,\Sigma_i p_iX_i,\ P = U_{ref}U_{ref}^\top`. The *rule* says what X_i is (`rules`), the *subspace*
what U_ref is (`subspace`); neither sees factors, only products, so the result cannot depend on a device's gauge.
Exact when R spans the union of the column spaces of the X_i.

O((d + n)qΣr + q³) with q = min(Σr, max(d, n)), where Σr counts the columns of the uploads, of the state and of the
adapters that were sent, once each; no matrix is larger than the uploads. Source: arXiv 2605.06733; rules
other than replace, subspaces other than projector, votes by rank and the anchor are ours.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from glora_server.aggregation.diagnostics import (
    Diagnostics,
    client_diagnostics,
    coverage,
    mean_products,
    norm_outside,
    principal_angles,
)
from glora_server.aggregation.errors import OptionError
from glora_server.aggregation.factors import (
    ClientUpdate,
    CompactSvd,
    default_rank_tol,
    normalised_weights,
    state_dtype,
)
from glora_server.aggregation.fast.fold import can_do, fast_round, fast_rounds
from glora_server.aggregation.fast.intake import VoteRule, module_round
from glora_server.aggregation.frame import Coordinates, rounding_floor
from glora_server.aggregation.rules import RoundTerms, Rule, round_terms
from glora_server.aggregation.state import LayerState, ReadoutStyle, RefillKey, slice_readout, state_from_svd
from glora_server.aggregation.strategies.base import (
    AggregationResult,
    ClientContract,
    InitSource,
    Properties,
    Strategy,
)
from glora_server.aggregation.strategies.options import (
    ChoiceOption,
    NumberOption,
    Option,
    OptionValue,
    number,
    optional_number,
)
from glora_server.aggregation.subspace import Consensus, Subspace, Voting, consensus, energy_rank


@dataclass(frozen=True, slots=True, kw_only=True)
class GloraOptions:
    """The resolved options; see `Glora.options` for what they mean."""

    voting: Voting
    rule: Rule
    eta: float
    rank_tol: float | None
    energy: float | None
    fast: bool


class Glora(Strategy):
    """The strategy `glora`."""

    name = "glora"
    summary = "gauge-invariant: the mean of the true updates, projected on their common column space"
    properties = Properties(
        gauge_invariant=True,
        exact=True,
        mixed_ranks=True,
        cost="O((d+n)qΣr + q³), q = min(Σr, max(d,n))",
        source="GLoRA (arXiv 2605.06733)",
        note="wholly exact where R spans all updates, of ΔW under replace; the other rules keep more than ΔW says, "
        "see below; frozen_tail and accumulate send (d+n)·R more",
    )
    options: tuple[Option, ...] = (
        ChoiceOption(
            name="subspace",
            summary="how the common column space is chosen",
            default=Subspace.PROJECTOR.value,
            choices=tuple(Subspace),
        ),
        ChoiceOption(
            name="rule",
            summary="how an upload is read; accumulate wants subspace mean or an energy one: under projector and ridge "
            "all devices vote for the state, and once it has rank R nothing new gets in",
            default=Rule.DELTA.value,
            choices=tuple(Rule),
        ),
        NumberOption(
            name="eta", summary="server step on the change, for all rules but replace, which has none", default=1.0
        ),
        ChoiceOption(
            name="accuracy",
            summary="exact: 1e-5 of a float64 reference; fast: objective within 1 % (large modules with float32 or "
            "shorter uploads, at least R clear directions, and neither anchor, votes=by_rank nor energy; all others "
            "are computed exactly)",
            default="exact",
            choices=("exact", "fast"),
        ),
        NumberOption(
            name="rank_tol",
            summary="relative size below which a direction is wire rounding; by wire dtype if not given",
            default=None,
            at_most=1.0,
        ),
        NumberOption(name="ridge_tau", summary="relative σ of half a vote, for subspace ridge only", default=0.1),
        ChoiceOption(
            name="votes",
            summary="equal: every direction votes alike; by_rank: a device of many directions has no more vote in all "
            "(not for subspace mean, where nobody votes)",
            default="equal",
            choices=("equal", "by_rank"),
        ),
        NumberOption(
            name="anchor",
            summary="share of the previous common space in the new one (projector, ridge); none if not given",
            default=None,
            at_most=0.99,
        ),
        NumberOption(
            name="energy",
            summary="keep no more directions than the best ones need to hold this share of the energy of the mean; R "
            "if not given",
            default=None,
            at_most=1.0,
        ),
    )

    @override
    def contract(self, options: Mapping[str, OptionValue], *, round_index: int = 0) -> ClientContract:
        """Readouts are trained and come back whole; under `frozen_tail` and `accumulate` S goes along, frozen."""
        rule = _parsed(options).rule
        frozen = rule in {Rule.FROZEN_TAIL, Rule.ACCUMULATE}
        return ClientContract(
            init=InitSource.FROZEN_STATE if frozen else InitSource.READOUT,
            needs_sent=rule in {Rule.DELTA, Rule.FROZEN_TAIL},
        )

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
        """P·Σp_iX_i in the canonical gauge, cut to `rank`."""
        chosen = _parsed(options)
        tolerance = _tolerance(chosen, updates)
        weights = normalised_weights([update.weight for update in updates])
        anchored = chosen.voting.anchor > 0
        rank = min(rank, updates[0].b.shape[0])  # not n: K may need more directions than S can have
        if chosen.fast and chosen.energy is None:
            votes = _vote_rule(chosen, updates)
            if (result := fast_round(votes, state, updates, weights, rank=rank)) is not None:
                return result
        terms = round_terms(chosen.rule, state, updates, weights, eta=chosen.eta, anchored=anchored)
        mean = terms.frame.coordinates(terms.mean())
        if chosen.energy is not None:
            rank = min(rank, energy_rank(mean.svd().sigma, chosen.energy))
        common = consensus(chosen.voting, terms, rank=rank, rank_tol=tolerance)
        found = Coordinates(left=common.basis.mT @ mean.left, right=mean.right).svd()
        inside = CompactSvd(u=common.basis @ found.u, sigma=found.sigma, v=found.v)
        new = state_from_svd(
            CompactSvd(u=terms.frame.lift_left(inside.u), sigma=inside.sigma, v=terms.frame.lift_right(inside.v)),
            rank=rank,
            dtype=state_dtype(updates[0].b.dtype),
            strategy=self.name,
            floor=rounding_floor(mean.magnitude()),
        )
        return AggregationResult(
            state=new,
            diagnostics=_diagnostics(
                terms, updates, common=common, inside=float(found.sigma.norm()), previous=state, new=new, rank=rank
            ),
        )

    @override
    def aggregate_many(
        self,
        states: Sequence[LayerState | None],
        updates: Sequence[Sequence[ClientUpdate]],
        *,
        rank: int,
        round_index: int,
        options: Mapping[str, OptionValue],
        batched: bool,
    ) -> list[AggregationResult]:
        """Fast rounds in batches, all that these do not do one by one."""
        chosen = _parsed(options)
        found: list[AggregationResult | None] = [None] * len(updates)
        if batched and chosen.fast and chosen.energy is None:
            # One rule for all that share a wire dtype, from which the rank tolerance may come.
            able = [i for i, of_module in enumerate(updates) if can_do(_vote_rule(chosen, of_module), of_module)]
            for dtype in dict.fromkeys(updates[i][0].b.dtype for i in able):
                alike = [i for i in able if updates[i][0].b.dtype == dtype]
                rule = _vote_rule(chosen, updates[alike[0]])
                modules = [
                    module_round(rule, states[i], updates[i], normalised_weights([u.weight for u in updates[i]]))
                    for i in alike
                ]
                for i, result in zip(alike, fast_rounds(rule, modules, rank=rank), strict=True):
                    found[i] = result
        return [
            result or self.aggregate(state, of_module, rank=rank, round_index=round_index, options=options)
            for result, state, of_module in zip(found, states, updates, strict=True)
        ]

    @override
    def readout(
        self, state: LayerState, rank: int, scale: float, *, key: RefillKey, style: ReadoutStyle
    ) -> tuple[Tensor, Tensor]:
        """A slice: scale·b·a is the best rank-`rank` part of S."""
        return slice_readout(state, rank, scale, key=key, style=style)


def _parsed(options: Mapping[str, OptionValue]) -> GloraOptions:
    chosen = GloraOptions(
        voting=Voting(
            subspace=Subspace(str(options["subspace"])),
            ridge_tau=number(options, "ridge_tau"),
            rank_normalised=options["votes"] == "by_rank",
            anchor=optional_number(options, "anchor") or 0.0,
        ),
        rule=Rule(str(options["rule"])),
        eta=number(options, "eta"),
        rank_tol=optional_number(options, "rank_tol"),
        energy=optional_number(options, "energy"),
        fast=options["accuracy"] == "fast",
    )
    _check_together(chosen)
    return chosen


def _check_together(chosen: GloraOptions) -> None:
    """Raise OptionError for what would have no effect, or no meaning, beside the rest."""
    subspace = chosen.voting.subspace
    if chosen.voting.anchor and subspace not in {Subspace.PROJECTOR, Subspace.RIDGE}:
        raise OptionError(
            f"Option 'anchor' mixes bounded votes and subspace {subspace.value!r} counts energy; "
            "use subspace projector or ridge, or leave the anchor out."
        )
    if chosen.voting.rank_normalised and subspace is Subspace.MEAN:
        raise OptionError(
            "Option 'votes' is 'by_rank' and in subspace 'mean' nobody votes; use another subspace, or leave it out."
        )
    if chosen.rule is Rule.REPLACE and chosen.eta != 1.0:
        raise OptionError(
            f"Option 'eta' is {chosen.eta:g} and rule 'replace' has no step; use another rule, or leave eta out."
        )


def _tolerance(chosen: GloraOptions, updates: Sequence[ClientUpdate]) -> float:
    return default_rank_tol(updates[0].b.dtype) if chosen.rank_tol is None else chosen.rank_tol


def _vote_rule(chosen: GloraOptions, updates: Sequence[ClientUpdate]) -> VoteRule:
    return VoteRule(rule=chosen.rule, eta=chosen.eta, rank_tol=_tolerance(chosen, updates), voting=chosen.voting)


def _diagnostics(
    terms: RoundTerms,
    updates: Sequence[ClientUpdate],
    *,
    common: Consensus,
    inside: float,
    previous: LayerState | None,
    new: LayerState,
    rank: int,
) -> Diagnostics:
    products = mean_products(terms, common.norms)
    outside = norm_outside(terms, products, common.basis, inside)
    norm = math.hypot(inside, outside)
    norm = norm if norm > rounding_floor(terms.frame.magnitude(terms.mean())) else 0.0
    return Diagnostics(
        eigenvalues=tuple(common.spectrum[:rank].tolist()),
        eigengap=common.eigengap,
        sigma=tuple(new.sigma.tolist()),
        mean_norm=norm,
        captured_energy=min(1.0, (inside / norm) ** 2) if norm else 1.0,
        truncation_error=outside / norm if norm else 0.0,
        aggregation_bias=0.0,
        coverage=coverage(updates, terms.weights, rank),
        clients=client_diagnostics(terms, updates, common.norms, products, votes=common.votes, basis=common.basis),
        angles=principal_angles(previous, new),
    )
