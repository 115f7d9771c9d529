"""Random matrices from fixed seeds: where an iteration starts, and what diagnostics are estimated with."""

from functools import lru_cache

import torch
from torch import Tensor

from glora_server.aggregation.fast.devices import Shape

PROBES = 16


@lru_cache(maxsize=8)
def gaussian(rows: int, columns: int, *, seed: int) -> Tensor:
    """Standard normal numbers (float32), drawn once for all modules of a shape; not to be written to.

    On the CPU whatever the device of a round, so that every machine has the same ones.
    """
    return torch.randn((rows, columns), generator=torch.Generator().manual_seed(seed))


def probes(sizes: Shape, device: torch.device) -> Tensor:
    """Ω (n×k), k = 16, float32, for each module: the columns on which uploads are looked at; not to be written to."""
    return gaussian(PROBES, sizes.n, seed=1).to(device).expand(sizes.modules, -1, -1).mT
