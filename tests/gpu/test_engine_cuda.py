from pathlib import Path

import engine_cases as cases
import pytest
import torch

from glora_server.coordinator.model import StatePart
from glora_server.coordinator.ports import AggregateJob
from glora_server.engines.local import LocalEngine
from glora_server.engines.states import module_state
from glora_server.engines.tensors import from_record

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


async def folded(device: str, folder: Path) -> tuple[StatePart, ...]:
    engine = LocalEngine(device=device, threads=1)
    try:
        parts = await engine.initialise(cases.initial(8))
        updates = []
        for rank in (2, 4, 8):
            sent = cases.header_only(folder / f"r{rank}.sent", rank)
            await engine.render(cases.rendering(sent, parts, rank, version=0))
            path = cases.trained(sent, folder / f"r{rank}", rank)
            updates.append(cases.update_of(path, sent, float(rank), digest=f"{rank}"))
            # On the GPU the factors stay there from here on.
            assert (await engine.check(cases.check_of(updates[-1], rank))).refusal is None
        job: AggregateJob = cases.folding(parts, tuple(updates))
        assert engine.device.startswith("cpu" if device == "cpu" else "cuda")
        return tuple(item.part for item in await engine.aggregate(job))
    finally:
        await engine.close()


async def test_round_on_the_gpu_equals_the_round_on_the_processor(tmp_path: Path) -> None:
    slow = await folded("cpu", tmp_path)
    fast = await folded("auto", tmp_path)
    for one, other in zip(slow[:-1], fast[:-1], strict=True):
        wanted, found = (module_state(part, strategy="glora", device=cases.CPU) for part in (one, other))
        assert torch.allclose(found.u @ found.a, wanted.u @ wanted.a, atol=1e-5)
    heads = [from_record(parts[-1].tensors["value"], cases.CPU) for parts in (slow, fast)]
    assert torch.allclose(heads[0], heads[1])
