"""How large what a device says and what it changed are, as the thresholds of votes need it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from glora_server.aggregation.fast.cores import Batch, Cores, Grams

_SQUARINGS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Of every device (M×m), by some norm: `own` of f_iB_iA_i, and `change` of D_i, 0 where only rounding is left."""

    own: Tensor
    change: Tensor


def frobenius_sizes(batch: Batch, cores: Cores) -> Sizes:
    """By the Frobenius norm, which is known: at least what `spectral_sizes` says."""
    return Sizes(own=cores.product * batch.gain, change=cores.change.sqrt())


def spectral_sizes(batch: Batch, grams: Grams, cores: Cores) -> Sizes:
    """By the largest singular value, to within 1 %: σ_1² of LR is the largest eigenvalue of (LᵀL)(RRᵀ)."""
    tail = batch.tail
    held_b, held_a = tail.sent_b.double(), tail.sent_a.double()
    left = _bordered(grams.b, grams.sent, held_b.mT @ held_b)
    right = _bordered(grams.a, grams.sent_right, held_a @ held_a.mT)
    gains = torch.cat([batch.gain[..., None].expand(*batch.gain.shape, grams.b.shape[-1]), -_sent_gains(batch)], dim=2)
    change = _largest_eigenvalue(left @ (right * gains[..., :, None] * gains[..., None, :])).sqrt()
    own = _largest_eigenvalue(grams.b @ grams.a).sqrt() * batch.gain
    return Sizes(own=own, change=torch.where(cores.change > 0, change, 0.0))


def _sent_gains(batch: Batch) -> Tensor:
    """η·(the scale of what was sent), once for each of its columns (M×m×q)."""
    tail = batch.tail
    return tail.sent_gain[:, None, None].expand(*batch.gain.shape, tail.sent_b.shape[2])


def _bordered(own: Tensor, cross: Tensor, held: Tensor) -> Tensor:
    """The Gram matrix (M×m×(r+q)×(r+q)) of a device's columns and those that it was sent (held, M×q×q)."""
    upper = torch.cat([own, cross.mT], dim=3)
    return torch.cat([upper, torch.cat([cross, held[:, None].expand(-1, own.shape[1], -1, -1)], dim=3)], dim=2)


def _largest_eigenvalue(product: Tensor) -> Tensor:
    """Of products of two positive semidefinite matrices (…×k×k): the mean of the eigenvalues, each weighted with its
    64th power.
    """
    size, power = _traces(product).clamp(min=torch.finfo(product.dtype).tiny), product
    for _ in range(_SQUARINGS):
        power = power / _traces(power).clamp(min=torch.finfo(power.dtype).tiny)[..., None, None]
        power = power @ power
    weights = _traces(power)
    found = _traces(power @ product) / torch.where(weights > 0, weights, 1.0)
    return torch.minimum(torch.where(weights > 0, found, 0.0), size).clamp(min=0)


def _traces(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
