"""left·rightᵀ on a CPU, by the quicker of the two libraries that torch brings.

In float32 `torch.mm` asks MKL, whose kernels use AVX-512 on processors of one maker only and slow down with narrow
matrices; oneDNN's do neither (decision 13, with the numbers). torch reaches oneDNN in float32 by an operator of its
compiler that has no public name, so all of that is here, and `torch.mm` does the same wherever it is missing.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor


def times_transposed(left: Tensor, right: Tensor) -> Tensor:
    """left·rightᵀ (…×p×q) for matrices …×p×k and …×q×k of one dtype, in any layout."""
    if left.device.type != "cpu" or left.shape[:-2].numel() != 1 or 0 in left.shape:
        return left @ right.mT
    # Two-dimensional, for that is ten times faster in bfloat16 too.
    multiply = _on_cpu() if left.dtype == torch.float32 else _by_torch
    found = multiply(left.reshape(left.shape[-2:]), right.reshape(right.shape[-2:]))
    return found.view(*left.shape[:-1], right.shape[-2])


@cache
def _on_cpu() -> Callable[[Tensor, Tensor], Tensor]:
    """oneDNN's product where this torch has it and it does as it should, else torch's own."""
    left, right = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(4, 3)
    try:
        usable = torch.equal(_by_onednn(left, right), left @ right.mT)
    except (AttributeError, RuntimeError):
        usable = False
    return _by_onednn if usable else _by_torch


def _by_onednn(left: Tensor, right: Tensor) -> Tensor:
    if not (right.is_contiguous() or right.mT.is_contiguous()):
        right = right.contiguous()  # of any other layout it makes a thousand times the work
    found: Tensor = torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")
    return found


def _by_torch(left: Tensor, right: Tensor) -> Tensor:
    return left @ right.mT
