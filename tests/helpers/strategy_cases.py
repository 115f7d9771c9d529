"""Rounds that abide by each strategy's client contract, drawn from seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from lora_cases import invertible, randn
from torch import Tensor

from glora_server.aggregation import (
    STRATEGIES,
    AggregationResult,
    ClientUpdate,
    LayerState,
    OptionValue,
    TrainMask,
    UploadSet,
    aggregate_with_options,
    check_options,
    empty_state,
    readout,
)

D, N = 20, 16

EQUAL = (4, 4, 4)
MIXED = (2, 4, 3)

START_RULE: Mapping[str, Mapping[str, OptionValue]] = {"glora": {"rule": "replace"}}
"""Options that let a strategy work on uploads alone."""


def ranks_of(name: str) -> tuple[int, ...]:
    return MIXED if STRATEGIES[name].properties.mixed_ranks else EQUAL


def contract_round(
    name: str,
    *,
    seed: int = 0,
    ranks: Sequence[int] | None = None,
    state: LayerState | None = None,
    round_index: int = 0,
    d: int = D,
    n: int = N,
    dtype: torch.dtype = torch.float64,
    both: bool = True,
) -> list[ClientUpdate]:
    """Trained updates of one round; the factor that the contract freezes is the delivered one.

    `both` False leaves out what the contract does not upload, as on the wire.
    """
    g = torch.Generator().manual_seed(seed)
    held = empty_state(d, n, strategy=name, dtype=dtype) if state is None else state
    contract = STRATEGIES[name].contract(check_options(name, START_RULE.get(name, {})), round_index=round_index)
    updates = []
    for r in ranks if ranks is not None else ranks_of(name):
        scale = 0.5 + 2 * float(torch.rand(1, generator=g))
        weight = float(torch.randint(1, 101, (1,), generator=g))
        b0, a0 = (part.to(dtype) for part in readout(held, r, scale, seed=5, module="m"))
        b = b0 if contract.train is TrainMask.A else randn(g, d, r).to(dtype)
        a = a0 if contract.train is TrainMask.B else randn(g, r, n).to(dtype)
        if not both and contract.upload is UploadSet.B:
            updates.append(ClientUpdate.only_b(b, scale, weight, in_features=n, sent=(b0, a0)))
        elif not both and contract.upload is UploadSet.A:
            updates.append(ClientUpdate.only_a(a, scale, weight, out_features=d, sent=(b0, a0)))
        else:
            updates.append(ClientUpdate(b, a, scale, weight, sent=(b0, a0)))
    return updates


def fold(
    name: str,
    updates: Sequence[ClientUpdate],
    *,
    state: LayerState | None = None,
    rank: int = 12,
    round_index: int = 0,
    options: Mapping[str, OptionValue] | None = None,
    **more: OptionValue,
) -> AggregationResult:
    """`aggregate` with options that need no history unless others are given."""
    given = {**START_RULE.get(name, {}), **(options or {}), **more}
    return aggregate_with_options(name, state, updates, rank=rank, options=given, round_index=round_index)


def model(state: LayerState) -> Tensor:
    """The global model that the state stands for, densely: u·a and the tail beyond rank R."""
    dense: Tensor = state.u.double() @ state.a.double()
    if "tail_b" in state.extra:
        dense = dense + state.extra["tail_b"].double() @ state.extra["tail_a"].double()
    return dense


def orthogonally_regauged(updates: Sequence[ClientUpdate], g: torch.Generator) -> list[ClientUpdate]:
    """(BQ, QᵀA) with Q ∈ O(r), half of them reflections."""
    return [replace(u, b=u.b @ q, a=q.T @ u.a) for u, q in ((u, invertible(g, u.rank, 1.0)) for u in updates)]
