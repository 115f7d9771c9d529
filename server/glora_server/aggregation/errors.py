"""What can be wrong with an aggregation's input, each with a stable reason and a sentence for people."""

from typing import ClassVar


class AggregationError(Exception):
    """Something the aggregation refuses; `reason` is stable, the text says what was wrong and what to do."""

    reason: ClassVar[str] = "AGGREGATION_FAILED"


class EmptyUpdatesError(AggregationError):
    """There was no update to aggregate."""

    reason = "NO_UPDATES"


class ShapeError(AggregationError):
    """Factors do not fit one another, the state or the other updates."""

    reason = "SHAPE_MISMATCH"


class DtypeError(AggregationError):
    """Factors are not floating point, or the updates of one round mix dtypes."""

    reason = "DTYPE_MISMATCH"


class DeviceError(AggregationError):
    """Tensors of one aggregation lie on different devices."""

    reason = "DEVICE_MISMATCH"


class NonFiniteError(AggregationError):
    """A factor holds NaN or an infinity, or numbers so large that results would."""

    reason = "NON_FINITE"


class WeightError(AggregationError):
    """A weight is negative or not finite, or all weights are zero."""

    reason = "BAD_WEIGHT"


class ScaleError(AggregationError):
    """A LoRA scale is not a positive finite number."""

    reason = "BAD_SCALE"


class RankError(AggregationError):
    """A rank is below one, or above what the strategy can take."""

    reason = "BAD_RANK"


class MissingSentError(AggregationError):
    """A delta rule was asked for, but an update does not carry the factors that its device was sent."""

    reason = "MISSING_SENT"


class ContractError(AggregationError):
    """An update is not what its contract asks for: a factor is missing, or a common one was changed."""

    reason = "BAD_CONTRACT"


class UnknownStrategyError(AggregationError):
    """No strategy has that name."""

    reason = "UNKNOWN_STRATEGY"


class OptionError(AggregationError):
    """A strategy does not know an option, or cannot take its value."""

    reason = "BAD_OPTION"


class MixedRanksError(AggregationError):
    """The plan mixes ranks and the strategy needs one rank for all."""

    reason = "MIXED_RANKS"


class StateError(AggregationError):
    """The state lacks something that its strategy keeps there."""

    reason = "BAD_STATE"


class ConvergenceError(AggregationError):
    """A singular value decomposition did not converge."""

    reason = "NO_CONVERGENCE"
