"""PEFT's adapter_config.json: written for a readout, and read for the scale that a device trained with."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NoReturn

from glora_wire.errors import GloraError, Reason

TaskType = Literal["SEQ_CLS", "CAUSAL_LM"]

MAX_CONFIG_BYTES: Final = 256 * 1024
_MAX_RANK: Final = 65_536
_MAX_SCALE: Final = 1e6
_MAX_COMPARISONS: Final = 4_000_000
_MAX_REGEX_STEPS: Final = 20_000_000_000
"""Upper bound of the backtracking steps; about two seconds in the worst case, milliseconds for honest patterns."""
_MAX_REGEX_CHARACTERS: Final = 256
_QUANTIFIER: Final = re.compile(r"(?<!\()[+*?]")
_LITERAL: Final = re.compile(r"[\w.-]+", re.ASCII)
_SAFE_REGEX: Final = re.compile(r"(?:\\[.dwDW]|\[[\w-]+\]|\(\?:|[\w.\-^$|()+*?])+", re.ASCII)

# Options that change what the factors mean, with the values under which they do not.
_MUST_BE: Final[Mapping[str, tuple[object, ...]]] = {
    "bias": (None, "none"),
    "lora_bias": (None, False),
    "use_dora": (None, False),
    "use_qalora": (None, False),
    "use_bdlora": (None, False),
    "fan_in_fan_out": (None, False),
    "layer_replication": (None, []),
    "megatron_config": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleScale:
    """Rank and alpha of one module, and the factor s that multiplies B A: alpha / r, or alpha / sqrt(r) (rsLoRA)."""

    rank: int
    alpha: float
    scale: float


def adapter_config_json(
    *,
    rank: int,
    scale: float,
    target_modules: Sequence[str],
    task_type: TaskType,
    base_model_name: str,
    modules_to_save: Sequence[str],
    dropout: float = 0.0,
) -> str:
    """adapter_config.json of a LoRA adapter with lora_alpha = scale * rank, deterministic.

    `target_modules` are full module names, so that PEFT adapts exactly these.
    """
    alpha = scale * rank
    document = {
        "alpha_pattern": {},
        "base_model_name_or_path": base_model_name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": dropout,
        "modules_to_save": list(modules_to_save) or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {},
        "target_modules": list(target_modules),
        "task_type": task_type,
        "use_dora": False,
        "use_rslora": False,
    }
    return json.dumps(document, indent=2, sort_keys=True)


def scales_from_config(text: str, modules: Sequence[str]) -> dict[str, ModuleScale]:
    """Rank, alpha and scale of each of `modules` as PEFT would derive them from this adapter_config.json.

    Honours r, lora_alpha, use_rslora, rank_pattern and alpha_pattern. Raises GloraError CONFIG_INVALID for a text that
    is too long or not such a file, and for options under which s * B * A would not be the whole update.
    """
    document = _decode(text)
    if document.get("peft_type") != "LORA":
        _refuse(f"its peft_type is {_short(document.get('peft_type'))}; only LORA can be aggregated")
    for option, allowed in _MUST_BE.items():
        if document.get(option) not in allowed:
            _refuse(f"{option} is {_short(document[option])}, which changes what the factors mean; leave it out")
    rank = _whole(document.get("r"), "r")
    alpha = _real(document.get("lora_alpha"), "lora_alpha")
    rslora = document.get("use_rslora") or False
    if not isinstance(rslora, bool):
        _refuse(f"use_rslora is {_short(rslora)}, not true or false")
    ranks = {key: _whole(value, "rank_pattern") for key, value in _pattern(document, "rank_pattern").items()}
    alphas = {key: _real(value, "alpha_pattern") for key, value in _pattern(document, "alpha_pattern").items()}
    rank_of = _Patterns(ranks, modules)
    alpha_of = _Patterns(alphas, modules)
    return {name: _scale(rank_of.find(name, rank), alpha_of.find(name, alpha), rslora) for name in modules}


def _scale(rank: float, alpha: float, rslora: bool) -> ModuleScale:
    scale = alpha / (math.sqrt(rank) if rslora else rank)
    if not 0 < scale <= _MAX_SCALE:
        _refuse(f"lora_alpha {alpha} at rank {rank} gives the scale {scale}, which is not between 0 and {_MAX_SCALE:g}")
    return ModuleScale(rank=int(rank), alpha=alpha, scale=scale)


class _Patterns:
    """PEFT's get_pattern_key: the first key that, read as a regex, matches the end of a name after a dot or all of it.

    Keys come from devices and are run as regexes, so only those are taken whose matching time is bounded.
    """

    def __init__(self, values: Mapping[str, float], modules: Sequence[str]) -> None:
        if len(values) * len(modules) > _MAX_COMPARISONS:
            _refuse(f"it has {len(values)} patterns, too many for {len(modules)} modules")
        self._compiled = [(_tail(key), _compile(key), value) for key, value in values.items()]
        if _steps(values, modules) > _MAX_REGEX_STEPS:
            _refuse(f"its patterns take too long to match with {len(modules)} modules; name the modules in full")

    def find(self, name: str, default: float) -> float:
        """Value of the first pattern that matches `name`, else `default`."""
        for tail, regex, value in self._compiled:
            if name.endswith(tail) and regex.match(name):
                return value
        return default


def _tail(key: str) -> str:
    """What every name that `key` matches must end with; a cheap test before the regex."""
    return key.rpartition(".")[2] if _LITERAL.fullmatch(key) else ""


def _steps(keys: Iterable[str], modules: Sequence[str]) -> int:
    """Upper bound of the steps of all regexes: each repetition tries every length, PEFT's prefix being one more."""
    powers = [0] * 4
    for name in modules:
        for power in range(1, 4):
            powers[power] += len(name) ** power
    return sum(
        powers[1 + len(_QUANTIFIER.findall(key))] * (1 + key.count("|")) for key in keys if not _LITERAL.fullmatch(key)
    )


def _compile(key: str) -> re.Pattern[str]:
    if not _LITERAL.fullmatch(key) and not _bounded(key):
        _refuse(f"the pattern {_short(key)} is not a simple one; name the modules in full")
    try:
        return re.compile(rf"(.*\.)?({key})$")
    except re.error as error:
        raise _error(f"the pattern {_short(key)} is not a regular expression ({error})") from error


def _bounded(key: str) -> bool:
    """Whether matching takes polynomial time of low degree: few quantifiers, none on a group, few groups."""
    return (
        len(key) <= _MAX_REGEX_CHARACTERS
        and _SAFE_REGEX.fullmatch(key) is not None
        and len(_QUANTIFIER.findall(key)) <= 2
        and key.count("(") <= 2
        and not re.search(r"\)[+*?]", key)
    )


def _decode(text: str) -> dict[str, object]:
    if len(text) > MAX_CONFIG_BYTES or len(text.encode("utf-8", "surrogatepass")) > MAX_CONFIG_BYTES:
        _refuse(f"it is longer than {MAX_CONFIG_BYTES} bytes")
    try:
        document = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _error(f"it is not JSON ({type(error).__name__})") from error
    if not isinstance(document, dict):
        _refuse("it is not a JSON object")
    return document


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise ValueError("a key twice")
    return document


def _pattern(document: Mapping[str, object], name: str) -> dict[str, object]:
    value = document.get(name) or {}
    if not isinstance(value, dict):
        _refuse(f"{name} is {_short(value)}, not an object")
    return value


def _whole(value: object, name: str) -> int:
    if type(value) is not int or not 1 <= value <= _MAX_RANK:
        _refuse(f"{name} is {_short(value)}, not a whole number from 1 to {_MAX_RANK}")
    return value


def _real(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1e12:
        _refuse(f"{name} is {_short(value)}, not a positive number")
    return float(value)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _error(what: str) -> GloraError:
    return GloraError(Reason.CONFIG_INVALID, f"The adapter_config.json cannot be used: {what}.")


def _refuse(what: str) -> NoReturn:
    raise _error(what)
