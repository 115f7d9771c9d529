"""Federated aggregation of LoRA updates, one module at a time: pure functions of tensors.

`aggregate` folds a round's updates into a `LayerState`, `readout` hands it out at any rank, `STRATEGIES` lists the
ways to do it, `dense_average` is for tensors that are not LoRA factors. Nothing here forms a matrix larger than the
uploads, reads a clock, file or setting.
"""

from glora_server.aggregation.api import (
    aggregate,
    aggregate_many,
    aggregate_with_options,
    check_options,
    readout,
)
from glora_server.aggregation.dense import dense_average
from glora_server.aggregation.diagnostics import ClientDiagnostics, Diagnostics, PrincipalAngles
from glora_server.aggregation.errors import AggregationError
from glora_server.aggregation.factors import ClientUpdate, all_finite, delta_inner, delta_norm, gauge_fix, spectral_norm
from glora_server.aggregation.state import LayerState, ReadoutStyle, canonical_state, empty_state, frozen_factors
from glora_server.aggregation.strategies import STRATEGIES, find_strategy
from glora_server.aggregation.strategies.base import (
    AggregationResult,
    ClientContract,
    InitSource,
    MergeInstruction,
    Properties,
    Strategy,
    TrainMask,
    UploadSet,
    Volume,
)
from glora_server.aggregation.strategies.options import ChoiceOption, NumberOption, Option, OptionValue, RanksOption

__all__ = [
    "STRATEGIES",
    "AggregationError",
    "AggregationResult",
    "ChoiceOption",
    "ClientContract",
    "ClientDiagnostics",
    "ClientUpdate",
    "Diagnostics",
    "InitSource",
    "LayerState",
    "MergeInstruction",
    "NumberOption",
    "Option",
    "OptionValue",
    "PrincipalAngles",
    "Properties",
    "RanksOption",
    "ReadoutStyle",
    "Strategy",
    "TrainMask",
    "UploadSet",
    "Volume",
    "aggregate",
    "aggregate_many",
    "aggregate_with_options",
    "all_finite",
    "canonical_state",
    "check_options",
    "delta_inner",
    "delta_norm",
    "dense_average",
    "empty_state",
    "find_strategy",
    "frozen_factors",
    "gauge_fix",
    "readout",
    "spectral_norm",
]
