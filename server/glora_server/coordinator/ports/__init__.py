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
from glora_server.coordinator.ports.history import Answers, History, KeptAnswer, Lists
from glora_server.coordinator.ports.numerics import (
    AggregatedPart,
    AggregateJob,
    CheckJob,
    CheckResult,
    Frozen,
    InitialiseJob,
    NumericsEngine,
    OptionInfo,
    ReadoutVariant,
    RenderJob,
    StrategyChoice,
    StrategyInfo,
    UpdateRef,
    WorkerLostError,
)
from glora_server.coordinator.ports.people import (
    ApiTokens,
    Passwords,
    Sessions,
    Users,
)

__all__ = [
    "AggregateJob",
    "AggregatedPart",
    "Answers",
    "ApiTokens",
    "Audit",
    "Authority",
    "Blobs",
    "CheckJob",
    "CheckResult",
    "Devices",
    "Frozen",
    "History",
    "InitialiseJob",
    "IssuedCertificate",
    "KeptAnswer",
    "Lists",
    "Measurements",
    "NumericsEngine",
    "OptionInfo",
    "Outbox",
    "Passwords",
    "ReadoutVariant",
    "RenderJob",
    "Rounds",
    "Runs",
    "Sessions",
    "Store",
    "StrategyChoice",
    "StrategyInfo",
    "Tokens",
    "UnitOfWork",
    "UpdateRef",
    "Uploads",
    "Users",
    "Versions",
    "WorkerLostError",
]
