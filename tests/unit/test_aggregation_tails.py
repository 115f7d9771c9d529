"""What a rule adds to every device's upload, S − η·sent, against the dense difference in float64."""

import pytest
import torch
from torch import Tensor

from glora_server.aggregation import LayerState, canonical_state, readout
from glora_server.aggregation.fast import tails
from glora_server.aggregation.frame import Block
from glora_server.aggregation.state import ReadoutStyle

D, N, RANK = 130, 90, 12


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def held(*, rank: int = RANK, seed: int = 1, decay: float = -3.0) -> LayerState:
    u, v = (torch.linalg.qr(normal(size, rank, seed=seed + i)).Q for i, size in enumerate((D, N)))
    return canonical_state(u, (v * torch.logspace(0, decay, rank)).mT, rank=rank)


def cut(state: LayerState, rank: int, dtype: torch.dtype, style: ReadoutStyle = "balanced") -> Block:
    b, a = readout(state, rank, 0.5, style=style)
    return Block(left=b.to(dtype), right=a.to(dtype))


def difference(state: LayerState | None, sent: Block, gain: float) -> Tensor:
    product = gain * sent.left.double() @ sent.right.double()
    return -product if state is None else state.u.double() @ state.a.double() - product


def check(state: LayerState | None, sent: Block, gain: float, *, rank: int | None = None, within: float = 5e-7) -> None:
    """Relative to the largest term, of which the tail may be a small part."""
    tail = tails.tail_of([state], [sent], [gain])
    expected = difference(state, sent, gain)
    largest = 1.0 if state is None else float(state.sigma[0])
    found = (tail.u[0] * tail.sigma[0]) @ tail.vt[0]
    assert float((found - expected).norm()) <= within * largest
    one = torch.eye(tail.width, dtype=torch.float64)
    assert float((tail.u[0].mT @ tail.u[0] - one).abs().amax() if tail.width else 0.0) <= 1e-10
    product = gain * float((sent.left.double() @ sent.right.double()).norm())
    assert float(tail.sent_square) == pytest.approx(product**2, rel=1e-12)
    if rank is not None:
        assert tail.width == rank


@pytest.mark.parametrize("style", ["balanced", "a_orthonormal"])
@pytest.mark.parametrize("rank", [1, 4, RANK - 1])
def test_of_a_readout_only_the_other_directions_are_left(rank: int, style: ReadoutStyle) -> None:
    state = held()
    check(state, cut(state, rank, torch.float32, style), 0.5, rank=RANK - rank)


def test_nothing_is_left_of_a_full_readout() -> None:
    state = held()
    check(state, cut(state, RANK, torch.float32), 0.5, rank=0)


def test_a_step_of_less_than_one_leaves_some_of_every_direction() -> None:
    state = held()
    check(state, cut(state, 4, torch.float32), 0.25, rank=RANK)


def test_a_readout_in_another_gauge_is_no_different() -> None:
    state = held()
    block, turn = cut(state, 4, torch.float64), torch.linalg.qr(normal(4, 4, seed=5).double()).Q
    turned = Block(left=(block.left @ turn).float(), right=(turn.mT @ block.right).float())
    check(state, turned, 0.5, rank=RANK - 4)


@pytest.mark.parametrize("rank", [4, RANK, RANK + 3])
def test_rounding_of_a_coarse_wire_stays_in_the_tail(rank: int) -> None:
    state = held()
    check(state, cut(state, rank, torch.bfloat16), 0.5)


def test_what_has_nothing_to_do_with_the_state() -> None:
    state = held()
    check(state, Block(left=normal(D, 5, seed=8), right=normal(5, N, seed=9)), 0.01, rank=RANK + 5)
    check(None, Block(left=normal(D, 5, seed=8), right=normal(5, N, seed=9)), 0.01, rank=5)


def test_nearly_dependent_columns_go_through_a_qr_factorisation() -> None:
    left = normal(D, 3, seed=8)
    left = torch.cat([left, left[:, :1] + 1e-5 * normal(D, 1, seed=10)], dim=1)
    check(held(), Block(left=left, right=normal(4, N, seed=9)), 0.01, within=1e-6)


def test_modules_of_different_ranks_share_a_batch() -> None:
    states = [held(), held(rank=7, seed=20), None]
    sent = [cut(held(), 4, torch.float32), cut(held(rank=7, seed=20), 4, torch.float32)]
    sent.append(Block(left=normal(D, 4, seed=8), right=normal(4, N, seed=9)))
    tail = tails.tail_of(states, sent, [0.5, 0.5, 0.1])
    for i, (state, block, gain) in enumerate(zip(states, sent, [0.5, 0.5, 0.1], strict=True)):
        found = (tail.u[i] * tail.sigma[i]) @ tail.vt[i]
        assert float((found - difference(state, block, gain)).norm()) <= 5e-7 * max(1.0, float(found.norm()))
