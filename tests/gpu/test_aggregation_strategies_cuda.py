"""Every strategy on a CUDA device gives what the CPU gives, over two rounds, and stays on the device."""

from dataclasses import replace

import pytest
import torch
from strategy_cases import contract_round, fold, model

from glora_server.aggregation import STRATEGIES, ClientUpdate, LayerState, readout

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, torch sees none"),
]


def on_gpu(update: ClientUpdate) -> ClientUpdate:
    sent = None if update.sent is None else (update.sent[0].cuda(), update.sent[1].cuda())
    return replace(update, b=update.b.cuda(), a=update.a.cuda(), sent=sent)


def tensors(state: LayerState) -> dict[str, torch.Tensor]:
    return {"u": state.u, "a": state.a, "sigma": state.sigma, **state.extra}


@pytest.mark.parametrize("name", sorted(STRATEGIES))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_cuda_agrees_with_cpu(name: str, dtype: torch.dtype) -> None:
    cpu: LayerState | None = None
    gpu: LayerState | None = None
    tolerance = 1e-8 if dtype == torch.float64 else 1e-4
    for t in range(2):
        updates = contract_round(name, seed=t, state=cpu, round_index=t, dtype=dtype, both=False)
        cpu = fold(name, updates, state=cpu, round_index=t).state
        gpu = fold(name, [on_gpu(u) for u in updates], state=gpu, round_index=t).state
        assert all(value.is_cuda for value in tensors(gpu).values())
        assert torch.allclose(model(gpu).cpu(), model(cpu), atol=tolerance * (1 + float(model(cpu).norm())))
        for one, two in zip(readout(gpu, 4, 0.5, seed=5), readout(cpu, 4, 0.5, seed=5), strict=True):
            assert one.is_cuda
            assert torch.allclose(one.cpu(), two, atol=1e-2 if dtype == torch.float32 else 1e-6)
        merge = STRATEGIES[name].merge(gpu)
        assert merge is None or merge.left.is_cuda
