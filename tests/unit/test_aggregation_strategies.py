"""What strategies declare and do beyond the invariants: fedit as the contrast, cost, noise of the wire, diagnostics."""

import math
from dataclasses import replace

import pytest
import torch
from dense_reference import dense_round, dense_state, product
from lora_cases import randn, random_update, regauged
from torch.utils._python_dispatch import TorchDispatchMode

from glora_server.aggregation import (
    STRATEGIES,
    ClientUpdate,
    InitSource,
    aggregate,
    aggregate_with_options,
    canonical_state,
    check_options,
    delta_inner,
    delta_norm,
    empty_state,
    gauge_fix,
    readout,
    spectral_norm,
)
from glora_server.aggregation import errors as e
from glora_server.aggregation.strategies.glora import Glora


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def updates_of(ranks: tuple[int, ...], d: int = 20, n: int = 16, seed: int = 0) -> list[ClientUpdate]:
    g = generator(seed)
    return [random_update(g, d, n, r) for r in ranks]


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types here
    """Remembers the largest matrix that any operation made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types here
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # torch's signature
        made = func(*args, **(kwargs or {}))
        for item in made if isinstance(made, tuple | list) else (made,):
            if isinstance(item, torch.Tensor):
                self.numel = max(self.numel, item.numel())
        return made


@pytest.mark.parametrize("subspace", ["projector", "ridge", "energy", "mean"])
def test_no_dense_matrix_is_ever_made(subspace: str) -> None:
    d, n = 600, 500
    g = generator()
    state = canonical_state(randn(g, d, 8), randn(g, 8, n), rank=8)
    updates = [replace(random_update(g, d, n, r), sent=readout(state, r, 1.0)) for r in (2, 4, 8)]
    columns = 8 + 2 * sum(u.rank for u in updates)
    with Largest() as seen:
        result = aggregate("glora", state, updates, rank=8, subspace=subspace)
        readout(result.state, 8, 1.0)
    assert 0 < seen.numel <= d * columns < d * n / 6


def test_a_wide_stack_of_many_clients_agrees_with_the_reference() -> None:
    """Σρ > d and > n: coordinates end at d and n, Z is reduced to a square."""
    updates = updates_of((5,) * 12, d=14, n=11)
    for subspace in ("projector", "ridge", "energy", "mean"):
        dense = dense_round(updates, rank=6, subspace=subspace)
        state = aggregate("glora", None, updates, rank=6, rule="replace", subspace=subspace).state
        assert torch.allclose(dense_state(state), dense.s, atol=1e-9)


def test_rank_above_the_dimensions_is_legal() -> None:
    updates = updates_of((9,), d=6, n=5)
    state = aggregate("glora", None, updates, rank=64, rule="replace").state
    assert state.rank == 5
    assert torch.allclose(dense_state(state), product(updates[0].b, updates[0].a, updates[0].scale))


def test_sent_scale_is_used_where_a_device_has_its_own_scale() -> None:
    g = generator(6)
    state = canonical_state(randn(g, 12, 3), randn(g, 3, 10), rank=3)
    b, a = readout(state, 3, 1.0)
    idle = ClientUpdate(b / 4, a, 4.0, 1.0, sent=(b, a), sent_scale=1.0)
    assert torch.allclose(dense_state(aggregate("glora", state, [idle], rank=3).state), dense_state(state))


def test_one_spoiled_client_cannot_turn_the_consensus_space() -> None:
    """Magnitude ×100 moves the energy space almost wholly and the projector hardly (ALGORITHMS §1.6)."""
    g = generator(8)
    common = randn(g, 60, 4)
    honest = [
        ClientUpdate(common @ randn(g, 4, 4) + 0.02 * randn(g, 60, 4), randn(g, 4, 50), 1.0, 1.0) for _ in range(7)
    ]
    loud = ClientUpdate(100 * randn(g, 60, 4), randn(g, 4, 50), 1.0, 1.0)
    frame = torch.linalg.qr(common).Q
    kept = {
        subspace: float(
            torch.linalg.matrix_norm(
                aggregate("glora", None, [*honest, loud], rank=4, rule="replace", subspace=subspace).state.u.T @ frame
            )
            ** 2
            / 4
        )
        for subspace in ("projector", "ridge", "energy", "mean")
    }
    assert min(kept["projector"], kept["ridge"]) > 0.95
    assert max(kept["energy"], kept["mean"]) < 0.3


def test_same_inputs_give_the_same_bits() -> None:
    first, second = (aggregate("glora", None, updates_of((2, 4, 3)), rank=4, rule="replace") for _ in range(2))
    assert torch.equal(first.state.u, second.state.u)
    assert torch.equal(first.state.a, second.state.a)
    assert first.diagnostics == second.diagnostics


def test_inputs_are_left_alone() -> None:
    updates = updates_of((2, 3))
    before = [(u.b.clone(), u.a.clone()) for u in updates]
    aggregate("glora", None, updates, rank=4, rule="replace")
    aggregate("fedit", None, updates, rank=4)
    assert all(torch.equal(u.b, b) and torch.equal(u.a, a) for u, (b, a) in zip(updates, before, strict=True))


@pytest.mark.parametrize(
    ("given", "kept"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float16, torch.float32),
     (torch.float64, torch.float64)],
)  # fmt: skip
def test_dtype_of_the_state(given: torch.dtype, kept: torch.dtype) -> None:
    g = generator()
    updates = [random_update(g, 8, 7, 2, dtype=given)]
    for strategy, options in (("glora", {"rule": "replace"}), ("fedit", {})):
        state = aggregate_with_options(strategy, None, updates, rank=4, options=options).state
        assert {state.u.dtype, state.a.dtype, state.sigma.dtype} == {kept}
        assert all(t.dtype == kept for t in readout(state, 2, 1.0))


def test_diagnostics_say_what_dense_matrices_say() -> None:
    g = generator(9)
    state = canonical_state(randn(g, 20, 3), randn(g, 3, 16), rank=3)
    updates = [replace(u, sent=readout(state, u.rank, u.scale)) for u in updates_of((2, 3, 5), seed=10)]
    seen = aggregate("glora", state, updates, rank=5).diagnostics
    dense = dense_round(updates, rank=5, rule="delta", state=state)
    assert seen.eigenvalues == pytest.approx(dense.eigenvalues[:5].tolist())
    assert seen.eigengap == pytest.approx(dense.gap * float(dense.eigenvalues[0]), rel=1e-6)
    assert seen.mean_norm == pytest.approx(float(dense.mean.norm()))
    assert seen.captured_energy == pytest.approx(float(dense.s.norm() ** 2 / dense.mean.norm() ** 2))
    assert seen.truncation_error == pytest.approx(float((dense.s - dense.mean).norm() / dense.mean.norm()))
    total = sum(u.weight for u in updates)
    assert seen.coverage == pytest.approx([1, 1, *[1 - updates[0].weight / total], *[updates[2].weight / total] * 2])
    average = sum(u.weight / total * product(u.b, u.a, u.scale) for u in updates)
    assert isinstance(average, torch.Tensor)
    moved = dense.mean - dense_state(state)
    for client, u in zip(seen.clients, updates, strict=True):
        own = product(u.b, u.a, u.scale)
        assert client.update_norm == pytest.approx(float(own.norm()))
        assert client.cosine == pytest.approx(float((own * average).sum() / own.norm() / average.norm()))
        assert client.capture == pytest.approx(float((dense.projector @ own).norm() / own.norm()))
        assert u.sent is not None
        change = own - product(*u.sent, u.scale)
        assert client.change_norm == pytest.approx(float(change.norm()))
        assert client.change_cosine == pytest.approx(float((change * moved).sum() / change.norm() / moved.norm()))


@pytest.mark.parametrize("angle", [0.3, 1.2, 1e-9])
def test_angles_between_versions(angle: float) -> None:
    eye = torch.eye(6, dtype=torch.float64)
    tilt = math.cos(angle) * eye[:, 1] + math.sin(angle) * eye[:, 3]
    before = canonical_state(eye[:, :2], 2 * eye[:2], rank=2)
    update = ClientUpdate(torch.stack([eye[:, 0], tilt], dim=1), 3 * eye[:2], 1.0, 1.0)
    angles = aggregate("glora", before, [update], rank=2, rule="replace").diagnostics.angles
    assert angles is not None
    assert (angles.largest, angles.mean) == pytest.approx((angle, angle / 2), rel=1e-6, abs=0)
    assert aggregate("glora", None, [update], rank=2, rule="replace").diagnostics.angles is None


def test_a_round_of_zeros_gives_the_zero_state() -> None:
    zero = ClientUpdate(torch.zeros(6, 2), torch.ones(2, 5), 1.0, 1.0)
    for strategy, options in (("glora", {"rule": "replace"}), ("fedit", {})):
        result = aggregate_with_options(strategy, None, [zero], rank=4, options=options)
        assert result.state.rank == 0
        assert result.diagnostics.captured_energy == 1.0
        assert not bool(readout(result.state, 3, 1.0)[0].any())


def test_fedit_averages_factors_and_hands_them_out() -> None:
    updates = [replace(u, scale=2.0) for u in updates_of((2, 4))]
    p = [u.weight / sum(v.weight for v in updates) for u in updates]
    mean_b, mean_a = p[1] * updates[1].b, p[1] * updates[1].a
    mean_b[:, :2] += p[0] * updates[0].b
    mean_a[:2] += p[0] * updates[0].a
    state = aggregate("fedit", None, updates, rank=6).state
    b, a = readout(state, 4, 2.0)
    assert torch.allclose(b, mean_b)
    assert torch.allclose(a, mean_a)
    assert torch.allclose(dense_state(state), 2.0 * mean_b @ mean_a)
    other_b, other_a = readout(state, 3, 0.5)
    assert torch.allclose(other_b, 2 * mean_b[:, :3])
    assert torch.allclose(other_a, 2 * mean_a[:3])


def test_fedit_refills_components_that_nobody_trained() -> None:
    state = aggregate("fedit", None, updates_of((2, 2)), rank=6).state
    b, a = readout(state, 5, 1.0, seed=1)
    assert not bool(b[:, 2:].any())
    assert torch.allclose(torch.linalg.vector_norm(a[2:], dim=1), torch.full((3,), 1 / math.sqrt(3)).double())


def test_fedit_depends_on_the_gauge_and_glora_does_not() -> None:
    updates = updates_of((3, 3, 3))
    other = regauged(updates, generator(5), 10.0)
    for strategy, options, moves in (("fedit", {}, True), ("glora", {"rule": "replace"}, False)):
        first, second = (
            dense_state(aggregate_with_options(strategy, None, u, rank=4, options=options).state)
            for u in (updates, other)
        )
        assert (float((first - second).norm() / first.norm()) > 0.1) is moves


def test_fedit_refuses_a_rank_that_it_cannot_pad_and_a_state_without_its_factors() -> None:
    with pytest.raises(e.RankError):
        aggregate("fedit", None, updates_of((5,)), rank=4)
    with pytest.raises(e.StateError, match="extra"):
        readout(canonical_state(torch.ones(4, 1), torch.ones(1, 4), rank=1, strategy="fedit"), 1, 1.0)


def test_first_fedit_readouts_agree_across_ranks() -> None:
    small, large = (readout(empty_state(6, 5, strategy="fedit"), r, 1.0, seed=2)[1] for r in (2, 4))
    assert torch.equal(small, large[:2])


def test_strategies_declare_what_they_need() -> None:
    glora = STRATEGIES["glora"]
    assert glora.properties.gauge_invariant
    assert not STRATEGIES["fedit"].properties.gauge_invariant
    assert glora.contract(check_options("glora", {})).needs_sent
    assert not glora.contract(check_options("glora", {"rule": "replace"})).needs_sent
    assert glora.contract(check_options("glora", {"rule": "accumulate"})).init is InitSource.FROZEN_STATE
    assert not STRATEGIES["fedit"].contract({}).needs_sent


def test_plans_are_checked() -> None:
    glora = STRATEGIES["glora"]
    glora.check_plan([2, 4, 8])
    with pytest.raises(e.RankError):
        glora.check_plan([2, 0])
    with pytest.raises(e.EmptyUpdatesError):
        glora.check_plan([])

    class EqualRanks(Glora):
        properties = replace(glora.properties, mixed_ranks=False)

    EqualRanks().check_plan([4, 4], {})
    with pytest.raises(e.MixedRanksError, match="2, 4"):
        EqualRanks().check_plan([4, 2], {})


def test_norms_come_from_qr_cores_and_survive_a_bad_gauge() -> None:
    first, second = updates_of((3, 4), seed=2)
    dense = product(first.b, first.a, first.scale)
    for one in (first, *regauged([first], generator(), 1e6)):
        assert delta_norm(one.b, one.a, one.scale) == pytest.approx(float(dense.norm()), rel=1e-8)
        assert spectral_norm(one.b, one.a, one.scale) == pytest.approx(
            float(torch.linalg.matrix_norm(dense, 2)), rel=1e-8
        )
    other = product(second.b, second.a, second.scale)
    assert delta_inner(first, second) == pytest.approx(float((dense * other).sum()))
    with pytest.raises(e.NonFiniteError):
        delta_norm(first.b * math.nan, first.a, 1.0)


def test_gauge_fixing_reveals_the_rank_of_the_update() -> None:
    one = updates_of((3,))[0]
    b = torch.cat([one.b, one.b[:, :1], torch.zeros_like(one.b)], dim=1)
    a = torch.cat([one.a, randn(generator(3), 4, 16)])
    fixed = gauge_fix(b, a, 2.0, rank_tol=1e-12)
    assert fixed.sigma.numel() == 3
    assert torch.allclose(fixed.u @ torch.diag(fixed.sigma) @ fixed.v.T, product(b, a, 2.0), atol=1e-10)
    assert gauge_fix(torch.zeros(20, 2), torch.ones(2, 16), 1.0, rank_tol=1e-5).sigma.numel() == 0
