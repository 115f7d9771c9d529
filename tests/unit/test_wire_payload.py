"""Payloads against the safetensors library in both directions, and against files that nobody should accept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from glora.v1 import types_pb2
from glora_wire.errors import GloraError, Reason
from glora_wire.payload import (
    MAX_HEADER_BYTES,
    PayloadWriter,
    TensorDtype,
    TensorSpec,
    layout,
    payload_bytes,
    read_header,
)

F32, BF16, F16 = TensorDtype.FLOAT32, TensorDtype.BFLOAT16, TensorDtype.FLOAT16


def write_raw(path: Path, header: bytes, data: bytes = b"", length: int | None = None) -> Path:
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + data)
    return path


def entry(shape: object = (2,), offsets: object = (0, 8), dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def refused(path: Path) -> str:
    with pytest.raises(GloraError) as caught:
        read_header(path)
    assert caught.value.reason is Reason.PAYLOAD_MALFORMED
    assert len(caught.value.message) < 600
    return caught.value.message


@pytest.mark.parametrize(("dtype", "name"), [(F32, "float32"), (BF16, "bfloat16"), (F16, "float16")])
def test_the_library_reads_what_we_write(tmp_path: Path, dtype: TensorDtype, name: str) -> None:
    import safetensors.torch
    import torch

    tensors = {
        "b": torch.arange(6, dtype=getattr(torch, name)).reshape(2, 3),
        "a": torch.full((1, 5), -1.5, dtype=getattr(torch, name)),
        "empty": torch.zeros((0, 3), dtype=getattr(torch, name)),
        "scalar": torch.tensor(2.0, dtype=getattr(torch, name)),
    }
    specs = [TensorSpec(key, dtype, tuple(value.shape)) for key, value in tensors.items()]
    path = tmp_path / "adapter_model.safetensors"
    with PayloadWriter(path, specs) as writer:
        for key, value in tensors.items():
            writer.write(key, value.reshape(-1).view(torch.uint8).numpy().tobytes())
    loaded = safetensors.torch.load_file(path)
    assert loaded.keys() == tensors.keys()
    for key, value in tensors.items():
        assert loaded[key].dtype == value.dtype
        assert torch.equal(loaded[key], value)
    assert path.stat().st_size == payload_bytes(specs)
    assert list(read_header(path).specs) == specs


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_we_read_what_the_library_writes(tmp_path: Path, name: str) -> None:
    import safetensors.torch
    import torch

    tensors = {f"t{i}": torch.randn(i, 3).to(getattr(torch, name)) for i in range(1, 5)}
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt", "ä": "ö"})
    header = read_header(path)
    assert header.metadata == {"format": "pt", "ä": "ö"}
    assert header.total_bytes == path.stat().st_size
    raw = path.read_bytes()
    for key, value in tensors.items():
        found = header.entry(key)
        assert found.spec == TensorSpec(key, TensorDtype(name), tuple(value.shape))
        assert raw[found.offset : found.end] == value.view(torch.uint8).numpy().tobytes()
    assert header.by_name().keys() == tensors.keys()
    with pytest.raises(KeyError):
        header.entry("t9")


def test_layout_is_aligned_and_deterministic() -> None:
    specs = [TensorSpec("ab", BF16, (3, 5)), TensorSpec("c", F32, (7,))]
    first, second = layout(specs, {"b": "1", "a": "2"}), layout(specs, {"a": "2", "b": "1"})
    assert first == second
    assert len(first.header) % 8 == 0
    assert [item.offset for item in first.entries] == [len(first.header), len(first.header) + 30]
    assert first.total_bytes == len(first.header) + 58
    assert layout([]).total_bytes == len(layout([]).header)


@pytest.mark.parametrize("specs", [[TensorSpec("a", F32, (1,))] * 2, [TensorSpec("__metadata__", F32, (1,))]])
def test_layout_refuses_repeated_and_reserved_names(specs: list[TensorSpec]) -> None:
    with pytest.raises(ValueError, match="cannot have the name"):
        layout(specs)
    with pytest.raises(ValueError, match="cannot have the name"):
        layout(specs, {})


def test_dtypes_cross_the_protos() -> None:
    for dtype in TensorDtype:
        assert TensorDtype.from_proto(dtype.to_proto()) is dtype
        assert TensorDtype.from_code(dtype.code) is dtype
    assert TensorDtype.from_code("F64") is None
    assert [dtype.bytes for dtype in (F32, BF16, F16)] == [4, 2, 2]
    with pytest.raises(GloraError, match="not known"):
        TensorDtype.from_proto(types_pb2.TENSOR_DTYPE_UNSPECIFIED)


SPECS = [TensorSpec("a", F32, (2,)), TensorSpec("b", F32, (1,))]


def _wrong_order(writer: PayloadWriter) -> None:
    writer.write("b", bytes(4))


def _wrong_size(writer: PayloadWriter) -> None:
    writer.write("a", bytes(7))


def _too_few(writer: PayloadWriter) -> None:
    writer.write("a", bytes(8))


def _too_many(writer: PayloadWriter) -> None:
    for name, size in (("a", 8), ("b", 4), ("c", 4)):
        writer.write(name, bytes(size))


def _own_error(_: PayloadWriter) -> None:
    raise ValueError("the caller's own")


@pytest.mark.parametrize("misuse", [_wrong_order, _wrong_size, _too_few, _too_many, _own_error])
def test_a_failed_writer_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, misuse: Callable[[PayloadWriter], None]
) -> None:
    path = tmp_path / "p.safetensors"
    path.write_bytes(b"old")

    def attempt() -> None:
        with PayloadWriter(path, SPECS) as writer:
            misuse(writer)

    with pytest.raises(ValueError, match=r"not|no tensor left|own"):
        attempt()
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"old"


def test_writer_takes_memoryviews_and_replaces_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    path.write_bytes(b"old")
    with PayloadWriter(path, SPECS) as writer:
        writer.write("a", memoryview(bytes(range(8))).cast("I"))
        writer.write("b", bytearray(b"\xff" * 4))
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes()[-12:] == bytes(range(8)) + b"\xff" * 4
    with pytest.raises(ValueError, match="not open"):
        writer.write("a", bytes(8))


HOSTILE: list[tuple[str, bytes, bytes, str]] = [
    ("not utf-8", b'{"\xff": 1}', b"", "not JSON"),
    ("not json", b"{nonsense", b"", "not JSON"),
    ("no brace", b" {}", b"", "brace"),
    ("array", b"[]", b"", "brace"),
    ("deep nesting", b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", b"", "not JSON"),
    ("huge number", b'{"a":' + b"9" * 10_000 + b"}", b"", "not JSON"),
    ("NaN", b'{"a": NaN}', b"", "NaN"),
    ("control character", json.dumps({"a\nb": entry()}).encode(), bytes(8), "printable"),
    ("lone surrogate", json.dumps({"a\ud800": entry()}).encode(), bytes(8), "printable"),
    ("empty name", json.dumps({"": entry()}).encode(), bytes(8), "printable"),
    ("twice", b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2), bytes(8), "twice"),
    (
        "twice inside",
        b'{"a":{"dtype":"F32","dtype":"F16","shape":[2],"data_offsets":[0,8]}}',
        bytes(8),
        "twice",
    ),
    ("entry is a list", b'{"a":[]}', b"", "exactly"),
    ("surplus field", json.dumps({"a": entry() | {"x": 1}}).encode(), bytes(8), "exactly"),
    ("missing field", b'{"a":{"dtype":"F32","shape":[2]}}', bytes(8), "exactly"),
    ("metadata list", b'{"__metadata__":[]}', b"", "metadata"),
    ("metadata number", b'{"__metadata__":{"a":1}}', b"", "metadata"),
    ("unknown dtype", json.dumps({"a": entry(dtype="I64")}).encode(), bytes(8), "number format"),
    ("dtype is no text", json.dumps({"a": entry(dtype=["F32"])}).encode(), bytes(8), "number format"),
    ("negative", json.dumps({"a": entry(shape=[-2])}).encode(), bytes(8), "whole numbers"),
    ("two negatives", json.dumps({"a": entry(shape=[-2, -1])}).encode(), bytes(8), "whole numbers"),
    ("bool", json.dumps({"a": entry(shape=[True, 2])}).encode(), bytes(8), "whole numbers"),
    ("float", json.dumps({"a": entry(shape=[2.0])}).encode(), bytes(8), "whole numbers"),
    ("shape text", json.dumps({"a": entry(shape="2")}).encode(), bytes(8), "whole numbers"),
    ("too many axes", json.dumps({"a": entry(shape=[1] * 9)}).encode(), bytes(8), "whole numbers"),
    ("overflow", json.dumps({"a": entry(shape=[2**40, 2**40], offsets=[0, 0])}).encode(), b"", "elements"),
    ("hidden overflow", json.dumps({"a": entry(shape=[2**62, 0], offsets=[0, 0])}).encode(), b"", "elements"),
    ("beyond 63 bits", json.dumps({"a": entry(shape=[2**63])}).encode(), b"", "whole numbers"),
    ("offsets three", json.dumps({"a": entry(offsets=[0, 8, 8])}).encode(), bytes(8), "data_offsets"),
    ("offsets negative", json.dumps({"a": entry(offsets=[-8, 0])}).encode(), bytes(8), "data_offsets"),
    ("offsets bool", json.dumps({"a": entry(shape=[], offsets=[False, 4])}).encode(), bytes(4), "data_offsets"),
    ("offsets backwards", json.dumps({"a": entry(offsets=[8, 0])}).encode(), bytes(8), "shape needs"),
    ("wrong length", json.dumps({"a": entry(offsets=[0, 4])}).encode(), bytes(4), "shape needs"),
    ("out of range", json.dumps({"a": entry(offsets=[8, 16])}).encode(), bytes(8), "hole"),
    (
        "overlap",
        json.dumps({"a": entry(), "b": entry(offsets=[4, 12])}).encode(),
        bytes(12),
        "overlaps",
    ),
    ("same place", json.dumps({"a": entry(), "b": entry()}).encode(), bytes(8), "overlaps"),
    ("hole", json.dumps({"a": entry(), "b": entry(offsets=[12, 20])}).encode(), bytes(20), "hole"),
    ("file too short", json.dumps({"a": entry()}).encode(), bytes(7), "end at byte"),
    ("file too long", json.dumps({"a": entry()}).encode(), bytes(9), "end at byte"),
]


@pytest.mark.parametrize(("header", "data", "why"), [case[1:] for case in HOSTILE], ids=[case[0] for case in HOSTILE])
def test_hostile_headers(tmp_path: Path, header: bytes, data: bytes, why: str) -> None:
    assert why in refused(write_raw(tmp_path / "h", header, data))


def test_hostile_lengths(tmp_path: Path) -> None:
    path = tmp_path / "h"
    for short in (b"", b"1234567"):
        path.write_bytes(short)
        assert "too short" in refused(path)
    assert "limit" in refused(write_raw(path, b"{}", length=2**64 - 1))
    assert "limit" in refused(write_raw(path, b"{}", length=MAX_HEADER_BYTES + 1))
    assert "ends after" in refused(write_raw(path, b"{}", length=3))


def test_the_well_formed_twin_of_the_hostile_headers_is_read(tmp_path: Path) -> None:
    header = read_header(write_raw(tmp_path / "h", json.dumps({"a": entry()}).encode() + b"   ", bytes(8)))
    assert header.specs == (TensorSpec("a", F32, (2,)),)
    assert read_header(write_raw(tmp_path / "e", b"{}")).specs == ()


def test_a_header_that_was_read_before_is_held_against_each_file(tmp_path: Path) -> None:
    text = json.dumps({"a": entry()}).encode()
    first = read_header(write_raw(tmp_path / "first", text, bytes(8)))
    assert read_header(write_raw(tmp_path / "second", text, bytes(8))) == first
    assert "tensors end at byte" in refused(write_raw(tmp_path / "short", text, bytes(7)))
    with pytest.raises(TypeError):
        first.metadata["shared"] = "no"  # type: ignore[index]  # one header may be that of many files


def test_a_large_header_is_read_like_a_small_one(tmp_path: Path) -> None:
    names = [f"{i:0500}" for i in range(400)]
    text = json.dumps({name: entry((0,), (0, 0)) for name in names}).encode()
    assert len(text) > 2 * 64 * 1024
    assert [spec.name for spec in read_header(write_raw(tmp_path / "h", text)).specs] == names
