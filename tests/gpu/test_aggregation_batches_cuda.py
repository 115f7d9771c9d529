"""Modules computed in one batch on a CUDA device against the CPU and against a loop over them on the same device."""

import time
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from dense_reference import dense_state
from lora_cases import randn
from torch import Tensor

from glora_server.aggregation import (
    AggregationResult,
    ClientUpdate,
    LayerState,
    OptionValue,
    aggregate_many,
    canonical_state,
    readout,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, torch sees none"),
]

RANK = 8
SHAPES = [(112, 48), (112, 48), (128, 40), (112, 48)]


def start_state(seed: int, d: int, n: int) -> LayerState:
    g = torch.Generator().manual_seed(seed)
    return canonical_state(randn(g, d, RANK).float(), 0.1 * randn(g, RANK, n).float(), rank=RANK)


def uploads(seed: int, state: LayerState, count: int, dtype: torch.dtype = torch.float32) -> list[ClientUpdate]:
    d, n = state.u.shape[0], state.a.shape[1]
    g = torch.Generator().manual_seed(100 + seed)
    sent = tuple(factor.to(dtype) for factor in readout(state, 4, 0.5))
    return [
        ClientUpdate(
            (sent[0] + 0.3 * randn(g, d, 4)).to(dtype),
            (sent[1] + 0.3 * randn(g, 4, n)).to(dtype),
            0.5,
            float(1 + i % 3),
            sent=(sent[0], sent[1]),
        )
        for i in range(count)
    ]


def on_gpu(updates: Sequence[ClientUpdate]) -> list[ClientUpdate]:
    moved: dict[int, tuple[Tensor, Tensor]] = {}
    found = []
    for update in updates:
        assert update.sent is not None
        sent = moved.setdefault(id(update.sent[0]), (update.sent[0].cuda(), update.sent[1].cuda()))
        found.append(replace(update, b=update.b.cuda(), a=update.a.cuda(), sent=sent))
    return found


def state_on_gpu(state: LayerState) -> LayerState:
    return replace(state, u=state.u.cuda(), a=state.a.cuda(), sigma=state.sigma.cuda())


def relative(actual: Tensor, expected: Tensor) -> float:
    return float(torch.linalg.matrix_norm(actual - expected) / torch.linalg.matrix_norm(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [3, 40], ids=["gram", "krylov"])
@pytest.mark.parametrize("rule", ["replace", "delta"])
@pytest.mark.parametrize("subspace", ["projector", "ridge", "energy", "mean"])
def test_a_batch_agrees_with_the_cpu_and_with_a_loop(subspace: str, rule: str, count: int, dtype: torch.dtype) -> None:
    """By default the CUDA call is batched and the CPU call is not."""
    options: dict[str, OptionValue] = {"accuracy": "fast", "subspace": subspace, "rule": rule}
    states = [start_state(seed, *shape) for seed, shape in enumerate(SHAPES)]
    updates = [uploads(seed, state, count, dtype) for seed, state in enumerate(states)]
    cpu = aggregate_many("glora", states, updates, rank=RANK, options=options)
    there = [state_on_gpu(state) for state in states], [on_gpu(of_module) for of_module in updates]
    batch = aggregate_many("glora", *there, rank=RANK, options=options)
    loop = aggregate_many("glora", *there, rank=RANK, options=options, batched=False)
    tolerance = 1e-4 if count == 3 else 2e-2
    for one, other, third in zip(cpu, batch, loop, strict=True):
        assert other.state.u.is_cuda
        assert other.state.a.is_cuda
        assert relative(dense_state(other.state).cpu(), dense_state(one.state)) <= tolerance
        assert relative(dense_state(other.state), dense_state(third.state)) <= tolerance
        for first, second in zip(one.diagnostics.clients, other.diagnostics.clients, strict=True):
            assert first.votes == second.votes
            assert first.update_norm == pytest.approx(second.update_norm, rel=1e-3)


def test_two_batches_of_the_same_inputs_agree_bit_for_bit() -> None:
    states = [start_state(seed, *shape) for seed, shape in enumerate(SHAPES)]
    updates = [on_gpu(uploads(seed, state, 40)) for seed, state in enumerate(states)]
    there = [state_on_gpu(state) for state in states]
    first, second = (aggregate_many("glora", there, updates, rank=RANK, options={"accuracy": "fast"}) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.state.u, other.state.u)
        assert torch.equal(one.state.a, other.state.a)


def seconds(states: list[LayerState], updates: list[list[ClientUpdate]], *, batched: bool) -> float:
    best = float("inf")
    for _ in range(3):
        torch.cuda.synchronize()
        started = time.perf_counter()
        results: tuple[AggregationResult, ...] = aggregate_many(
            "glora", states, updates, rank=32, options={"accuracy": "fast"}, batched=batched
        )
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
        assert len(results) == len(updates)
    return best


def test_a_batch_is_faster_than_a_loop() -> None:
    d, n, modules = 1024, 1024, 16
    states = [start_state(seed, d, n) for seed in range(modules)]
    updates = [on_gpu(uploads(seed, state, 16)) for seed, state in enumerate(states)]
    there = [state_on_gpu(state) for state in states]
    assert 2 * seconds(there, updates, batched=True) < seconds(there, updates, batched=False)
