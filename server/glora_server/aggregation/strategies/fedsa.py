r"""FedSA-LoRA: A is averaged, B stays on the device. There is no single global model.

.. math:: \bar A = \Sigma p_iA_i,\qquad W_i = W_0 + s_iB_i\bar A

B is *absent* from an update, not zero. Each device has a model of its own, so the state's u, a, sigma are empty;
diagnostics speak about the A_i themselves.

O(Nrn). Source: ICLR 2025, Pengxin-Guo/FedSA-LoRA.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from typing_extensions import override

from glora_server.aggregation.factors import COMPUTE_DTYPE, ClientUpdate, normalised_weights, state_dtype
from glora_server.aggregation.frame import Coordinates
from glora_server.aggregation.state import LayerState, ReadoutStyle, RefillKey, check_readout, empty_state, refill_rows
from glora_server.aggregation.strategies.averages import (
    averaged_a,
    equal_rank,
    kept,
    spectral_result,
    started,
    update_terms,
)
from glora_server.aggregation.strategies.base import (
    ONLY_A,
    AggregationResult,
    ClientContract,
    Properties,
    Strategy,
    UploadSet,
)
from glora_server.aggregation.strategies.common_factor import first_key
from glora_server.aggregation.strategies.options import Option, OptionValue


class Fedsa(Strategy):
    """The strategy `fedsa`; `extra` holds a (r×n), the mean of the A_i as they are (scales stay with the devices)."""

    name = "fedsa"
    summary = "A averaged, B kept by each device: personal models over shared A, one rank for all"
    properties = Properties(
        gauge_invariant=False,
        exact=False,
        mixed_ranks=False,
        up=ONLY_A,
        down=ONLY_A,
        cost="O(Nrn)",
        source="FedSA-LoRA (ICLR 2025)",
        note="no global model; B never leaves the device",
    )
    options: tuple[Option, ...] = ()

    @override
    def contract(self, options: Mapping[str, OptionValue], *, round_index: int = 0) -> ClientContract:
        """Both factors are trained, A comes back, B stays."""
        return ClientContract(upload=UploadSet.A, keeps_b=True)

    @override
    def aggregate(
        self,
        state: LayerState | None,
        updates: Sequence[ClientUpdate],
        *,
        rank: int,
        round_index: int,
        options: Mapping[str, OptionValue],
    ) -> AggregationResult:
        """Ā in `extra`, and the zero state beside it; a B that was uploaded all the same is not looked at."""
        r = equal_rank(updates, rank=rank, name=self.name)
        weights = normalised_weights([update.weight for update in updates])
        eye = torch.eye(r, dtype=COMPUTE_DTYPE, device=updates[0].a.device)
        alone = [replace(u, b=eye, a=u.a.to(COMPUTE_DTYPE), scale=1.0, sent=None, sent_scale=None) for u in updates]
        terms = update_terms(alone, weights)
        target: Coordinates = terms.frame.coordinates(terms.mean())
        seen = spectral_result(self.name, terms, target, alone, previous=None, rank=r, exact=True).diagnostics
        out_features, in_features = updates[0].b.shape[0], updates[0].a.shape[1]
        dtype = state_dtype(updates[0].a.dtype)
        zero = empty_state(out_features, in_features, strategy=self.name, dtype=dtype, device=updates[0].a.device)
        mean = averaged_a(alone, weights, r, power=0.0).to(dtype)
        return AggregationResult(state=replace(zero, extra={"a": mean}), diagnostics=seen)

    @override
    def readout(
        self, state: LayerState, rank: int, scale: float, *, key: RefillKey, style: ReadoutStyle
    ) -> tuple[Tensor, Tensor]:
        """(0, Ā): the device puts its own B in place of the zeros. Before the first round, and for rows that nobody
        has trained, A has seeded rows that are the same for all devices.
        """
        check_readout(rank, scale)
        b = state.u.new_zeros((state.u.shape[0], rank))
        a = refill_rows(b.new_zeros((0, state.a.shape[1]), dtype=COMPUTE_DTYPE), first=0, last=rank, key=first_key(key))
        if started(state):
            mean = kept(state, "a").to(COMPUTE_DTYPE)[:rank]
            a[: mean.shape[0]] = mean
        return b, a.to(b.dtype)
