r"""What every device says, as small float64 cores over a basis that is cheap to apply.

Each rule writes :math:`X_i = T_k + f_iB_iA_i` with f_i = ηs_i and a *tail* T_k that all devices share that were sent
the same adapter: 0 under `replace`, S under `accumulate`, S − η·sent_k under `delta` and `frozen_tail`. With
:math:`T_k = U_T\Sigma_TV_T^\top`, :math:`C = U_T^\top B` and :math:`B^\top B - C^\top C = E\Lambda E^\top`,

.. math:: N_i = (B_i - U_TC)E\Lambda^{-1/2},\quad
    [U_T\;B_i] = [U_T\;N_i]\,J,\quad J = \begin{pmatrix}I & C\\0 & \Lambda^{1/2}E^\top\end{pmatrix},

:math:`X_iX_i^\top = Q_iHQ_i^\top` with Q_i = [U_T N_i] orthonormal and :math:`H = J\,G_R\,J^\top`, G_R the Gram matrix
of the right factors. The eigenvectors of H are X_i's left singular vectors and its eigenvalues σ²; a device's vote
is :math:`Q_iW_iQ_i^\top`. Where B_i is well-conditioned beside U_T, N_i is never made: the vote is
:math:`[U_T\;B_i]\,J^{-1}W_iJ^{-\top}[U_T\;B_i]^\top`.

Cost O((d + n)·r(r + c)) per device. Modules (M) come first and devices (m) second in every shape.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import assert_never

import torch
from torch import Tensor

from glora_server.aggregation.factors import ClientUpdate
from glora_server.aggregation.fast.cores import RESOLUTION, Batch, Cores, Grams, Tail, measured
from glora_server.aggregation.fast.devices import Devices, Listed, Units
from glora_server.aggregation.fast.sizes import Sizes, frobenius_sizes, spectral_sizes
from glora_server.aggregation.fast.stacked import Stacked
from glora_server.aggregation.fast.tails import tail_of
from glora_server.aggregation.frame import Block
from glora_server.aggregation.rules import Rule, SentAdapters, sent_adapters
from glora_server.aggregation.state import LayerState
from glora_server.aggregation.subspace import Subspace, Voting

_PRECISE_BELOW = 1e-6
_PLAIN_ABOVE = 1.0 / 64
_PLAIN_NORMS = 1e-12, 1e12
_MOST_LISTED = 128
"""Devices of one group where memory is to be small: their cores are some twenty numbers for each of r²."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VoteRule:
    """How uploads are read (`rules.Rule` with its η), cut and weighted (`reveal.reveal` and `subspace.Voting`)."""

    rule: Rule
    eta: float
    rank_tol: float
    voting: Voting

    @property
    def step(self) -> float:
        """η, which `replace` does not have."""
        return 1.0 if self.rule is Rule.REPLACE else self.eta


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleRound:
    """One module's round: the state that X_i builds on, the uploads, p_i, what was sent, and who shares a tail.

    `parts`: for every tail and rank, the position of the sent adapter (None: none, or a zero one) and the devices.
    """

    state: LayerState | None
    updates: Sequence[ClientUpdate]
    weights: Sequence[float]
    sent: SentAdapters | None
    parts: tuple[tuple[int | None, tuple[int, ...]], ...]

    @property
    def held(self) -> LayerState | None:
        """The state, if it is not zero."""
        return self.state if self.state is not None and self.state.rank else None

    def layout(self) -> tuple[object, ...]:
        """Equal for modules that can be computed in one batch."""
        first = self.updates[0]
        sent = () if self.sent is None else tuple(block.left.shape[1] for block in self.sent.blocks)
        ranks = tuple(update.rank for update in self.updates)
        return first.b.shape[0], first.a.shape[1], first.b.dtype, first.b.device, ranks, sent, self.parts


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Devices of one rank r that share a tail, float64 but for the probes.

    `batch`: factors as uploaded or refactored, p_i, f_i; `clients`: their places in the round; `units`: E_i, and N_i by
    its lift and shift; `cross` (M×m×c×r), `gram_b`, `gram_a` (M×m×r×r), `gram_sent` (M×m×q×r), `probed` (M×m×r×k):
    U_TᵀB, BᵀB, AAᵀ, B0ᵀB, A·Ω with the columns of `probes`; `vote` (M×m×(c+r)×(c+r)): p_iW_i in [U_T N_i]; `votes`
    (M×m): how many directions count; `norms` ‖ΔW_i‖ and `changes` ‖D_i‖ (M×m).
    """

    batch: Batch
    clients: tuple[int, ...]
    units: Units
    cross: Tensor
    gram_b: Tensor
    gram_a: Tensor
    gram_sent: Tensor
    probed: Tensor
    vote: Tensor
    votes: Tensor
    norms: Tensor
    changes: Tensor

    @property
    def tail(self) -> Tail:
        """T_k."""
        return self.batch.tail

    @property
    def devices(self) -> Devices:
        """The factors."""
        return self.batch.devices

    @property
    def rank(self) -> int:
        """r."""
        return self.gram_b.shape[-1]

    def core(self) -> Tensor:
        """p_iW_i in [U_T E_i]."""
        return torch.where(self.units.plain[..., None, None], _in_raw(self.vote, self.units), self.vote)

    def fold(self) -> Tensor:
        """N_iᵀB_i (M×m×r×r): B_i = U_T·cross + N_i·fold."""
        found: Tensor = self.units.lift.mT @ (self.gram_b - self.cross.mT @ self.cross)
        return found

    @property
    def magnitude(self) -> Tensor:
        """p_k·Σσ(T_k) + Σ_ip_if_iΣ_j‖b_j‖‖a_j‖ (M): what rounding of the mean is relative to."""
        products = self.gram_b.diagonal(dim1=-2, dim2=-1) * self.gram_a.diagonal(dim1=-2, dim2=-1)
        own = products.clamp(min=0).sqrt().sum(dim=-1)
        tail = self.tail.sigma.sum(dim=1) * self.batch.share.sum(dim=1)
        return tail + (self.batch.share * self.batch.gain * own).sum(dim=1)

    @property
    def columns(self) -> int:
        """How many columns [U_T E_1 … E_m] has."""
        return self.tail.width + self.gram_b.shape[1] * self.rank

    @property
    def weights(self) -> Tensor:
        """p_if_i (M×m×1×1)."""
        return (self.batch.share * self.batch.gain)[..., None, None]

    @property
    def weighted_probes(self) -> Tensor:
        """p_if_iA_iΩ (M×m×r×k): ΣB_i times these is the mean of the uploads, probed."""
        return (self.weights * self.probed).float()


def module_round(
    rule: VoteRule, state: LayerState | None, updates: Sequence[ClientUpdate], weights: Sequence[float]
) -> ModuleRound:
    """The module's devices by tail and rank. Raises MissingSentError."""
    sent = sent_adapters(updates, rule.rule) if rule.rule in {Rule.DELTA, Rule.FROZEN_TAIL} else None
    members: dict[tuple[int | None, float, int], list[int]] = {}
    for i, update in enumerate(updates):
        block, scale = sent.of_client[i] if sent is not None else (None, 0.0)
        members.setdefault((block, 0.0 if block is None else scale, update.rank), []).append(i)
    parts = tuple((block, tuple(clients)) for (block, _, _), clients in members.items())
    return ModuleRound(state=state, updates=updates, weights=weights, sent=sent, parts=parts)


def read_groups(rule: VoteRule, modules: Sequence[ModuleRound], *, stack: bool) -> tuple[Group, ...]:
    """The devices of modules of one layout, by tail and rank; `stack` copies factors side by side, as a GPU wants."""
    tails: dict[tuple[int | None, tuple[float, ...]], Tail] = {}
    groups = []
    for block, clients in modules[0].parts:
        scales = tuple(_sent_scale(module, clients[0]) for module in modules)
        if (block, scales) not in tails:
            tails[block, scales] = _tail(rule, modules, block, scales)
        size = len(clients) if stack else _MOST_LISTED
        for start in range(0, len(clients), size):
            some = clients[start : start + size]
            batch = _batch(tails[block, scales], modules, some, rule.step, stack=stack)
            groups.append(_group(rule, batch, some, modules))
    return tuple(groups)


def _sent_scale(module: ModuleRound, client: int) -> float:
    if module.sent is None:
        return 0.0
    block, scale = module.sent.of_client[client]
    return 0.0 if block is None else scale


def _tail(rule: VoteRule, modules: Sequence[ModuleRound], block: int | None, scales: Sequence[float]) -> Tail:
    """S − η·sent of each module."""
    states = [None if rule.rule is Rule.REPLACE else module.held for module in modules]
    return tail_of(states, [_sent_block(module, block) for module in modules], [rule.step * scale for scale in scales])


def _sent_block(module: ModuleRound, block: int | None) -> Block:
    first = module.updates[0]
    if module.sent is None or block is None:
        return Block(left=first.b[:, :0], right=first.a[:0])
    return module.sent.blocks[block]


def _batch(tail: Tail, modules: Sequence[ModuleRound], clients: Sequence[int], step: float, *, stack: bool) -> Batch:
    chosen = [[module.updates[i] for i in clients] for module in modules]
    bs, rows = [[u.b for u in updates] for updates in chosen], [[u.a for u in updates] for updates in chosen]
    return Batch(
        tail=tail,
        devices=Stacked.of(bs, rows) if stack else Listed(b=tuple(bs[0]), a=tuple(rows[0])),
        share=_wide([[module.weights[i] for i in clients] for module in modules], like=bs[0][0]),
        gain=_wide([[step * update.scale for update in updates] for updates in chosen], like=bs[0][0]),
    )


def _wide(values: Sequence[Sequence[float]], *, like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device)


def _group(rule: VoteRule, batch: Batch, clients: tuple[int, ...], modules: Sequence[ModuleRound]) -> Group:
    batch, grams, cores = measured(batch)
    vote, votes = _votes(rule, batch, grams, cores, modules)
    units = Units(
        lift=cores.beyond.lift / cores.norms[..., :, None],
        shift=(grams.cross / cores.norms[..., None, :]) @ cores.beyond.lift,
        u=batch.tail.u,
        plain=_plain(cores),
        precise=cores.beyond.least_alive < _PRECISE_BELOW,
    )
    return Group(
        batch=batch,
        clients=clients,
        units=units,
        cross=grams.cross,
        gram_b=grams.b,
        gram_a=grams.a,
        gram_sent=grams.sent,
        probed=grams.probed.float(),  # that is what they were summed in
        vote=vote,
        votes=votes,
        norms=cores.product * batch.gain / rule.step,
        changes=cores.change.sqrt(),
    )


def _plain(cores: Cores) -> Tensor:
    """Where B_i can stand for N_i: rounding it then moves what it says by no more than eight times as much."""
    least, most = _PLAIN_NORMS
    inside = (cores.norms > least) & (cores.norms < most)  # their inverse squares must not overflow float32
    return (cores.beyond.least > _PLAIN_ABOVE) & inside.all(dim=-1)


def _in_raw(vote: Tensor, units: Units) -> Tensor:
    """J⁻¹·vote·J⁻ᵀ: a vote in [U_T N_i] in terms of [U_T B_i]."""
    c = units.shift.shape[-2]
    back = torch.zeros_like(vote)
    back[..., :c, :c] = torch.eye(c, dtype=vote.dtype, device=vote.device)
    back[..., :c, c:] = -units.shift
    back[..., c:, c:] = units.lift
    raw: Tensor = back @ vote @ back.mT
    return raw


def _votes(
    rule: VoteRule, batch: Batch, grams: Grams, cores: Cores, modules: Sequence[ModuleRound]
) -> tuple[Tensor, Tensor]:
    """p_iW_i (M×m×(c+r)×(c+r)), and how many eigenvectors of H have a vote (M×m)."""
    size = cores.h.shape[-1]
    all_votes = torch.full_like(cores.lower, size, dtype=torch.long)
    if rule.voting.subspace is Subspace.PROJECTOR:
        # If all count, as the bounds of the eigenvalues often show, W_i is the identity and needs no eigenvectors.
        top, sizes = cores.upper.clamp(min=0).sqrt(), frobenius_sizes(batch, cores)
        least = _floor(rule, batch, cores, sizes, modules, top=top)
        if bool((cores.lower.sqrt() > least).all()):
            unit = torch.eye(size, dtype=cores.h.dtype, device=cores.h.device)
            return batch.share[..., None, None] * unit, all_votes
    values, vectors = torch.linalg.eigh(cores.h)
    sigma = values.clamp(min=0).sqrt()
    # Under replace a device has no terms beside X_i.
    sizes = frobenius_sizes(batch, cores) if rule.rule is Rule.REPLACE else spectral_sizes(batch, grams, cores)
    kept = sigma > _floor(rule, batch, cores, sizes, modules, top=sigma[..., -1])[..., None]
    weight = batch.share[..., None] * _vote_weights(rule.voting, torch.where(kept, values, 0.0), kept)
    return (vectors * weight[..., None, :]) @ vectors.mT, kept.sum(dim=-1)


def _floor(
    rule: VoteRule, batch: Batch, cores: Cores, sizes: Sizes, modules: Sequence[ModuleRound], *, top: Tensor
) -> Tensor:
    """The floor of `reveal.reveal` (M×m), for σ_1(X_i) = `top` and the sizes of ηΔW_i and D_i; it grows with all."""
    terms, changed = top, top
    if rule.rule is not Rule.REPLACE:
        changed = sizes.change
        largest = [float(module.held.sigma[0]) if module.held is not None else 0.0 for module in modules]
        held = torch.tensor(largest, dtype=top.dtype, device=top.device)[:, None]
        terms = torch.stack([top, changed, sizes.own, held.expand_as(top)]).amax(dim=0)
    rounding = RESOLUTION * (cores.magnitude * batch.gain + batch.tail.sigma.sum(dim=1, keepdim=True))
    return torch.maximum(torch.minimum(rule.rank_tol * terms, changed), rounding)


def _vote_weights(voting: Voting, squares: Tensor, kept: Tensor) -> Tensor:
    """w_ij (M×m×(c+r)) from σ², 0 where nothing is kept."""
    match voting.subspace:
        case Subspace.PROJECTOR:
            return kept.to(squares.dtype)
        case Subspace.RIDGE:
            unit = squares + voting.ridge_tau**2 * squares.amax(dim=-1, keepdim=True)
        case Subspace.NORMALISED_ENERGY:
            unit = squares.sum(dim=-1, keepdim=True)
        case Subspace.ENERGY | Subspace.MEAN:
            return squares
        case _:
            assert_never(voting.subspace)
    return torch.where(kept, squares / unit.clamp(min=torch.finfo(squares.dtype).tiny), 0.0)
