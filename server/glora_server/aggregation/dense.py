"""The weighted mean of tensors that are not LoRA factors: a classification head, `modules_to_save`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from glora_server.aggregation.errors import DeviceError, DtypeError, EmptyUpdatesError, NonFiniteError, ShapeError
from glora_server.aggregation.factors import COMPUTE_DTYPE, all_finite, normalised_weights


def dense_average(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ p_i·tensor_i, p_i = weight_i/Σweights, summed in float64 in the given order, in the dtype of the inputs.

    All tensors have one shape, floating dtype and device. Raises the fitting AggregationError.
    """
    if not tensors:
        raise EmptyUpdatesError("There are no tensors to average; keep the previous value instead.")
    if len(tensors) != len(weights):
        raise ShapeError(f"There are {len(tensors)} tensors and {len(weights)} weights; give one weight per tensor.")
    shares = normalised_weights(weights)
    first = tensors[0]
    total = torch.zeros(first.shape, dtype=COMPUTE_DTYPE, device=first.device)
    for position, (tensor, share) in enumerate(zip(tensors, shares, strict=True)):
        _check_like(tensor, first, position)
        total.add_(tensor.to(COMPUTE_DTYPE), alpha=share)
    return total.to(first.dtype)


def _check_like(tensor: Tensor, first: Tensor, position: int) -> None:
    if tensor.shape != first.shape:
        raise ShapeError(f"Tensor {position} is {tuple(tensor.shape)} and tensor 0 is {tuple(first.shape)}.")
    if tensor.dtype != first.dtype or not tensor.dtype.is_floating_point:
        raise DtypeError(f"Tensor {position} is {tensor.dtype} and tensor 0 is {first.dtype}; use one floating dtype.")
    if tensor.device != first.device:
        raise DeviceError(f"Tensor {position} is on {tensor.device} and tensor 0 on {first.device}.")
    if not all_finite(tensor):
        raise NonFiniteError(f"Tensor {position} has NaN or infinity; reject the upload that it came with.")
