"""What is told to a device whose update does not hold what the plan says."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from glora_wire.errors import GloraError, Reason
from glora_wire.names import dense_key, lora_key
from glora_wire.payload import PayloadHeader, TensorDtype, TensorEntry, TensorSpec, check_specs

F32 = TensorDtype.FLOAT32


def header(specs: Sequence[TensorSpec]) -> PayloadHeader:
    entries = tuple(TensorEntry(spec=spec, offset=0) for spec in specs)
    return PayloadHeader(entries=entries, metadata={}, total_bytes=0)


def adapter(rank: int = 4, *, modules: int = 3, dtype: TensorDtype = F32, inputs: int = 10) -> list[TensorSpec]:
    specs = []
    for index in range(modules):
        specs.append(TensorSpec(lora_key(f"layer.{index}.q", "A"), dtype, (rank, inputs)))
        specs.append(TensorSpec(lora_key(f"layer.{index}.q", "B"), dtype, (6, rank)))
    return [*specs, TensorSpec(dense_key("classifier.weight"), dtype, (2, 6))]


def refused(found: Sequence[TensorSpec], expected: Sequence[TensorSpec]) -> GloraError:
    with pytest.raises(GloraError) as caught:
        check_specs(header(found), expected)
    return caught.value


def test_the_order_does_not_matter() -> None:
    specs = adapter()
    shuffled = specs.copy()
    random.Random(3).shuffle(shuffled)
    assert shuffled != specs
    check_specs(header(shuffled), specs)


def test_names() -> None:
    error = refused(adapter()[1:], adapter())
    assert error.reason is Reason.TENSOR_NAMES_WRONG
    assert "missing: base_model.model.layer.0.q.lora_A.weight" in error.message
    error = refused([*adapter(), TensorSpec("extra", F32, (1,))], adapter())
    assert error.reason is Reason.TENSOR_NAMES_WRONG
    assert "not expected: extra" in error.message
    error = refused(adapter(modules=1), adapter(modules=9))
    assert "and 13 more" in error.message


def test_dtype_comes_before_shape() -> None:
    error = refused(adapter(2, dtype=TensorDtype.FLOAT16), adapter())
    assert error.reason is Reason.TENSOR_DTYPE_WRONG
    assert "is float16, expected float32" in error.message


@pytest.mark.parametrize("rank", [2, 16])
def test_another_rank_is_said_to_be_one(rank: int) -> None:
    error = refused(adapter(rank), adapter(4))
    assert error.reason is Reason.RANK_WRONG
    assert f"has rank {rank}, expected 4" in error.message
    assert error.details["found"] == str(rank)


def test_another_shape_is_not_called_a_rank() -> None:
    assert refused(adapter(2, inputs=11), adapter(4)).reason is Reason.TENSOR_SHAPE_WRONG
    wrong_dense = [*adapter()[:-1], TensorSpec(dense_key("classifier.weight"), F32, (3, 6))]
    error = refused(wrong_dense, adapter())
    assert error.reason is Reason.TENSOR_SHAPE_WRONG
    assert "is 3x6, expected 2x6" in error.message
    flat = [TensorSpec(spec.name, spec.dtype, (40,)) if index == 0 else spec for index, spec in enumerate(adapter())]
    assert refused(flat, adapter()).reason is Reason.TENSOR_SHAPE_WRONG
