"""The factor that devices share and do not train: who knows it, and that nobody changed it."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from glora_server.aggregation.errors import ContractError
from glora_server.aggregation.factors import COMPUTE_DTYPE, ClientUpdate, default_rank_tol
from glora_server.aggregation.state import LayerState, RefillKey
from glora_server.aggregation.strategies.averages import kept, started


def first_key(key: RefillKey) -> RefillKey:
    """The key of version 0: factors that are common to all rounds must not depend on the version."""
    return replace(key, version=0)


def common_a(state: LayerState | None, updates: Sequence[ClientUpdate]) -> Tensor:
    """The frozen A (k×n, float64) of which every device has the first r_i rows, k the longest that is known.

    Taken from what was sent (exact to the bit of the wire), else from the state, else from the uploads of the first
    round. Raises ContractError when nobody knows it or an upload has another one.
    """
    known = [update.sent[1] for update in updates if update.sent is not None]
    if state is not None and started(state):
        known.append(kept(state, "a"))
    if not known:
        known = [update.a for update in updates if update.has_a]
    found = _longest(known, what="A")
    tolerance = default_rank_tol(updates[0].a.dtype)
    for position, update in enumerate(updates):
        if update.rank > found.shape[0] or (update.has_a and not _agrees(update.a, found[: update.rank], tolerance)):
            raise _not_common("A", position)
    return found


def common_b(state: LayerState | None, updates: Sequence[ClientUpdate]) -> Tensor:
    """The frozen B with its scale folded in (d×r, float64), all devices of one rank; sources as in `common_a`."""
    known = [update.sent[0].to(COMPUTE_DTYPE) * _sent_scale(update) for update in updates if update.sent is not None]
    if state is not None and started(state):
        known.append(kept(state, "b"))
    if not known:
        known = [update.b.to(COMPUTE_DTYPE) * update.scale for update in updates if update.has_b]
    found = _longest([part.mT for part in known], what="B").mT
    tolerance = default_rank_tol(updates[0].b.dtype)
    for position, update in enumerate(updates):
        own = update.b.to(COMPUTE_DTYPE) * _sent_scale(update)
        if update.rank > found.shape[1] or (update.has_b and not _agrees(own, found[:, : update.rank], tolerance)):
            raise _not_common("B", position)
    return found


def with_a(updates: Sequence[ClientUpdate], a: Tensor) -> list[ClientUpdate]:
    """The updates with the common A in place of their own, in float64."""
    return [replace(update, b=update.b.to(COMPUTE_DTYPE), a=a[: update.rank], sent=None) for update in updates]


def _sent_scale(update: ClientUpdate) -> float:
    return update.scale if update.sent_scale is None else update.sent_scale


def _longest(known: Sequence[Tensor], *, what: str) -> Tensor:
    """The first of the known ones, continued by the rows that only longer ones have."""
    if not known:
        raise ContractError(
            f"No update has the factor {what} that is common to all devices, and the state does not know it yet; "
            "pass sent=(b0, a0) as rendered."
        )
    found = known[0].to(COMPUTE_DTYPE)
    for other in known[1:]:
        if other.shape[0] > found.shape[0]:
            found = torch.cat([found, other[found.shape[0] :].to(COMPUTE_DTYPE)])
    return found


def _agrees(own: Tensor, common: Tensor, tolerance: float) -> bool:
    size = float(common.abs().max())
    return float((own.to(COMPUTE_DTYPE) - common).abs().max()) <= tolerance * size


def _not_common(factor: str, position: int) -> ContractError:
    return ContractError(
        f"Update {position} has a factor {factor} of its own, which was to stay frozen and common to all devices in "
        "this round; reject it and check that the device follows its contract."
    )
