"""What the coordinator needs from the outside: a store, blobs, an engine for numerics, an authority."""

from glora_server.coordinator.ports.authority import (
    Authority,
    IssuedCertificate,
)
from glora_server.coordinator.ports.database import (
    Audit,
    Devices,
    Measurements,
    Outbox,
    Rounds,
    Runs,
    Store,
    Tokens,
    UnitOfWork,
    Uploads,
    Versions,
)
from glora_server.coordinator.ports.files import (
    Blobs,
)
from glora_server.coordinator.ports.numerics import (
    AggregatedPart,
    AggregateJob,
    CheckJob,
    CheckResult,
    Frozen,
    InitialiseJob,
    NumericsEngine,
    ReadoutVariant,
    RenderJob,
    StrategyChoice,
    StrategyInfo,
    UpdateRef,
    WorkerLostError,
)

__all__ = [
    "AggregateJob",
    "AggregatedPart",
    "Audit",
    "Authority",
    "Blobs",
    "CheckJob",
    "CheckResult",
    "Devices",
    "Frozen",
    "InitialiseJob",
    "IssuedCertificate",
    "Measurements",
    "NumericsEngine",
    "Outbox",
    "ReadoutVariant",
    "RenderJob",
    "Rounds",
    "Runs",
    "Store",
    "StrategyChoice",
    "StrategyInfo",
    "Tokens",
    "UnitOfWork",
    "UpdateRef",
    "Uploads",
    "Versions",
    "WorkerLostError",
]
