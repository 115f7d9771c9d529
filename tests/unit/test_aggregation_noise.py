"""Noise of the wire, of float64 and of bad gauges gets no vote, and untouched adapters change nothing."""

import pytest
import torch
from dense_reference import dense_state, product
from lora_cases import randn, regauged

from glora_server.aggregation import ClientUpdate, aggregate, canonical_state, readout


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("wire", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_of_the_wire_gets_no_vote_when_state_and_sent_cancel(wire: torch.dtype) -> None:
    """r = R and sent = S rounded: X_i = ΔW_i plus noise of the wire, and only the r directions of ΔW_i may vote."""
    g = generator(1)
    left, right = (torch.linalg.qr(randn(g, rows, 4)).Q for rows in (40, 30))
    state = canonical_state(left.float(), right.T.float(), rank=4)
    b, a = (t.to(wire) for t in readout(state, 4, 0.5))
    moved = ClientUpdate(
        (b + 0.5 * torch.randn(b.shape, generator=g)).to(wire), (a + 0.5 * torch.randn(a.shape, generator=g)).to(wire),
        0.5, 1.0, sent=(b, a),
    )  # fmt: skip
    result = aggregate("glora", state, [moved], rank=12)
    assert result.diagnostics.clients[0].votes == 4
    assert result.state.rank == 4


def test_a_single_coarse_bit_of_noise_would_vote_without_the_tolerance() -> None:
    """The counterpart of the test above: with the tolerance forced to nothing, the noise does vote."""
    g = generator(1)
    state = canonical_state(randn(g, 40, 4).float(), randn(g, 4, 30).float(), rank=4)
    b, a = (t.to(torch.bfloat16) for t in readout(state, 4, 0.5))
    moved = ClientUpdate((b + torch.randn(b.shape, generator=g)).to(torch.bfloat16), a, 0.5, 1.0, sent=(b, a))
    result = aggregate("glora", state, [moved], rank=12, rank_tol=1e-12)
    votes = result.diagnostics.clients[0].votes
    assert votes is not None
    assert votes > 4


def test_a_device_that_unlearned_everything_has_no_vote() -> None:
    """ΔW_i = 0 and sent = S rounded: X_i is the noise of the wire and nothing else, small against its terms."""
    g = generator(1)
    state = canonical_state(randn(g, 40, 4), randn(g, 4, 30), rank=4)
    b, a = (t.float() for t in readout(state, 4, 0.5))
    result = aggregate("glora", state, [ClientUpdate(torch.zeros_like(b), a, 0.5, 1.0, sent=(b, a))], rank=12)
    assert result.diagnostics.clients[0].votes == 0
    assert result.state.rank == 0


def test_the_same_adapter_in_a_terrible_gauge_counts_as_untouched() -> None:
    """Rounding of float64 in a gauge of condition 1e8 is far above rank_tol and must not vote.

    The adapter has more directions than the state: noise on zero columns meets refilled rows and would be new.
    """
    g = generator(3)
    state = canonical_state(randn(g, 40, 4), randn(g, 4, 30), rank=4)
    sent = readout(state, 8, 0.5)
    back = regauged([ClientUpdate(*sent, 0.5, 1.0, sent=sent)], g, 1e8)
    result = aggregate("glora", state, back, rank=12)
    assert result.diagnostics.clients[0].votes == 4
    assert torch.allclose(dense_state(result.state), dense_state(state), atol=1e-6)


def test_an_untouched_device_does_not_undo_what_another_learned() -> None:
    g = generator(4)
    state = canonical_state(randn(g, 30, 6).float(), randn(g, 6, 20).float(), rank=6)
    sent2, sent6 = readout(state, 2, 1.0), readout(state, 6, 1.0)
    learned = ClientUpdate(sent6[0] + 0.3 * torch.randn(30, 6, generator=g), sent6[1], 1.0, 1.0, sent=sent6)
    idle = ClientUpdate(*sent2, 1.0, 1.0, sent=sent2)
    new = aggregate("glora", state, [learned, idle], rank=12).state
    expected = dense_state(state) + (product(learned.b, learned.a) - product(*sent6)) / 2
    assert torch.allclose(dense_state(new), expected, atol=1e-4)


def test_an_untouched_adapter_is_reported_as_no_change() -> None:
    g = generator(4)
    state = canonical_state(randn(g, 30, 6).float(), randn(g, 6, 20).float(), rank=6)
    sent = readout(state, 3, 1.0)
    moved = ClientUpdate(sent[0] + 0.1, sent[1], 1.0, 1.0, sent=sent)
    seen = aggregate("glora", state, [ClientUpdate(*sent, 1.0, 1.0, sent=sent), moved], rank=6).diagnostics.clients
    assert (seen[0].change_norm, seen[0].change_cosine) == (0.0, 0.0)
    assert seen[0].update_norm == pytest.approx(float(product(*sent).norm()))
    assert seen[1].change_cosine == pytest.approx(1.0)
