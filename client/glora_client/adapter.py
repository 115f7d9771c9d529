"""The model of a device and the adapters on it; the only file that knows peft's model classes.

The base model is loaded once and stays. Each round delivers payload files; `AdaptedModel.attach` puts their factors in
place of the last ones, whatever their rank, and `AdaptedModel.write` makes a payload of what was trained. Dense
tensors (a classification head) are the base model's own parameters here: peft's wrapper around `modules_to_save`
would keep a second copy of each, and the names in the files are the same either way.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, Protocol

import torch
from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn

from glora_client.plan import AdapterUse, DeliveredAdapter, FactorSet
from glora_wire.adapter_config import scales_from_config
from glora_wire.errors import GloraError, Reason
from glora_wire.manifest import BaseInit, Manifest, adapter_specs
from glora_wire.names import DenseKey, Factor, LoraKey, dense_key, lora_key, split_key
from glora_wire.payload import PayloadWriter, check_specs, read_header
from glora_wire.tensors import TensorDtype, TensorSpec

_MAIN: Final = "default"
_FACTORS: Final[tuple[Factor, Factor]] = ("A", "B")
_PLAIN_KEYS: Final = ("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern")
TORCH_DTYPES: Final = {
    TensorDtype.FLOAT32: torch.float32,
    TensorDtype.BFLOAT16: torch.bfloat16,
    TensorDtype.FLOAT16: torch.float16,
}


class _LoadResult(Protocol):
    missing_keys: list[str]
    unexpected_keys: list[str]


class AdaptedModel:
    """A base model with one adapter to train or evaluate, frozen ones beside it and merged ones inside it."""

    def __init__(self, base: nn.Module, manifest: Manifest) -> None:
        self._base = base
        self._manifest = manifest
        self._peft: PeftModel | None = None
        self._merged: dict[str, Tensor] = {}
        base.requires_grad_(requires_grad=False)
        parameters = dict(base.named_parameters())
        self._dense = {tensor.name: _found(parameters, tensor.name) for tensor in manifest.dense}
        self._pristine = {name: parameter.detach().clone() for name, parameter in self._dense.items()}

    @property
    def model(self) -> nn.Module:
        """The model to call: with the adapters once some are attached."""
        return self._base if self._peft is None else self._peft

    def attach(self, adapters: Sequence[DeliveredAdapter], *, dtype: TensorDtype) -> None:
        """Replace every adapter by these; the first TRAIN or EVALUATE one becomes the main one.

        `dtype` is the number format of the files. Merges count from the pristine base model: an assignment lists
        every one that it needs. Raises GloraError: those of `check_specs`, PAYLOAD_MALFORMED, CONFIG_INVALID,
        NON_FINITE.
        """
        mains = [adapter for adapter in adapters if adapter.use in {AdapterUse.TRAIN, AdapterUse.EVALUATE}]
        if len(mains) != 1:
            raise GloraError(Reason.CONFIG_INVALID, f"The assignment has {len(mains)} main adapters; it needs one.")
        self._undo_merges()
        for adapter in adapters:
            if adapter.use is AdapterUse.MERGE:
                self._merge(adapter, dtype)
        frozen = [adapter for adapter in adapters if adapter.use is AdapterUse.FROZEN]
        names = {_MAIN: mains[0]} | {f"frozen{number}": adapter for number, adapter in enumerate(frozen)}
        self._drop()
        for name, adapter in names.items():
            self._add(name, adapter, dtype)
        if self._peft is not None:
            # Deleting adapters moves peft's own idea of the active one, which its forward asks for.
            self._peft.set_adapter(_MAIN)
        for layer in self._lora_layers().values():
            layer.set_adapter(list(names))
        self.set_trainable(FactorSet.BOTH if mains[0].use is AdapterUse.TRAIN else None)

    def set_trainable(self, mask: FactorSet | None) -> None:
        """Mark what training may change: the main adapter's factors in `mask` and the dense tensors; None: nothing."""
        for name, parameter in self.model.named_parameters():
            is_a, is_b = f".lora_A.{_MAIN}." in name, f".lora_B.{_MAIN}." in name
            wanted = (is_a and mask in {FactorSet.A, FactorSet.BOTH}) or (
                is_b and mask in {FactorSet.B, FactorSet.BOTH}
            )
            parameter.requires_grad_(wanted)
        for parameter in self._dense.values():
            parameter.requires_grad_(mask is not None)

    def shrink(self, rank: int) -> None:
        """Make the main adapter one of that smaller rank: the directions beyond it are zero from now on."""
        with torch.no_grad():
            for module in self._manifest.modules:
                self._tensor(lora_key(module.name, "A"))[rank:] = 0.0
                self._tensor(lora_key(module.name, "B"))[:, rank:] = 0.0

    def write(self, path: Path, *, rank: int, dtype: TensorDtype, upload_set: FactorSet = FactorSet.BOTH) -> None:
        """Write the main adapter, its first `rank` directions, and the dense tensors as a payload file.

        Raises GloraError TRAINING_DIVERGED when a number is not finite, also one that `dtype` cannot hold; OSError.
        """
        tensors = {spec.name: self._tensor(spec.name) for spec in adapter_specs(self._manifest, rank, dtype)}
        specs = [spec for spec in adapter_specs(self._manifest, rank, dtype) if _is_sent(spec.name, upload_set)]
        with PayloadWriter(path, specs) as writer:
            for spec in specs:
                numbers = _first(tensors[spec.name].detach(), spec).to("cpu", TORCH_DTYPES[dtype]).contiguous()
                if not bool(torch.isfinite(numbers).all()):
                    raise GloraError(
                        Reason.TRAINING_DIVERGED,
                        f"After training {spec.name} holds numbers that are not finite in {dtype}; "
                        "a smaller learning rate or fewer local steps will help.",
                        tensor=spec.name,
                    )
                writer.write(spec.name, numbers.view(torch.uint8).numpy().data.cast("B"))

    def scale(self) -> float:
        """The scale alpha / r that the main adapter's modules have in common.

        Raises GloraError SCALE_WRONG when they differ or nothing is attached.
        """
        scales = {float(layer.scaling[_MAIN]) for layer in self._lora_layers().values()}
        if len(scales) != 1:
            raise GloraError(Reason.SCALE_WRONG, f"The adapter's modules have {len(scales)} different scales.")
        return scales.pop()

    def _add(self, name: str, adapter: DeliveredAdapter, dtype: TensorDtype) -> None:
        config = _lora_config(adapter.config_json, [module.name for module in self._manifest.modules])
        tensors = self._load(adapter, dtype)
        with warnings.catch_warnings():
            # peft 0.21 asks transformers 5 for an attribute that is deprecated there, and tells about GPT-2's layout.
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
            if self._peft is None:
                self._peft = PeftModel(self._base, config, adapter_name=name)
            else:
                self._peft.add_adapter(name, config)
        if set(self._lora_layers()) != {module.name for module in self._manifest.modules}:
            raise GloraError(
                Reason.CONFIG_INVALID,
                "The adapter_config.json adapts other modules of this model than the manifest names.",
            )
        factors = {key: tensor for key, tensor in tensors.items() if isinstance(split_key(key), LoraKey)}
        result: _LoadResult = set_peft_model_state_dict(self._peft, factors, adapter_name=name)
        missing = [key for key in result.missing_keys if f".{name}." in key and "lora_" in key]
        if result.unexpected_keys or missing:
            raise GloraError(
                Reason.TENSOR_NAMES_WRONG,
                f"The adapter does not fit the model: {len(missing)} factors are missing and "
                f"{len(result.unexpected_keys)} are not known ({', '.join([*missing, *result.unexpected_keys][:3])}).",
            )
        if name == _MAIN:
            self._set_dense(tensors)

    def _load(self, adapter: DeliveredAdapter, dtype: TensorDtype) -> dict[str, Tensor]:
        """Tensors of a file that was checked against the manifest."""
        header = read_header(adapter.path)
        present = {spec.name for spec in header.specs}
        expected = _expected(self._manifest, adapter.rank, dtype, present)
        if adapter.use in {AdapterUse.FROZEN, AdapterUse.MERGE}:
            # Dense tensors come with what is trained or evaluated.
            expected = [spec for spec in expected if isinstance(split_key(spec.name), LoraKey) or spec.name in present]
        check_specs(header, expected)
        tensors = load_file(str(adapter.path))
        for name, tensor in tensors.items():
            if not bool(torch.isfinite(tensor).all()):
                raise GloraError(Reason.NON_FINITE, f"The delivered adapter has numbers that are not finite in {name}.")
        return tensors

    def _set_dense(self, tensors: Mapping[str, Tensor]) -> None:
        delivered = {key.name: tensors[text] for text in tensors if isinstance(key := split_key(text), DenseKey)}
        with torch.no_grad():
            for name, parameter in self._dense.items():
                parameter.copy_(delivered.get(name, self._pristine[name]))

    def _drop(self) -> None:
        if self._peft is not None:
            for name in list(self._peft.peft_config):
                self._peft.delete_adapter(name)

    def _lora_layers(self) -> dict[str, LoraLayer]:
        prefix = "base_model.model."
        return {
            name.removeprefix(prefix): module
            for name, module in self.model.named_modules()
            if isinstance(module, LoraLayer)
        }

    def _tensor(self, key: str) -> Tensor:
        parsed = split_key(key)
        if isinstance(parsed, DenseKey):
            return self._dense[parsed.name]
        layer = self._lora_layers()[parsed.module]
        factors: nn.ModuleDict = layer.lora_A if parsed.factor == "A" else layer.lora_B
        weight = factors[_MAIN].weight
        assert isinstance(weight, Tensor)  # noqa: S101 - narrows nn.Module's attribute type
        return weight

    def _merge(self, adapter: DeliveredAdapter, dtype: TensorDtype) -> None:
        """W <- W + s B A for every module, the pristine weights kept."""
        tensors = self._load(adapter, dtype)
        scales = scales_from_config(adapter.config_json, [module.name for module in self._manifest.modules])
        weights = {name: _plain_weight(name, module) for name, module in self._base_layers()}
        for module in self._manifest.modules:
            weight, transposed = weights[module.name]
            a, b = (tensors[lora_key(module.name, factor)].float() for factor in _FACTORS)
            update = scales[module.name].scale * (b @ a)
            self._merged.setdefault(module.name, weight.detach().clone())
            with torch.no_grad():
                weight.add_((update.T if transposed else update).to(weight.device, weight.dtype))

    def _undo_merges(self) -> None:
        if not self._merged:
            return
        weights = {name: _plain_weight(name, module)[0] for name, module in self._base_layers()}
        with torch.no_grad():
            for name, pristine in self._merged.items():
                weights[name].copy_(pristine)
        self._merged.clear()

    def _base_layers(self) -> Iterator[tuple[str, nn.Module]]:
        wanted = {module.name for module in self._manifest.modules}
        lora = self._lora_layers()
        if lora:
            yield from ((name, layer.get_base_layer()) for name, layer in lora.items())
        else:
            yield from ((name, module) for name, module in self._base.named_modules() if name in wanted)


def _expected(manifest: Manifest, rank: int, dtype: TensorDtype, present: set[str]) -> Sequence[TensorSpec]:
    """What a file must hold; dense tensors that start as the base model's are absent from the first version."""
    from_base = {dense_key(tensor.name) for tensor in manifest.dense if isinstance(tensor.init, BaseInit)}
    return adapter_specs(manifest, rank, dtype, base_dense=bool(from_base & present))


def _first(tensor: Tensor, spec: TensorSpec) -> Tensor:
    """The leading part of a factor that has the planned shape; factors of a smaller rank are slices."""
    return tensor[tuple(slice(extent) for extent in spec.shape)]


def _is_sent(key: str, upload_set: FactorSet) -> bool:
    parsed = split_key(key)
    return isinstance(parsed, DenseKey) or upload_set in {FactorSet.BOTH, FactorSet(parsed.factor)}


def _lora_config(text: str, modules: list[str]) -> LoraConfig:
    """Configuration for this model; only what plain LoRA needs is taken from the text.

    Raises GloraError CONFIG_INVALID.
    """
    scales_from_config(text, modules)
    document = json.loads(text)
    try:
        values = {key: document[key] for key in _PLAIN_KEYS if document.get(key) is not None}
        return LoraConfig(target_modules=modules, init_lora_weights=False, **values)
    except (ValueError, TypeError) as error:
        raise GloraError(
            Reason.CONFIG_INVALID, f"The adapter_config.json of the delivered adapter cannot be used: {error}."
        ) from error


def _found(parameters: Mapping[str, nn.Parameter], name: str) -> nn.Parameter:
    if name not in parameters:
        raise GloraError(
            Reason.BASE_MODEL_MISMATCH,
            f"The run trains {name!r}, which this model does not have; start the client with the run's base model.",
            tensor=name,
        )
    return parameters[name]


def _plain_weight(name: str, module: nn.Module) -> tuple[nn.Parameter, bool]:
    """The weight of a linear module and whether it is stored as (in, out), as in GPT-2."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
        raise GloraError(
            Reason.CONFIG_INVALID,
            f"The run merges adapters into the base model, but {name!r} is quantised; start the client without it.",
        )
    return weight, type(module).__name__ == "Conv1D"
