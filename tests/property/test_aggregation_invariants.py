"""The invariants I1–I13 of GLoRA's aggregation, each against a dense float64 reference (tolerances are float64)."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from dense_reference import DenseRound, dense_round, dense_state, product, truncated
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from lora_cases import Case, cases, randn, random_update, regauged
from torch import Tensor

from glora_server.aggregation import ClientUpdate, LayerState, aggregate, canonical_state, readout

SUBSPACES = ("projector", "ridge", "energy", "mean")
RULES = ("replace", "delta", "frozen_tail", "accumulate")
SMALL_GAP = 1e-5

few = settings(max_examples=60, deadline=None)
# 1 − η of the state is left over where a device returns it changed; the dense reference squares what it sees for
# energies, so that it cannot tell less than 1e-7 of the largest from nothing.
steps = st.floats(0.1, 1.5).filter(lambda eta: eta == 1.0 or abs(1.0 - eta) > 1e-3)
subspaces = st.sampled_from(SUBSPACES)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> bool:
    scale = float(torch.linalg.matrix_norm(expected))
    return float(torch.linalg.matrix_norm(actual - expected)) <= tolerance * max(scale, 1e-300)


def replaced(updates: Sequence[ClientUpdate], case: Case, subspace: str) -> Tensor:
    result = aggregate("glora", None, updates, rank=case.rank, rule="replace", subspace=subspace)
    return dense_state(result.state)


def reference(updates: Sequence[ClientUpdate], case: Case, subspace: str) -> DenseRound:
    """The dense round; examples whose subspace is ambiguous (a closed eigengap) are thrown away."""
    dense = dense_round(updates, rank=case.rank, subspace=subspace)
    assume(dense.gap > SMALL_GAP)
    return dense


def state_of(case: Case, rank: int) -> LayerState:
    g = torch.Generator().manual_seed(case.seed + 1)
    return canonical_state(randn(g, case.d, rank), randn(g, rank, case.n), rank=rank)


@given(case=cases(), subspace=subspaces)
@few
def test_replace_agrees_with_the_dense_reference(case: Case, subspace: str) -> None:
    updates = case.updates()
    assert close(replaced(updates, case, subspace), reference(updates, case, subspace).s)


@given(
    case=cases(),
    subspace=subspaces,
    rule=st.sampled_from(RULES[1:]),
    held=st.integers(1, 6),
    eta=steps,
)
@few
def test_rules_with_a_state_agree_with_the_dense_reference(
    case: Case, subspace: str, rule: str, held: int, eta: float
) -> None:
    state = state_of(case, min(held, case.d, case.n))
    updates = [
        replace(update, sent=readout(state, update.rank, update.scale, seed=case.seed)) for update in case.updates()
    ]
    dense = dense_round(
        updates, rank=case.rank, subspace=subspace, rule="accumulate" if rule == "accumulate" else "delta",
        state=state, eta=eta,
    )  # fmt: skip
    assume(dense.gap > SMALL_GAP)
    result = aggregate("glora", state, updates, rank=case.rank, rule=rule, subspace=subspace, eta=eta)
    assert close(dense_state(result.state), dense.s)


@given(case=cases(), subspace=subspaces, condition=st.sampled_from((2.0, 100.0)))
@few
def test_i1_gauge_invariance(case: Case, subspace: str, condition: float) -> None:
    updates = case.updates()
    reference(updates, case, subspace)
    other = regauged(updates, case.generator(), condition)
    assert close(replaced(other, case, subspace), replaced(updates, case, subspace), 1e-8)


@given(case=cases(), subspace=subspaces)
@few
def test_float32_uploads_in_a_terrible_gauge_stay_within_1e5_of_float64(case: Case, subspace: str) -> None:
    updates = regauged(case.updates(torch.float32), case.generator(), 1e6)
    dense = dense_round(updates, rank=case.rank, subspace=subspace, rank_tol=1e-5)
    assume(dense.gap > 1e-3)
    state = aggregate("glora", None, updates, rank=case.rank, rule="replace", subspace=subspace).state
    assert state.u.dtype == torch.float32
    assert close(dense_state(state), dense.s, 1e-5)


@given(case=cases(), subspace=subspaces)
@few
def test_update_invariance_when_a_is_rank_deficient(case: Case, subspace: str) -> None:
    """(B + X, A) with X·A = 0 is the same update with another column space of B."""
    updates, other = [], []
    g = case.generator()
    for update in case.updates():
        a = update.a.clone()
        a[-1] = 0 if update.rank == 1 else a[0]
        null = torch.zeros(update.rank, 1, dtype=torch.float64)
        null[-1] = 1
        if update.rank > 1:
            null[0] = -1
        updates.append(replace(update, a=a))
        other.append(replace(update, a=a, b=update.b + randn(g, case.d, 1) @ null.T))
    reference(updates, case, subspace)
    assert torch.allclose(replaced(updates, case, subspace), replaced(other, case, subspace), rtol=0, atol=1e-8)


@given(case=cases(), subspace=subspaces)
@few
def test_i2_i3_state_is_the_projected_mean_in_an_orthonormal_canonical_frame(case: Case, subspace: str) -> None:
    updates = case.updates()
    dense = reference(updates, case, subspace)
    state = aggregate("glora", None, updates, rank=case.rank, rule="replace", subspace=subspace).state
    u, a = state.u, state.a
    assert torch.allclose(u.T @ u, torch.eye(state.rank, dtype=torch.float64), rtol=0, atol=1e-12)
    assert close(u @ (u.T @ dense.mean), dense.s)
    assert torch.allclose(a @ a.T, torch.diag(state.sigma**2), rtol=0, atol=1e-10 * float(state.sigma[0]) ** 2)
    assert bool((state.sigma[:-1] >= state.sigma[1:]).all())
    assert bool((u.gather(0, u.abs().argmax(dim=0, keepdim=True)) > 0).all())


@given(case=cases(), subspace=subspaces)
@few
def test_i4_exact_when_the_server_rank_covers_the_union_and_only_then(case: Case, subspace: str) -> None:
    updates = case.updates()
    dense = dense_round(updates, rank=case.d)
    covering = replace_rank(case, dense.union_rank)
    assert close(replaced(updates, covering, subspace), dense.mean)
    mean_rank = int(torch.linalg.matrix_rank(dense.mean))
    if mean_rank > 1:
        cut = replaced(updates, replace_rank(case, mean_rank - 1), subspace)
        assert not close(cut, dense.mean, 1e-9)


def replace_rank(case: Case, rank: int) -> Case:
    return replace(case, rank=rank)


@given(case=cases(), subspace=subspaces, data=st.data())
@few
def test_i5_order_weight_unit_and_place_of_the_scale_do_not_matter(
    case: Case, subspace: str, data: st.DataObject
) -> None:
    updates = case.updates()
    reference(updates, case, subspace)
    expected = replaced(updates, case, subspace)
    permuted = data.draw(st.permutations(updates))
    assert close(replaced(permuted, case, subspace), expected)
    heavier = [replace(u, weight=u.weight * 37.5) for u in updates]
    assert close(replaced(heavier, case, subspace), expected)
    in_b = [replace(u, b=u.b * u.scale, scale=1.0) for u in updates]
    in_a = [replace(u, a=u.a * u.scale, scale=1.0) for u in updates]
    assert close(replaced(in_b, case, subspace), expected)
    assert close(replaced(in_a, case, subspace), expected)


@given(case=cases(), subspace=subspaces)
@few
def test_i6_a_zero_upload_halves_the_state_and_has_no_vote(case: Case, subspace: str) -> None:
    updates = case.updates()
    dense = reference(updates, case, subspace)
    idle = random_update(case.generator(), case.d, case.n, 3)
    idle = replace(idle, b=torch.zeros_like(idle.b), weight=sum(u.weight for u in updates))
    result = aggregate("glora", None, [*updates, idle], rank=case.rank, rule="replace", subspace=subspace)
    assert close(dense_state(result.state), dense.s / 2)
    assert result.diagnostics.clients[-1].votes == 0


@given(case=cases(), style=st.sampled_from(("balanced", "a_orthonormal")), scale=st.floats(0.1, 8.0))
@few
def test_i7_i8_readouts_are_the_best_and_nest(case: Case, style: str, scale: float) -> None:
    state = aggregate("glora", None, case.updates(), rank=case.rank, rule="replace").state
    s = dense_state(state)
    sigma = torch.linalg.svdvals(s)
    top = float(sigma[0])
    previous: tuple[Tensor, Tensor] | None = None
    for rank in range(1, case.rank + 3):
        b, a = readout(state, rank, scale, seed=3, style="balanced" if style == "balanced" else "a_orthonormal")
        assert b.shape == (case.d, rank)
        assert a.shape == (rank, case.n)
        error = float(torch.linalg.matrix_norm(s - product(b, a, scale)))
        assert abs(error - float(torch.linalg.vector_norm(sigma[rank:]))) <= 2e-6 * top  # σ_j ≤ 1e-6·σ_1 is dead
        if rank < len(sigma) and float(sigma[rank - 1] - sigma[rank]) > 1e-4 * top:
            assert torch.allclose(product(b, a, scale), truncated(s, rank), rtol=0, atol=2e-6 * top)
        if previous is not None:
            assert torch.equal(b[:, :-1], previous[0])
            assert torch.equal(a[:-1], previous[1])
        previous = b, a


@given(case=cases(), subspace=subspaces)
@few
def test_i9_nothing_beats_the_mean_rule_and_the_mean_rule_is_optimal(case: Case, subspace: str) -> None:
    updates = case.updates()
    dense = dense_round(updates, rank=case.rank)
    best = float(torch.linalg.matrix_norm(dense.mean - truncated(dense.mean, case.rank)))
    size = float(torch.linalg.matrix_norm(dense.mean))
    result = aggregate("glora", None, updates, rank=case.rank, rule="replace", subspace=subspace)
    error = float(torch.linalg.matrix_norm(dense.mean - dense_state(result.state)))
    assert error >= best - 1e-10 * size
    assert abs(result.diagnostics.truncation_error * size - error) <= 1e-9 * size
    if subspace == "mean":
        assert error <= best + 1e-10 * size


@given(case=cases(), subspace=subspaces, copies=st.integers(1, 4))
@few
def test_i10_identical_clients_give_their_update(case: Case, subspace: str, copies: int) -> None:
    update = case.updates()[0]
    others = regauged([update] * copies, case.generator(), 50.0)
    wide = replace_rank(case, update.rank)
    assert close(replaced([update, *others], wide, subspace), product(update.b, update.a, update.scale))


@given(case=cases(), subspace=subspaces)
@few
def test_i11_rank_and_alpha_of_the_factors_do_not_matter(case: Case, subspace: str) -> None:
    """The same ΔW as (r, α) and, padded with zeros, as (4r, α): s is a quarter and B four times as large."""
    updates = case.updates()
    reference(updates, case, subspace)
    padded = [
        replace(
            u,
            b=torch.cat([4 * u.b, torch.zeros(case.d, 3 * u.rank, dtype=torch.float64)], dim=1),
            a=torch.cat([u.a, u.a.repeat(3, 1)]),
            scale=u.scale / 4,
        )
        for u in updates
    ]
    assert close(replaced(padded, case, subspace), replaced(updates, case, subspace))


@given(case=cases(), subspace=subspaces, rule=st.sampled_from(("delta", "frozen_tail")))
@few
def test_i12_untouched_readouts_leave_the_state_untouched(case: Case, subspace: str, rule: str) -> None:
    held = min(case.rank, case.d, case.n)
    state = state_of(case, held)
    updates = []
    for r in case.ranks:
        sent = readout(state, r, 0.5, seed=1)
        updates.append(ClientUpdate(*sent, 0.5, float(r), sent=sent))
    result = aggregate("glora", state, updates, rank=held, rule=rule, subspace=subspace)
    assert close(dense_state(result.state), dense_state(state))


@given(case=cases(max_rank=8))
@few
def test_i12_replace_shows_exactly_the_decay_by_coverage(case: Case) -> None:
    """Direction j is multiplied by w_j = Σ_{i: r_i ≥ j} p_i each round (ALGORITHMS §1.7)."""
    held = min(8, case.d, case.n)
    state = state_of(case, held)
    updates = [ClientUpdate(*readout(state, r, 0.5, seed=1), 0.5, float(k + 1)) for k, r in enumerate(case.ranks)]
    result = aggregate("glora", state, updates, rank=held, rule="replace")
    w = torch.tensor(result.diagnostics.coverage, dtype=torch.float64)
    assert close(dense_state(result.state), state.u @ torch.diag(w[:held]) @ state.a)


@given(case=cases(), subspace=subspaces, which=st.integers(0, 4))
@few
def test_i13_a_client_split_in_two_halves_changes_nothing(case: Case, subspace: str, which: int) -> None:
    updates = case.updates()
    reference(updates, case, subspace)
    half = replace(updates[which % len(updates)], weight=updates[which % len(updates)].weight / 2)
    split = [half if k == which % len(updates) else u for k, u in enumerate(updates)] + [half]
    assert close(replaced(split, case, subspace), replaced(updates, case, subspace), 1e-9)


@given(case=cases(max_rank=3), subspace=subspaces)
@few
def test_delta_equals_replace_when_every_device_holds_the_whole_state(case: Case, subspace: str) -> None:
    """sent_i = S, so X_i = ΔW_i: one default serves equal and mixed ranks (DESIGN §2)."""
    r = min(case.ranks)
    case = replace(case, ranks=(r,) * len(case.ranks), rank=r)
    state = state_of(case, r)
    updates = [replace(u, sent=readout(state, r, u.scale)) for u in case.updates()]
    reference(updates, case, subspace)
    delta = aggregate("glora", state, updates, rank=r, rule="delta", subspace=subspace)
    assert close(dense_state(delta.state), replaced(updates, case, subspace), 1e-9)


@pytest.mark.parametrize("subspace", SUBSPACES)
@pytest.mark.parametrize("wire", [torch.float32, torch.bfloat16, torch.float16])
def test_i12_holds_for_ten_rounds_over_a_coarse_wire(wire: torch.dtype, subspace: str) -> None:
    """Readouts of rank 4, 8, 16 come back untouched; the spectrum of S reaches far below the rounding of the wire."""
    g = torch.Generator().manual_seed(7)
    left, right = (torch.linalg.qr(randn(g, rows, 16)).Q for rows in (48, 40))
    sigma = torch.logspace(0, -3, 16, dtype=torch.float64)
    start = canonical_state((left * sigma).float(), right.T.float(), rank=16)
    state = start
    for version in range(10):
        sent = [tuple(t.to(wire) for t in readout(state, r, 0.5, version=version)) for r in (4, 8, 16)]
        updates = [ClientUpdate(b, a, 0.5, 1.0, sent=(b, a)) for b, a in sent]
        state = aggregate("glora", state, updates, rank=16, subspace=subspace).state
    assert state.rank == 16
    assert close(dense_state(state), dense_state(start), 3e-6)
    for column, other in pairwise([start.sigma, state.sigma]):
        assert torch.allclose(column, other, rtol=1e-3)
