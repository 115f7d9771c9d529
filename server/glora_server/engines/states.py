"""Parts of a version <-> the aggregation package's layer states."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from glora_server.aggregation import LayerState
from glora_server.coordinator.model import StatePart, TensorKind
from glora_server.engines.tensors import from_record, to_record
from glora_wire.errors import GloraError, Reason

_EXTRA: Final = "extra."
VALUE: Final = "value"


def module_state(part: StatePart, *, strategy: str, device: torch.device) -> LayerState:
    """The layer state that the part of a module holds; raises GloraError INTERNAL when a tensor is missing."""
    tensors = {name: from_record(record, device) for name, record in part.tensors.items()}
    try:
        return LayerState(
            u=tensors["u"],
            a=tensors["a"],
            sigma=tensors["sigma"],
            extra={name.removeprefix(_EXTRA): value for name, value in tensors.items() if name.startswith(_EXTRA)},
            strategy=strategy,
        )
    except KeyError as missing:
        raise GloraError(
            Reason.INTERNAL, f"The stored state of {part.name} has no tensor {missing}.", module=part.name
        ) from missing


def module_part(name: str, state: LayerState) -> StatePart:
    """The part that keeps a module's layer state."""
    tensors = {"u": state.u, "a": state.a, "sigma": state.sigma}
    tensors |= {f"{_EXTRA}{key}": value for key, value in state.extra.items()}
    return StatePart(
        name=name, kind=TensorKind.MODULE, tensors={key: to_record(value) for key, value in tensors.items()}
    )


def dense_part(name: str, value: Tensor) -> StatePart:
    """The part that keeps a dense tensor."""
    return StatePart(name=name, kind=TensorKind.DENSE, tensors={VALUE: to_record(value)})
