r"""What each device vouches for: X_i cut to its revealed rank, from orthonormal bases of as few columns as it takes.

Under all rules but `replace` the terms of X_i are the device's own upload and blocks that many devices share: the state
and what was sent. The shared ones are factored once, :math:`[L_1 \dots L_k] = QT`, and of an upload's B only what is
beyond Q is. With :math:`C = Q^\top B` and :math:`B - QC = NF`, and the same for the rights,

.. math:: X_i = [Q\;N]\,K\,[P\;W]^\top, \qquad K = \sum_k c_k
    \begin{pmatrix}T_k\\0\end{pmatrix}\begin{pmatrix}T'_k\\0\end{pmatrix}^\top
    + c_i\begin{pmatrix}C\\F\end{pmatrix}\begin{pmatrix}D\\G\end{pmatrix}^\top .

Each column's rounding error is relative to its own norm, as in the frame itself.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glora_server.aggregation.factors import numerical_rank, singular_values, svd
from glora_server.aggregation.frame import Combination, JointFrame, rounding_floor
from glora_server.aggregation.rules import ClientNorms, RoundTerms

_AT_A_TIME = 32
_WEAK = 1e-6
"""Relative size of a singular value below which rounding of N against Q could be seen in its vector."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Revealed:
    """Left singular vectors [Q N]·inner and values of what a client vouches for, and how large all that it said is.

    shared (q×c, c may be 0) and own (q×k) have orthonormal columns; inner (c+k)×ρ_i.
    """

    shared: Tensor
    own: Tensor
    inner: Tensor
    sigma: Tensor
    norms: ClientNorms


def reveal(terms: RoundTerms, rank_tol: float) -> tuple[Revealed, ...]:
    r"""Each X_i cut to the directions that its device vouches for, and ‖ΔW_i‖ and ‖D_i‖, which that finds on its way.

    Rounding to the wire dtype perturbs an upload by about rank_tol relative to the *terms* of X_i = S + D_i, and
    when S and sent_i cancel that noise stays behind as directions with tiny σ, each of which would have a full vote
    in the projector. A direction counts if

    .. math:: \sigma_j(X_i) > \max(\min(\tau \cdot m_i,\ \sigma_1(D_i)),\ \varepsilon_i),\quad
              m_i = \max(\sigma_1(X_i), \sigma_1(S), \sigma_1(D_i), \sigma_1(\eta\Delta W_i)).

    By Weyl's inequality a direction that only D_i holds has σ ≤ σ_1(D_i); so where a device changed less than the
    tolerance, its change has no vote but every direction of S stronger than the change keeps its own: an adapter
    that comes back untouched votes for all of S, however coarse the wire. With S = 0 this is the plain σ_j > τσ_1.
    ε_i is the rounding of float64 itself.
    """
    base_norm, _ = terms.frame.coordinates(terms.base).norms()
    revealed: dict[int, Revealed] = {}
    for (shared, _), clients in _alike(terms).items():
        found = _of_terms(terms, shared, clients) if shared else (_of_one_block(terms, client) for client in clients)
        for client, said in zip(clients, found, strict=True):
            revealed[client] = _cut(terms, client, said, base_norm=base_norm, rank_tol=rank_tol)
    return tuple(revealed[client] for client in range(len(terms.changes)))


def _alike(terms: RoundTerms) -> dict[tuple[tuple[int, ...], int], list[int]]:
    """Devices by the blocks beside their own that they speak of, and by rank; the own block is the first change."""
    found: dict[tuple[tuple[int, ...], int], list[int]] = {}
    for client, change in enumerate(terms.changes):
        shared = tuple(sorted({term.block for term in terms.base + change[1:]}))
        rank = terms.frame.columns(change[0].block)[0].shape[1]
        found.setdefault((shared, rank), []).append(client)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Said:
    """The SVD of X_i as `Revealed` has it, and (σ_1, norm) of D_i and of ηΔW_i."""

    shared: Tensor
    own: Tensor
    inner: Tensor
    sigma: Tensor
    change: tuple[float, float]
    step: tuple[float, float]


def _cut(terms: RoundTerms, client: int, said: _Said, *, base_norm: float, rank_tol: float) -> Revealed:
    largest = max(float(said.sigma[0]), said.change[0], said.step[0], base_norm)
    rounding = rounding_floor(terms.frame.magnitude(terms.said(client)))
    keep = numerical_rank(said.sigma, tolerance=0.0, floor=max(min(rank_tol * largest, said.change[0]), rounding))
    shared, own, inner, sigma = said.shared, said.own, said.inner[:, :keep], said.sigma[:keep]
    if keep and shared.shape[1] and float(sigma[-1]) < _WEAK * float(sigma[0]):
        own, inner = torch.linalg.qr(torch.cat([shared, own], dim=1) @ inner)
        shared = shared[:, :0]
    norms = terms.norms(client, step=said.step[1], change=said.change[1])
    return Revealed(shared=shared, own=own, inner=inner, sigma=sigma, norms=norms)


def _of_one_block(terms: RoundTerms, client: int) -> _Said:
    """X_i = D_i = ηΔW_i."""
    (term,) = terms.said(client)
    left, right = terms.frame.columns(term.block)
    if left.shape[1] > min(left.shape[0], right.shape[0]):
        found = svd(left @ right.mT)
        own, inner = found.u, torch.eye(found.u.shape[1], dtype=left.dtype, device=left.device)
    else:
        own, triangle = torch.linalg.qr(left)
        found = svd(triangle @ torch.linalg.qr(right, mode="r").R.mT)
        inner = found.u
    sigma = found.sigma * abs(term.coefficient)
    size = float(sigma[0]), float(torch.linalg.vector_norm(sigma))
    return _Said(shared=left[:, :0], own=own, inner=inner, sigma=sigma, change=size, step=size)


def _of_terms(terms: RoundTerms, shared: Sequence[int], clients: Sequence[int]) -> Iterator[_Said]:
    """For devices of one rank."""
    common = _Shared.of(terms.frame, shared)
    for start in range(0, len(clients), _AT_A_TIME):
        some = clients[start : start + _AT_A_TIME]
        own = [terms.frame.columns(terms.changes[client][0].block) for client in some]
        yield from _of_some(common, own, [terms.changes[client] for client in some], terms.base)


def _of_some(
    common: "_Shared", own: Sequence[tuple[Tensor, Tensor]], changes: Sequence[Combination], base: Combination
) -> Iterator[_Said]:
    left, beyond = _joined([pair[0] for pair in own], common.left)
    right, _ = _joined([pair[1] for pair in own], common.right)
    gain = torch.tensor([change[0].coefficient for change in changes], dtype=left.dtype, device=left.device)
    step = left * gain[:, None, None]
    changed = step @ right.mT
    c, p = common.left.shape[1], common.right.shape[1]
    changed[:, :c, :p] += torch.stack([common.core(change[1:]) for change in changes])
    steps = singular_values(torch.linalg.qr(step, mode="r").R @ torch.linalg.qr(right, mode="r").R.mT)
    sizes = [t.tolist() for t in (*_sizes(changed), steps[:, 0], torch.linalg.vector_norm(steps, dim=1))]
    changed[:, :c, :p] += common.core(base)
    found = svd(changed)
    for i, (top, norm, own_top, own_norm) in enumerate(zip(*sizes, strict=True)):
        yield _Said(
            shared=common.left,
            own=beyond[i],
            inner=found.u[i],
            sigma=found.sigma[i],
            change=(top, norm),
            step=(own_top, own_norm),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shared:
    """Q (q×c) and P of the shared blocks, and each block in them (c×p)."""

    left: Tensor
    right: Tensor
    cores: dict[int, Tensor]

    @classmethod
    def of(cls, frame: JointFrame, blocks: Sequence[int]) -> "_Shared":
        pairs = [frame.columns(block) for block in blocks]
        left, t_left = torch.linalg.qr(torch.cat([pair[0] for pair in pairs], dim=1))
        right, t_right = torch.linalg.qr(torch.cat([pair[1] for pair in pairs], dim=1))
        widths = [pair[0].shape[1] for pair in pairs]
        split = zip(blocks, t_left.split(widths, dim=1), t_right.split(widths, dim=1), strict=True)
        return cls(left=left, right=right, cores={block: on_left @ on_right.mT for block, on_left, on_right in split})

    def core(self, combination: Combination) -> Tensor:
        """Of shared blocks."""
        total = self.left.new_zeros((self.left.shape[1], self.right.shape[1]))
        for term in combination:
            total.add_(self.cores[term.block], alpha=term.coefficient)
        return total


def _joined(columns: Sequence[Tensor], basis: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of several devices (q×r each) in [basis N_i] (m×(c+k)×r), and N_i (m×q×k)."""
    (q, r), m = columns[0].shape, len(columns)
    rows = torch.cat([some.mT for some in columns])
    cross = rows @ basis
    rest = torch.addmm(rows, cross, basis.mT, alpha=-1)
    again = rest @ basis  # what is left may be small
    rest = torch.addmm(rest, again, basis.mT, alpha=-1)
    beyond, fold = torch.linalg.qr(rest.view(m, r, q).mT)
    return torch.cat([(cross + again).view(m, r, -1).mT, fold], dim=1), beyond


def _sizes(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Largest singular values and Frobenius norms (m); the former from squares, which is half the work."""
    unit = matrices.abs().amax(dim=(1, 2)).clamp(min=torch.finfo(matrices.dtype).tiny)
    scaled = matrices / unit[:, None, None]
    squares = torch.linalg.eigvalsh(scaled @ scaled.mT)[:, -1].clamp(min=0)
    return squares.sqrt() * unit, torch.linalg.matrix_norm(scaled) * unit
