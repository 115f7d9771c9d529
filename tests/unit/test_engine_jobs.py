from pathlib import Path

import engine_cases as cases
import pytest
import torch
from safetensors.torch import load_file, save_file

from glora_server.coordinator.model import StatePart, TensorData, TensorKind
from glora_server.coordinator.ports import CheckJob, StrategyChoice
from glora_server.engines import catalogue, jobs
from glora_server.engines.states import module_part, module_state
from glora_server.engines.tensors import from_record, to_record
from glora_wire.errors import GloraError, Reason
from glora_wire.names import dense_key, lora_key
from glora_wire.payload import TensorDtype, read_header

QUERY = "enc.0.query"


@pytest.fixture
def parts() -> tuple[StatePart, ...]:
    """A state of rank 5 in each module."""
    return tuple(_filled(part) for part in jobs.initialise(cases.initial(8), cases.CPU))


def _filled(part: StatePart) -> StatePart:
    if part.kind is TensorKind.DENSE:
        return part
    out, in_ = cases.SHAPES[part.name]
    g = torch.Generator().manual_seed(1)
    u = torch.linalg.qr(torch.randn(out, 5, generator=g)).Q
    v = torch.linalg.qr(torch.randn(in_, 5, generator=g)).Q
    sigma = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    state = module_state(part, strategy="glora", device=cases.CPU)
    return module_part(part.name, type(state)(u=u, a=sigma[:, None] * v.mT, sigma=sigma))


def checked(path: Path, rank: int, **changes: object) -> CheckJob:
    values: dict[str, object] = {
        "path": path,
        "scales": dict.fromkeys(cases.SHAPES, cases.SCALE),
        "expected": cases.specs(rank),
        "max_norm": 0.0,
    }
    return CheckJob(**(values | changes))  # type: ignore[arg-type]


def update_file(path: Path, rank: int, dtype: TensorDtype = TensorDtype.FLOAT32) -> Path:
    sent = cases.header_only(path.with_suffix(".sent"), rank, dtype)
    torch_dtype = torch.bfloat16 if dtype is TensorDtype.BFLOAT16 else torch.float32
    return cases.trained(sent, path, 3, dtype=torch_dtype)


def test_initial_state_is_zero_and_its_head_follows_from_seed_and_name() -> None:
    parts = {part.name: part for part in jobs.initialise(cases.initial(8), cases.CPU)}
    state = module_state(parts[QUERY], strategy="glora", device=cases.CPU)
    assert (state.u.shape, state.a.shape, state.sigma.shape) == ((24, 0), (0, 16), (0,))
    head = from_record(parts[cases.HEAD].tensors["value"], cases.CPU)
    assert head.shape == cases.HEAD_SHAPE
    assert 0.01 < float(head.std()) < 0.03
    again = jobs.initialise(cases.initial(8), cases.CPU)[-1]
    assert again == parts[cases.HEAD]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_records_keep_every_bit(dtype: torch.dtype) -> None:
    tensor = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=dtype).mT
    record = to_record(tensor)
    assert record.dtype == str(dtype).removeprefix("torch.")
    assert torch.equal(from_record(record, cases.CPU), tensor)


def test_damaged_record_is_named() -> None:
    with pytest.raises(GloraError, match="7 bytes came") as caught:
        from_record(TensorData(dtype="float32", shape=(2,), data=b"1234567"), cases.CPU)
    assert caught.value.reason is Reason.INTERNAL


@pytest.mark.parametrize("style", ["balanced", "a_orthonormal"])
def test_rendered_product_is_the_best_part_of_the_state(
    tmp_path: Path, parts: tuple[StatePart, ...], style: str
) -> None:
    path = cases.header_only(tmp_path / "r3", 3)
    jobs.render(cases.rendering(path, parts, 3, style=style), cases.CPU)
    state = module_state(parts[0], strategy="glora", device=cases.CPU)
    b, a = cases.factors(path, QUERY)
    assert torch.allclose(cases.SCALE * b @ a, state.u[:, :3] @ state.a[:3], atol=1e-5)
    if style == "a_orthonormal":
        assert torch.allclose(a @ a.mT, torch.eye(3), atol=1e-5)
    assert torch.equal(load_file(path)[dense_key(cases.HEAD)], from_record(parts[-1].tensors["value"], cases.CPU))


def test_readouts_nest_also_in_refilled_rows_and_leave_header_and_size(
    tmp_path: Path, parts: tuple[StatePart, ...]
) -> None:
    small, large = cases.header_only(tmp_path / "r6", 6), cases.header_only(tmp_path / "r8", 8)
    before = read_header(large)
    jobs.render(cases.rendering(small, parts, 6), cases.CPU)
    for part in reversed(parts):  # in shards, in any order
        jobs.render(cases.rendering(large, (part,), 8), cases.CPU)
    assert read_header(large) == before
    for module in cases.SHAPES:
        (b6, a6), (b8, a8) = cases.factors(small, module), cases.factors(large, module)
        assert torch.equal(a6, a8[:6])
        assert torch.equal(b6, b8[:, :6])
        assert not b8[:, 5:].any()
        assert torch.allclose(torch.linalg.vector_norm(a8[5:], dim=1), torch.tensor(3**-0.5))
    other = cases.header_only(tmp_path / "v2", 6)
    jobs.render(cases.rendering(other, parts, 6, version=2), cases.CPU)
    assert not torch.equal(cases.factors(other, QUERY)[1][5], cases.factors(small, QUERY)[1][5])


def test_rendering_rounds_to_the_wire_dtype_and_refuses_what_does_not_fit(
    tmp_path: Path, parts: tuple[StatePart, ...]
) -> None:
    path = cases.header_only(tmp_path / "bf16", 4, TensorDtype.BFLOAT16)
    jobs.render(cases.rendering(path, parts, 4), cases.CPU)
    exact = cases.header_only(tmp_path / "f32", 4)
    jobs.render(cases.rendering(exact, parts, 4), cases.CPU)
    b, wanted = cases.factors(path, QUERY)[0], cases.factors(exact, QUERY)[0]
    assert torch.equal(b, wanted.to(torch.bfloat16))
    huge = StatePart(
        name=cases.HEAD, kind=TensorKind.DENSE, tensors={"value": to_record(torch.full(cases.HEAD_SHAPE, 1e6))}
    )
    half = cases.header_only(tmp_path / "f16", 4, TensorDtype.FLOAT16)
    with pytest.raises(GloraError, match="float16 cannot hold") as caught:
        jobs.render(cases.rendering(half, (huge,), 4), cases.CPU)
    assert caught.value.reason is Reason.NON_FINITE


def test_rendering_at_another_rank_than_the_header_is_refused(tmp_path: Path, parts: tuple[StatePart, ...]) -> None:
    path = cases.header_only(tmp_path / "r3", 3)
    before = path.read_bytes()
    with pytest.raises(GloraError, match="header plans"):
        jobs.render(cases.rendering(path, parts, 4), cases.CPU)
    assert path.read_bytes() == before


@pytest.mark.parametrize("dtype", [TensorDtype.FLOAT32, TensorDtype.BFLOAT16])
def test_norms_are_those_of_the_dense_product(tmp_path: Path, dtype: TensorDtype) -> None:
    path = update_file(tmp_path / "u", 4, dtype)
    result = jobs.check(checked(path, 4, expected=cases.specs(4, dtype)), cases.CPU)
    assert result.refusal is None
    dense = {}
    for module in cases.SHAPES:
        b, a = cases.factors(path, module)
        dense[module] = float(torch.linalg.matrix_norm(cases.SCALE * b.double() @ a.double()))
    assert dict(result.module_norms) == pytest.approx(dense, rel=1e-9)
    assert result.norm == pytest.approx(sum(n**2 for n in dense.values()) ** 0.5, rel=1e-9)


def test_norm_limit_is_refused_with_numbers(tmp_path: Path) -> None:
    path = update_file(tmp_path / "u", 4)
    norm = jobs.check(checked(path, 4), cases.CPU).norm
    assert norm is not None
    assert jobs.check(checked(path, 4, max_norm=norm * 1.001), cases.CPU).refusal is None
    refused = jobs.check(checked(path, 4, max_norm=norm / 2), cases.CPU)
    assert refused.refusal is not None
    assert refused.refusal.reason is Reason.NORM_TOO_LARGE
    assert f"{norm:.6g}" in refused.refusal.message
    assert f"{norm / 2:.6g}" in refused.refusal.message
    assert refused.norm == norm


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", [lora_key(QUERY, "A"), lora_key("enc.0.value", "B"), dense_key(cases.HEAD)])
def test_update_that_is_not_finite_is_refused_by_name(tmp_path: Path, value: float, key: str) -> None:
    tensors = load_file(update_file(tmp_path / "u", 4))
    tensors[key][1, 1] = value
    save_file(tensors, tmp_path / "bad")
    result = jobs.check(checked(tmp_path / "bad", 4), cases.CPU)
    assert result.refusal is not None
    assert result.refusal.reason is Reason.NON_FINITE
    assert key in result.refusal.message
    assert result.norm is None


def test_finite_numbers_with_an_infinite_sum_are_finite(tmp_path: Path) -> None:
    tensors = load_file(update_file(tmp_path / "u", 4))
    key = lora_key(QUERY, "B")
    tensors[key] = torch.full_like(tensors[key], 3e38)
    assert not torch.isfinite(tensors[key].sum())
    save_file(tensors, tmp_path / "large")
    result = jobs.check(checked(tmp_path / "large", 4), cases.CPU)
    assert result.norm is not None
    assert result.norm > 1e38
    assert result.refusal is not None
    assert result.refusal.reason is Reason.NORM_TOO_LARGE, "and not that they are not finite"


@pytest.mark.parametrize(("limit", "who"), [(0.0, "no run can take more than 1e+30"), (1e12, "the run allows 1e+12")])
def test_an_update_that_no_state_could_hold_is_refused_whatever_the_run_allows(
    tmp_path: Path, limit: float, who: str
) -> None:
    """It would fail the round of every other device: float32 cannot hold the state."""
    tensors = load_file(update_file(tmp_path / "u", 4))
    key = lora_key(QUERY, "B")
    tensors[key] = torch.full_like(tensors[key], 1e32)
    save_file(tensors, tmp_path / "large")
    refusal = jobs.check(checked(tmp_path / "large", 4, max_norm=limit), cases.CPU).refusal
    assert refusal is not None
    assert refusal.reason is Reason.NORM_TOO_LARGE
    assert who in refusal.message


@pytest.mark.parametrize("content", [None, b"", b"no safetensors file at all"])
def test_unreadable_file_is_a_refusal(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "u").write_bytes(content)
    result = jobs.check(checked(tmp_path / "u", 4), cases.CPU)
    assert result.refusal is not None
    assert result.refusal.reason is Reason.PAYLOAD_MALFORMED


def test_file_of_another_rank_or_without_scale_is_a_refusal(tmp_path: Path) -> None:
    path = update_file(tmp_path / "u", 4)
    wrong_rank = jobs.check(checked(path, 8), cases.CPU).refusal
    assert wrong_rank is not None
    assert wrong_rank.reason is Reason.RANK_WRONG
    no_scale = jobs.check(checked(path, 4, scales={QUERY: 1.0}), cases.CPU).refusal
    assert no_scale is not None
    assert no_scale.reason is Reason.SCALE_WRONG


def test_catalogue_names_what_the_protocol_knows() -> None:
    found = {info.name: info for info in catalogue.strategies()}
    assert {"glora", "fedit"} <= set(found)
    assert found["glora"].init == "readout"
    assert found["glora"].mixed_ranks
    for info in found.values():
        assert info.train_mask in {"both", "a", "b", "core"}
        assert info.init in {"readout", "fresh", "local"}
        assert info.upload_set in {"both", "a", "b", "core"}
    accumulate = StrategyChoice(name="glora", options={"rule": "accumulate"})
    assert catalogue.describe(accumulate).init == "fresh"


@pytest.mark.parametrize(
    ("name", "options", "max_rank", "reason"),
    [
        ("glora", {}, 8, None),
        ("glora", {"rule": "replace", "ridge_tau": 0.2}, 1, None),
        ("nothing", {}, 8, Reason.STRATEGY_UNKNOWN),
        ("glora", {"rule": "guess"}, 8, Reason.STRATEGY_OPTIONS),
        ("glora", {"speed": 3}, 8, Reason.STRATEGY_OPTIONS),
        ("glora", {}, 0, Reason.SPEC_INVALID),
    ],
)
def test_strategy_is_checked_with_its_options(
    name: str, options: dict[str, str | float | int | bool], max_rank: int, reason: Reason | None
) -> None:
    refusal = catalogue.check_strategy(
        StrategyChoice(name=name, options=options), min_rank=min(1, max_rank), max_rank=max_rank
    )
    assert (refusal.reason if refusal else None) is reason
