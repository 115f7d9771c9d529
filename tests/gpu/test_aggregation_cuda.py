"""Aggregation on a CUDA device gives what the CPU gives, and stays on the device."""

from dataclasses import replace

import pytest
import torch
from dense_reference import dense_state
from lora_cases import random_update

from glora_server.aggregation import ClientUpdate, LayerState, aggregate, readout

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, torch sees none"),
]


def on_gpu(update: ClientUpdate) -> ClientUpdate:
    sent = None if update.sent is None else (update.sent[0].cuda(), update.sent[1].cuda())
    return replace(update, b=update.b.cuda(), a=update.a.cuda(), sent=sent)


def state_on_gpu(state: LayerState) -> LayerState:
    return replace(state, u=state.u.cuda(), a=state.a.cuda(), sigma=state.sigma.cuda())


@pytest.mark.parametrize("subspace", ["projector", "ridge", "energy", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_cuda_agrees_with_cpu(dtype: torch.dtype, subspace: str) -> None:
    g = torch.Generator().manual_seed(0)
    first = [random_update(g, 256, 192, r, dtype=dtype) for r in (4, 8, 16)]
    start = aggregate("glora", None, first, rank=16, rule="replace").state
    updates = []
    for update in [random_update(g, 256, 192, r, dtype=dtype) for r in (4, 8, 16)]:
        b, a = readout(start, update.rank, update.scale)
        updates.append(replace(update, sent=(b.to(dtype), a.to(dtype))))
    cpu = aggregate("glora", start, updates, rank=16, subspace=subspace).state
    gpu = aggregate("glora", state_on_gpu(start), [on_gpu(u) for u in updates], rank=16, subspace=subspace).state
    assert gpu.u.is_cuda
    assert gpu.a.is_cuda
    difference = dense_state(gpu).cpu() - dense_state(cpu)
    assert float(difference.norm() / dense_state(cpu).norm()) < (1e-9 if dtype == torch.float64 else 1e-5)


def test_refilled_rows_are_the_same_on_every_device() -> None:
    g = torch.Generator().manual_seed(1)
    state = aggregate("glora", None, [random_update(g, 64, 48, 2)], rank=4, rule="replace").state
    cpu, gpu = readout(state, 4, 1.0, seed=3), readout(state_on_gpu(state), 4, 1.0, seed=3)
    assert torch.allclose(cpu[1], gpu[1].cpu(), atol=1e-12)


def test_fedit_runs_on_cuda() -> None:
    g = torch.Generator().manual_seed(2)
    updates = [random_update(g, 64, 48, r) for r in (2, 4)]
    cpu = aggregate("fedit", None, updates, rank=4).state
    gpu = aggregate("fedit", None, [on_gpu(u) for u in updates], rank=4).state
    assert gpu.extra["b"].is_cuda
    assert torch.allclose(dense_state(cpu), dense_state(gpu).cpu(), atol=1e-9)
