r"""The largest eigenvalues of a large symmetric matrix and their eigenvectors, in float64 at half the price.

All eigenvectors of the matrix rounded to float32, :math:`V = [V_1\;V_2]`, are those of the matrix to 1e-7/gap. V_1 is
the leading ones and some more. Ritz vectors x_j of span(V_1), in float64, lack what lies in V_2's directions, to first
order

.. math:: x_j \leftarrow x_j + V_2\,\frac{V_2^\top(Kx_j - \theta_jx_j)}{\theta_j - \lambda_k},

in which float32 is good enough for six more digits a step (one step of Newton's method; Dongarra, Moler and Wilkinson,
1983). The vectors beyond the leading ones keep λ_k away from θ_j. What ends it are residuals of the size that float64
leaves; where these are not reached, all is computed in float64.
"""

import torch
from torch import Tensor

from glora_server.aggregation.factors import EPS

_BEYOND = 16
_LEAST = 256
"""Rows from which it is worth it."""
_MOST_STEPS = 4
_LEAST_GAP = 1e-6
"""Of two eigenvalues relative to the largest one, below which float32 cannot tell their vectors apart."""


def gram_of_rows(matrix: Tensor) -> Tensor:
    """X·Xᵀ for q×k, by blocks of rows: the upper half is copied from the lower one."""
    rows = matrix.shape[0]
    found, step = matrix.new_empty((rows, rows)), max(64, rows // 4)
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        found[part, : part.stop] = matrix[part] @ matrix[: part.stop].mT
        found[:start, part] = found[part, :start].mT
    return found


def leading_eigen(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Falling eigenvalues of a positive semidefinite float64 matrix, more than `count` where it has them, and the
    eigenvectors of the first `count`, q×count.
    """
    q = matrix.shape[0]
    if q >= _LEAST and 4 * (count + _BEYOND) <= q and matrix.device.type == "cpu":
        values, vectors = torch.linalg.eigh(matrix.float())
        found = _refined(matrix, values, vectors, count) if bool(torch.isfinite(values).all()) else None
        if found is not None:
            return found
    values, vectors = torch.linalg.eigh(matrix)
    return values.flip(0), vectors.flip(1)[:, :count]


def _refined(matrix: Tensor, values: Tensor, vectors: Tensor, count: int) -> tuple[Tensor, Tensor] | None:
    """`count` + 1 Ritz values and more, and `count` vectors, from rising ones in float32; None: not to be had so."""
    width = count + _BEYOND
    others, at, block = vectors[:, :-width], values[:-width].double(), vectors[:, -width:].flip(1).double()
    for _ in range(_MOST_STEPS):
        block = torch.linalg.qr(block).Q
        image = matrix @ block
        ritz, turn = torch.linalg.eigh(block.mT @ image)
        ritz, turn = ritz.flip(0), turn.flip(1)
        block, image = block @ turn, image @ turn
        rest = image - block * ritz
        largest = float(torch.linalg.vector_norm(rest[:, : count + 1], dim=0).max())
        if largest <= 4 * EPS * matrix.shape[0] ** 0.5 * float(ritz[0]):
            return ritz, block[:, :count]
        gaps = ritz - at[:, None]
        step = torch.where(gaps > _LEAST_GAP * ritz[0], (others.mT @ rest.float()).double() / gaps, 0.0)
        block = block + (others @ step.float()).double()
    return None
