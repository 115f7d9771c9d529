"""The manifest of a run: what the server plans and validates with, without ever loading the base model.

Made once from the base model (or written by hand), stored with the run, sent with every assignment. Its labels and
shapes are binding. The JSON is canonical: the same manifest gives the same bytes, and `digest` is their SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NoReturn, Self, assert_never

from glora_wire import strict_json
from glora_wire.errors import GloraError, Reason
from glora_wire.model_files import fingerprint_folder, fingerprint_of, model_files, tokenizer_fingerprint
from glora_wire.names import dense_key, lora_key
from glora_wire.payload import MAX_HEADER_BYTES
from glora_wire.tensors import TensorDtype, TensorSpec

__all__ = [
    "BaseInit",
    "DenseInit",
    "DenseTensor",
    "Manifest",
    "ModuleShape",
    "NormalInit",
    "Task",
    "ZerosInit",
    "adapter_specs",
    "fingerprint_folder",
    "fingerprint_of",
    "model_files",
    "tokenizer_fingerprint",
]

Task = Literal["sequence_classification", "causal_lm"]

MAX_MODULES: Final = 20_000
MAX_DENSE: Final = 20_000
MAX_LABELS: Final = 10_000
MAX_WEIGHT_FILES: Final = 10_000
MAX_EXTENT: Final = 1_000_000
_MAX_DENSE_ELEMENTS: Final = 2**34
_MAX_DIMENSIONS: Final = 8
_MAX_STD: Final = 100.0
_MAX_JSON: Final = 16 * 1024 * 1024
_MAX_NAME: Final = 256
_MAX_TEXT: Final = 1024
_TENSOR_NAME: Final = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
_HEX_32_BYTES: Final = re.compile(r"[0-9a-f]{64}")
_FORMAT: Final = 1
_KEYS: Final = frozenset(
    {
        "format",
        "task",
        "base_model_name",
        "base_model_fingerprint",
        "weight_files",
        "tokenizer_fingerprint",
        "labels",
        "modules",
        "dense",
        "target_modules",
    }
)


@dataclass(frozen=True, slots=True)
class ModuleShape:
    """An adapted linear module: its full name and W's shape (out_features x in_features)."""

    name: str
    out_features: int
    in_features: int


@dataclass(frozen=True, slots=True)
class NormalInit:
    """Start from independent normal numbers with mean 0 and this standard deviation."""

    std: float


@dataclass(frozen=True, slots=True)
class ZerosInit:
    """Start from zeros."""


@dataclass(frozen=True, slots=True)
class BaseInit:
    """Devices keep the value in their base model until the first aggregate; the server has none before."""


DenseInit = NormalInit | ZerosInit | BaseInit


@dataclass(frozen=True, slots=True)
class DenseTensor:
    """A tensor that is trained and averaged as a whole: name in the base model, shape, where it starts."""

    name: str
    shape: tuple[int, ...]
    init: DenseInit


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a run adapts; raises GloraError MANIFEST_INVALID when it contradicts itself or exceeds a limit.

    `weight_files` maps file names to their SHA-256 (hex); it may be empty for a manifest written by hand, and then the
    fingerprint alone says which base model is meant. `tokenizer_fingerprint` is empty when there is no tokenizer.
    `target_modules` are the short names that were asked for ("query"), for people; `modules` are what counts.
    """

    task: Task
    base_model_name: str
    base_model_fingerprint: str
    weight_files: Mapping[str, str]
    tokenizer_fingerprint: str
    labels: tuple[str, ...]
    modules: tuple[ModuleShape, ...]
    dense: tuple[DenseTensor, ...]
    target_modules: tuple[str, ...]

    def __post_init__(self) -> None:
        _check_model(self)
        _check_labels(self)
        _check_modules(self)
        _check_dense(self)
        _check_header_size(self)

    def __hash__(self) -> int:
        """Equal for equal manifests, and found without looking at every module."""
        return hash((self.base_model_fingerprint, len(self.modules)))

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON, in hex."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """The canonical JSON text."""
        document = {
            "format": _FORMAT,
            "task": self.task,
            "base_model_name": self.base_model_name,
            "base_model_fingerprint": self.base_model_fingerprint,
            "weight_files": dict(self.weight_files),
            "tokenizer_fingerprint": self.tokenizer_fingerprint,
            "labels": list(self.labels),
            "modules": [
                {"name": module.name, "out_features": module.out_features, "in_features": module.in_features}
                for module in self.modules
            ],
            "dense": [
                {"name": dense.name, "shape": list(dense.shape), "init": _init_document(dense.init)}
                for dense in self.dense
            ],
            "target_modules": list(self.target_modules),
        }
        return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The manifest that `text` describes; raises GloraError MANIFEST_INVALID naming the key that is wrong."""
        document = strict_json.parse(text, reason=Reason.MANIFEST_INVALID, limit=_MAX_JSON)
        keys = document.record(_KEYS)
        if keys["format"].whole() != _FORMAT:
            raise keys["format"].error(f"must be {_FORMAT}, the only format that this version knows")
        return cls(
            task=_task(keys["task"]),
            base_model_name=keys["base_model_name"].text(),
            base_model_fingerprint=keys["base_model_fingerprint"].text(),
            weight_files={name: node.text() for name, node in keys["weight_files"].mapping().items()},
            tokenizer_fingerprint=keys["tokenizer_fingerprint"].text(),
            labels=tuple(node.text() for node in keys["labels"].items(MAX_LABELS)),
            modules=tuple(_module_from(node) for node in keys["modules"].items(MAX_MODULES)),
            dense=tuple(_dense_from(node) for node in keys["dense"].items(MAX_DENSE)),
            target_modules=tuple(node.text() for node in keys["target_modules"].items(MAX_MODULES)),
        )


def adapter_specs(
    manifest: Manifest, rank: int, dtype: TensorDtype, *, with_dense: bool = True, base_dense: bool = True
) -> tuple[TensorSpec, ...]:
    """Tensors of an adapter of this rank: per module A (rank x in) then B (out x rank), then the dense tensors.

    The rank is the same for every module, also where it exceeds the module's smaller side. `base_dense=False` leaves
    out the dense tensors that the server has no value of before the first aggregate (BaseInit).
    """
    specs: list[TensorSpec] = []
    for module in manifest.modules:
        specs.append(TensorSpec(lora_key(module.name, "A"), dtype, (rank, module.in_features)))
        specs.append(TensorSpec(lora_key(module.name, "B"), dtype, (module.out_features, rank)))
    if with_dense:
        specs += (
            TensorSpec(dense_key(dense.name), dtype, dense.shape)
            for dense in manifest.dense
            if base_dense or not isinstance(dense.init, BaseInit)
        )
    return tuple(specs)


def _init_document(init: DenseInit) -> dict[str, object]:
    match init:
        case NormalInit(std=std):
            return {"kind": "normal", "std": float(std)}
        case ZerosInit():
            return {"kind": "zeros"}
        case BaseInit():
            return {"kind": "base"}
        case _:
            assert_never(init)


def _init_from(node: strict_json.Node) -> DenseInit:
    kind = node.mapping().get("kind")
    match kind.text() if kind is not None else None:
        case "normal":
            return NormalInit(node.record(frozenset({"kind", "std"}))["std"].real())
        case "zeros":
            node.record(frozenset({"kind"}))
            return ZerosInit()
        case "base":
            node.record(frozenset({"kind"}))
            return BaseInit()
        case _:
            raise node.error("must have the kind 'normal' (with std), 'zeros' or 'base'")


def _task(node: strict_json.Node) -> Task:
    match node.text():
        case "sequence_classification":
            return "sequence_classification"
        case "causal_lm":
            return "causal_lm"
        case _:
            raise node.error("must be 'sequence_classification' or 'causal_lm'")


def _module_from(node: strict_json.Node) -> ModuleShape:
    keys = node.record(frozenset({"name", "out_features", "in_features"}))
    return ModuleShape(keys["name"].text(), keys["out_features"].whole(), keys["in_features"].whole())


def _dense_from(node: strict_json.Node) -> DenseTensor:
    keys = node.record(frozenset({"name", "shape", "init"}))
    shape = tuple(item.whole() for item in keys["shape"].items(_MAX_DIMENSIONS))
    return DenseTensor(keys["name"].text(), shape, _init_from(keys["init"]))


def _check_model(manifest: Manifest) -> None:
    if manifest.task not in ("sequence_classification", "causal_lm"):
        _refuse("task", "must be 'sequence_classification' or 'causal_lm'")
    _check_text("base_model_name", manifest.base_model_name, _MAX_TEXT)
    _check_hex("base_model_fingerprint", manifest.base_model_fingerprint)
    if manifest.tokenizer_fingerprint:
        _check_hex("tokenizer_fingerprint", manifest.tokenizer_fingerprint)
    if len(manifest.weight_files) > MAX_WEIGHT_FILES:
        _refuse("weight_files", f"has {len(manifest.weight_files)} entries; at most {MAX_WEIGHT_FILES} are allowed")
    for name, sha256 in manifest.weight_files.items():
        _check_text("weight_files", name, _MAX_NAME)
        _check_hex(f"weight_files.{name}", sha256)
    if manifest.weight_files and fingerprint_of(manifest.weight_files) != manifest.base_model_fingerprint:
        _refuse("base_model_fingerprint", "does not follow from weight_files; make the manifest anew from the model")


def _check_labels(manifest: Manifest) -> None:
    for index, label in enumerate(manifest.labels):
        _check_text(f"labels[{index}]", label, _MAX_TEXT)
    _check_unique("labels", manifest.labels)
    if len(manifest.labels) > MAX_LABELS:
        _refuse("labels", f"has {len(manifest.labels)} elements; at most {MAX_LABELS} are allowed")
    if manifest.task == "sequence_classification" and len(manifest.labels) < 2:
        _refuse("labels", "must name at least two classes for sequence_classification")
    if manifest.task == "causal_lm" and manifest.labels:
        _refuse("labels", "must be empty for causal_lm")
    for index, name in enumerate(manifest.target_modules):
        _check_text(f"target_modules[{index}]", name, _MAX_NAME)
    _check_unique("target_modules", manifest.target_modules)


def _check_modules(manifest: Manifest) -> None:
    if not 1 <= len(manifest.modules) <= MAX_MODULES:
        _refuse("modules", f"has {len(manifest.modules)} elements; 1 to {MAX_MODULES} are allowed")
    for index, module in enumerate(manifest.modules):
        where = f"modules[{index}]"
        _check_tensor_name(f"{where}.name", module.name)
        _check_extent(f"{where}.out_features", module.out_features)
        _check_extent(f"{where}.in_features", module.in_features)
    _check_unique("modules", [module.name for module in manifest.modules])


def _check_dense(manifest: Manifest) -> None:
    if len(manifest.dense) > MAX_DENSE:
        _refuse("dense", f"has {len(manifest.dense)} elements; at most {MAX_DENSE} are allowed")
    modules = {module.name for module in manifest.modules}
    for index, dense in enumerate(manifest.dense):
        where = f"dense[{index}]"
        _check_tensor_name(f"{where}.name", dense.name)
        # Both would have to train the same weights; and "m.lora_A.weight" would read as a factor of m.
        if not modules.isdisjoint(_parents(dense.name)) or dense.name.endswith((".lora_A.weight", ".lora_B.weight")):
            _refuse(f"{where}.name", f"is {dense.name!r}, which belongs to an adapted module")
        for axis, extent in enumerate(dense.shape):
            _check_extent(f"{where}.shape[{axis}]", extent)
        if len(dense.shape) > _MAX_DIMENSIONS or math.prod(dense.shape) > _MAX_DENSE_ELEMENTS:
            _refuse(f"{where}.shape", f"has too many dimensions or more than {_MAX_DENSE_ELEMENTS} elements")
        if isinstance(dense.init, NormalInit) and not 0 < dense.init.std <= _MAX_STD:
            _refuse(f"{where}.init.std", f"is {dense.init.std}; it must be above 0 and at most {_MAX_STD}")
    _check_unique("dense", [dense.name for dense in manifest.dense])


def _check_header_size(manifest: Manifest) -> None:
    """Refuse what no payload could carry: a header over the limit would fail every transfer of every round."""
    # Most that layout() writes for a tensor beside its name and its extents: quotes, keys, prefix, suffix, offsets.
    beside = 128
    size = sum(2 * (len(module.name) + beside) for module in manifest.modules)
    size += sum(len(dense.name) + beside + 8 * len(dense.shape) for dense in manifest.dense)
    if size > MAX_HEADER_BYTES:
        _refuse("modules", f"would need a payload header of {size} bytes; the limit is {MAX_HEADER_BYTES}: adapt fewer")


def _parents(name: str) -> Iterable[str]:
    """Names of the modules that hold a tensor: "a.b.weight" gives "a.b" and "a"."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _check_extent(where: str, extent: int) -> None:
    if not 1 <= extent <= MAX_EXTENT:
        _refuse(where, f"is {extent}; it must be from 1 to {MAX_EXTENT}")


def _check_tensor_name(where: str, name: str) -> None:
    if len(name) > _MAX_NAME or not _TENSOR_NAME.fullmatch(name):
        _refuse(where, f"is {name[:_MAX_NAME]!r}, not a dotted name of at most {_MAX_NAME} characters")


def _check_text(where: str, text: str, limit: int) -> None:
    if not text or len(text) > limit or not text.isprintable():
        _refuse(where, f"is {text[:80]!r}; it must be a printable text of 1 to {limit} characters")


def _check_hex(where: str, text: str) -> None:
    if not _HEX_32_BYTES.fullmatch(text):
        _refuse(where, f"is {text[:80]!r}, not a SHA-256 in 64 lower-case hex digits")


def _check_unique(where: str, names: Sequence[str]) -> None:
    if len(set(names)) != len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        _refuse(where, f"names {twice!r} twice")


def _refuse(key: str, what: str) -> NoReturn:
    raise GloraError(Reason.MANIFEST_INVALID, f"The manifest cannot be used: {key} {what}.", key=key)
