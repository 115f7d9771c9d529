r"""What every device says, as small float64 cores over a basis that is cheap to apply.

Each rule writes :math:`X_i = T_k + f_iB_iA_i` with f_i = ηs_i and a *tail* T_k that all devices share that were sent
the same adapter: 0 under `replace`, S under `accumulate`, S − η·sent_k under `delta` and `frozen_tail`. With
:math:`T_k = U_T\Sigma_TV_T^\top`, :math:`C = U_T^\top B` and :math:`B^\top B - C^\top C = E\Lambda E^\top`,

.. math:: N_i = (B_i - U_TC)E\Lambda^{-1/2},\quad
    [U_T\;B_i] = [U_T\;N_i]\,J,\quad J = \begin{pmatrix}I & C\\0 & \Lambda^{1/2}E^\top\end{pmatrix},

:math:`X_iX_i^\top = Q_iHQ_i^\top` with Q_i = [U_T N_i] orthonormal and :math:`H = J\,G_R\,J^\top`, G_R the Gram matrix
of the right factors. The eigenvectors of H are X_i's left singular vectors and its eigenvalues σ²; a device's vote
is :math:`Q_iW_iQ_i^\top`.

Cost O((d + n)·r(r + c)) per device; memory a few devices at a time (`cores`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import assert_never

import torch
from torch import Tensor

from glora_server.aggregation.factors import ClientUpdate, core_svd
from glora_server.aggregation.fast.cores import RESOLUTION, Batch, Cores, Tail, inverse_root, measured
from glora_server.aggregation.frame import Block
from glora_server.aggregation.rules import Rule, sent_adapters
from glora_server.aggregation.state import LayerState
from glora_server.aggregation.subspace import Subspace, Voting

_TAIL_ROUNDING = 1e-7
_PRECISE_BELOW = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class VoteRule:
    """How uploads are read (`rules.Rule` with its η), cut and weighted (`subspace.reveal` and `subspace.Voting`)."""

    rule: Rule
    eta: float
    rank_tol: float
    voting: Voting

    @property
    def step(self) -> float:
        """η, which `replace` does not have."""
        return 1.0 if self.rule is Rule.REPLACE else self.eta


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Devices of one rank r that share a tail; tensors stack them along the first dimension (m), float64.

    `batch`: factors as uploaded or refactored, p_i, f_i; `clients`: their places in the round; `lift` (m×r×r) and
    `shift` (m×c×r): N_i = B_i·lift − U_T·shift; `fold` (m×r×r), `cross` (m×c×r): B_i = U_T·cross + N_i·fold;
    `gram_b`, `gram_a` (m×r×r); `vote` (m×(c+r)×(c+r)): p_iW_i; `votes`: how many directions count; `norms` ‖ΔW_i‖ and
    `changes` ‖D_i‖; `precise`: N_i needs float64.
    """

    batch: Batch
    clients: tuple[int, ...]
    lift: Tensor
    shift: Tensor
    fold: Tensor
    cross: Tensor
    gram_b: Tensor
    gram_a: Tensor
    vote: Tensor
    votes: tuple[int, ...]
    norms: Tensor
    changes: Tensor
    precise: bool

    @property
    def tail(self) -> Tail:
        """T_k."""
        return self.batch.tail

    @property
    def rank(self) -> int:
        """r."""
        return self.gram_b.shape[-1]

    @property
    def weights(self) -> list[float]:
        """p_if_i."""
        weights: list[float] = (self.batch.share * self.batch.gain).tolist()
        return weights


def read_groups(
    rule: VoteRule, state: LayerState | None, updates: Sequence[ClientUpdate], weights: Sequence[float]
) -> tuple[Group, ...]:
    """The devices by tail and rank. Raises MissingSentError."""
    sent = sent_adapters(updates, rule.rule) if rule.rule in {Rule.DELTA, Rule.FROZEN_TAIL} else None
    held = state if rule.rule is not Rule.REPLACE and state is not None and state.rank else None
    members: dict[tuple[int | None, float, int], list[int]] = {}
    for i, update in enumerate(updates):
        block, scale = sent.of_client[i] if sent is not None else (None, 0.0)
        members.setdefault((block, 0.0 if block is None else scale, update.rank), []).append(i)
    tails: dict[tuple[int | None, float], Tail] = {}
    groups = []
    for (block, scale, _), clients in members.items():
        if (block, scale) not in tails:
            adapter = _nothing(updates[0]) if sent is None or block is None else sent.blocks[block]
            tails[block, scale] = _tail(held, adapter, gain=rule.step * scale)
        batch = _batch(tails[block, scale], [updates[i] for i in clients], [weights[i] for i in clients], rule.step)
        groups.append(_group(rule, batch, clients, state))
    return tuple(groups)


def _nothing(like: ClientUpdate) -> Block:
    return Block(left=like.b[:, :0], right=like.a[:0])


def _tail(state: LayerState | None, sent: Block, *, gain: float) -> Tail:
    """S − gain·sent, cut to what is more than float32 rounding of its terms."""
    lefts, rights = [sent.left.double() * -gain], [sent.right.double()]
    if state is not None:
        lefts.append(state.u.double())
        rights.append(state.a.double())
    left, right = torch.cat(lefts, dim=1), torch.cat(rights)
    found = core_svd(left, right.mT)
    terms = torch.linalg.vector_norm(left, dim=0) * torch.linalg.vector_norm(right, dim=1)
    keep = int((found.sigma > _TAIL_ROUNDING * terms.max()).sum()) if terms.numel() else 0
    return Tail(
        u=found.u[:, :keep],
        sigma=found.sigma[:keep],
        v=found.v[:, :keep],
        sent_b=sent.left,
        sent_a=sent.right,
        sent_gain=gain,
    )


def _batch(tail: Tail, updates: Sequence[ClientUpdate], weights: Sequence[float], step: float) -> Batch:
    device = updates[0].b.device
    return Batch(
        tail=tail,
        b=tuple(update.b for update in updates),
        a=tuple(update.a for update in updates),
        share=torch.tensor(weights, dtype=torch.float64, device=device),
        gain=torch.tensor([step * update.scale for update in updates], dtype=torch.float64, device=device),
    )


def _group(rule: VoteRule, batch: Batch, clients: Sequence[int], state: LayerState | None) -> Group:
    batch, grams, cores = measured(batch)
    kept = _kept(rule, batch, cores, state)
    weight = _vote_weights(rule.voting, torch.where(kept, cores.values, 0.0), kept)
    unit = cores.directions * inverse_root(cores.root)[:, None]
    alive = torch.where(cores.root > 0, cores.root, torch.inf)
    return Group(
        batch=batch,
        clients=tuple(clients),
        lift=unit / cores.norms[:, :, None],
        shift=(grams.cross / cores.norms[:, None]) @ unit,
        fold=cores.root[:, :, None] * cores.directions.mT * cores.norms[:, None],
        cross=grams.cross,
        gram_b=grams.b,
        gram_a=grams.a,
        vote=(cores.vectors * (batch.share[:, None] * weight)[:, None]) @ cores.vectors.mT,
        votes=tuple(kept.sum(dim=1).tolist()),
        norms=cores.product * batch.gain / rule.step,
        changes=cores.change.sqrt(),
        precise=bool((alive.amin(dim=1) < _PRECISE_BELOW).any()),
    )


def _kept(rule: VoteRule, batch: Batch, cores: Cores, state: LayerState | None) -> Tensor:
    """Which eigenvectors of H have a vote (m×(c+r)), by the floor of `subspace.reveal`.

    Where `reveal` takes σ_1(D_i) and σ_1(ηΔW_i), this takes the Frobenius norms, which Gram matrices give.
    """
    top = cores.values[:, -1].clamp(min=0).sqrt()
    terms, changed = top, top
    if rule.rule is not Rule.REPLACE:
        changed = cores.change.sqrt()
        held = float(state.sigma[0]) if state is not None and state.rank else 0.0
        terms = torch.stack([top, changed, cores.product * batch.gain]).amax(dim=0).clamp(min=held)
    rounding = RESOLUTION * (cores.magnitude * batch.gain + batch.tail.sigma.sum())
    floor = torch.maximum(torch.minimum(rule.rank_tol * terms, changed), rounding)
    return cores.values.clamp(min=0).sqrt() > floor[:, None]


def _vote_weights(voting: Voting, squares: Tensor, kept: Tensor) -> Tensor:
    """w_ij (m×(c+r)) from σ², 0 where nothing is kept."""
    match voting.subspace:
        case Subspace.PROJECTOR:
            return kept.to(squares.dtype)
        case Subspace.RIDGE:
            unit = squares + voting.ridge_tau**2 * squares.amax(dim=1, keepdim=True)
        case Subspace.NORMALISED_ENERGY:
            unit = squares.sum(dim=1, keepdim=True)
        case Subspace.ENERGY | Subspace.MEAN:
            return squares
        case _:
            assert_never(voting.subspace)
    return torch.where(kept, squares / unit.clamp(min=torch.finfo(squares.dtype).tiny), 0.0)
