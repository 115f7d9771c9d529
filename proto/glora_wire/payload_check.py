"""Compares what a payload holds with what was planned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NoReturn

from glora_wire.errors import GloraError, Reason
from glora_wire.names import LoraKey, split_key
from glora_wire.tensors import PayloadHeader, TensorSpec

_SHOWN: Final = 3
"""How many offenders a message names."""


def check_specs(header: PayloadHeader, expected: Sequence[TensorSpec]) -> None:
    """Return when the payload holds exactly these tensors, in any order.

    Raises GloraError TENSOR_NAMES_WRONG, TENSOR_DTYPE_WRONG, TENSOR_SHAPE_WRONG, or RANK_WRONG when the shapes of
    the LoRA factors differ in the rank alone.
    """
    found = {spec.name: spec for spec in header.specs}
    wanted = {spec.name: spec for spec in expected}
    _check_names(list(found), list(wanted))
    _check_dtypes(found, expected)
    _check_shapes(found, expected)


def _check_names(found: Sequence[str], wanted: Sequence[str]) -> None:
    have, want = set(found), set(wanted)
    missing = [name for name in wanted if name not in have]
    surplus = [name for name in found if name not in want]
    if not missing and not surplus:
        return
    parts = [f"{len(wanted)} tensors were expected and {len(found)} came"]
    if missing:
        parts.append(f"missing: {_listed(missing)}")
    if surplus:
        parts.append(f"not expected: {_listed(surplus)}")
    raise GloraError(
        Reason.TENSOR_NAMES_WRONG,
        f"The payload does not hold the tensors that the plan names: {'; '.join(parts)}.",
        missing=len(missing),
        surplus=len(surplus),
    )


def _check_dtypes(found: dict[str, TensorSpec], expected: Sequence[TensorSpec]) -> None:
    wrong = [
        f"{_name(spec.name)} is {found[spec.name].dtype}, expected {spec.dtype}"
        for spec in expected
        if found[spec.name].dtype is not spec.dtype
    ]
    if wrong:
        raise GloraError(
            Reason.TENSOR_DTYPE_WRONG,
            f"The payload has the wrong number format: {_sentences(wrong)}. "
            "Convert the tensors to the wire dtype of the plan.",
            tensors=len(wrong),
        )


def _check_shapes(found: dict[str, TensorSpec], expected: Sequence[TensorSpec]) -> None:
    wrong = [(spec, found[spec.name]) for spec in expected if found[spec.name].shape != spec.shape]
    if not wrong:
        return
    ranks = [_ranks(want, have) for want, have in wrong]
    if all(pair is not None for pair in ranks):
        _rank_wrong(wrong, [pair for pair in ranks if pair is not None])
    lines = [f"{_name(want.name)} is {_shape(have)}, expected {_shape(want)}" for want, have in wrong]
    raise GloraError(
        Reason.TENSOR_SHAPE_WRONG,
        f"The payload has tensors of the wrong shape: {_sentences(lines)}. "
        "Check that the device adapts the model that the manifest describes.",
        tensors=len(wrong),
    )


def _ranks(want: TensorSpec, have: TensorSpec) -> tuple[int, int] | None:
    """(expected, found) rank when the rank is all that differs; None when something else does."""
    key = split_key(want.name)
    if not isinstance(key, LoraKey) or len(want.shape) != 2 or len(have.shape) != 2:
        return None
    rank_axis = 0 if key.factor == "A" else 1
    if want.shape[1 - rank_axis] != have.shape[1 - rank_axis]:
        return None
    return want.shape[rank_axis], have.shape[rank_axis]


def _rank_wrong(wrong: Sequence[tuple[TensorSpec, TensorSpec]], ranks: Sequence[tuple[int, int]]) -> NoReturn:
    lines = [
        f"{_name(want.name)} has rank {found}, expected {expected}"
        for (want, _), (expected, found) in zip(wrong, ranks, strict=True)
    ]
    raise GloraError(
        Reason.RANK_WRONG,
        f"The payload does not have the rank that was granted: {_sentences(lines)}. "
        "Train and send the rank of the plan.",
        tensors=len(wrong),
        expected=ranks[0][0],
        found=ranks[0][1],
    )


def _shape(spec: TensorSpec) -> str:
    return "x".join(map(str, spec.shape)) or "a scalar"


def _name(name: str) -> str:
    return name if len(name) <= 160 else f"{name[:157]}..."


def _listed(names: Sequence[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(map(_name, names[:_SHOWN])) + (f" and {rest} more" if rest > 0 else "")


def _sentences(lines: Sequence[str]) -> str:
    rest = len(lines) - _SHOWN
    return "; ".join(lines[:_SHOWN]) + (f"; and {rest} more" if rest > 0 else "")
