"""The form of a new run without a browser: values there and back, problems at their fields, the run.toml it shows."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from glora_dashboard.pages.new_run_fields import (
    OMIT,
    Kind,
    choices_of,
    kind_of,
    read_value,
    shown_value,
    sort_problems,
)
from glora_dashboard.pages.new_run_toml import run_toml
from glora_server.coordinator.policy_table import PolicyTable
from glora_server.coordinator.run_sections import (
    EvaluationSpec,
    LimitsSpec,
    LoraSpec,
    ModelSpec,
    RetentionSpec,
    TrainingSpec,
    WireSpec,
)
from glora_server.coordinator.run_spec import RunSpec, parse_run_toml
from glora_wire.errors import GloraError

SECTIONS: tuple[tuple[str, type[BaseModel]], ...] = (
    ("model", ModelSpec),
    ("lora", LoraSpec),
    ("training", TrainingSpec),
    ("policy", PolicyTable),
    ("wire", WireSpec),
    ("limits", LimitsSpec),
    ("evaluation", EvaluationSpec),
    ("retention", RetentionSpec),
)
EVERYTHING: dict[str, Any] = {
    "name": "night-1",
    "seed": 7,
    "model": {"path": 'C:\\models\\"mini"', "labels": ["Wirtschaft, Börse", "sport"], "layers": [0, 3]},
    "lora": {"max_rank": 8, "readout": "a_orthonormal", "dropout": 0.05},
    "strategy": {"name": "glora", "options": {"subspace": "mean", "eta": 0.5}},
    "training": {"steps": 50, "mixed_precision": True, "extra": {"hetlora_gamma": "0.99", "a b": "c = d"}},
    "policy": {"rounds": 3, "quorum": 2, "tags": ["lab"], "sampling": "weighted", "deadline_seconds": 60.0},
    "wire": {"dtype": "bfloat16", "hash": "sha256"},
    "evaluation": {"ranks": [1, 4], "after": False},
    "retention": {"keep_uploads": True},
}


def described(document: dict[str, Any]) -> RunSpec:
    return RunSpec.from_json(json.dumps(document))


@pytest.mark.parametrize("section", SECTIONS, ids=lambda item: item[0])
def test_every_key_of_every_section_has_a_field_that_gives_back_what_it_shows(
    section: tuple[str, type[BaseModel]],
) -> None:
    name, model = section
    document = described(EVERYTHING).model_dump(mode="json")[name]
    for key, info in model.model_fields.items():
        kind = kind_of(info)
        back = read_value(kind, shown_value(kind, document[key]))
        assert back == document[key] or (back is OMIT and document[key] == ""), key
        if kind is Kind.CHOICE:
            assert document[key] in choices_of(info)


def test_a_number_that_the_browser_sends_as_a_fraction_is_whole_again() -> None:
    assert read_value(Kind.WHOLE, 3.0) == 3
    assert isinstance(read_value(Kind.WHOLE, 3.0), int)
    assert read_value(Kind.WHOLE, 2.5) == 2.5, "the server says that it must be whole"
    assert read_value(Kind.WHOLE, None) is OMIT


def test_what_is_no_number_goes_on_for_the_server_to_judge() -> None:
    assert read_value(Kind.WHOLES, "1, two, -3") == [1, "two", "-3"]
    assert read_value(Kind.PAIRS, "a = 1\nb") == {"a": "1", "b": ""}


def test_problems_stand_at_the_fields_that_they_name() -> None:
    wrong = EVERYTHING | {
        "policy": {"rounds": 0, "quorum": 2},
        "evaluation": {"ranks": [0]},
        "model": {"labels": ["a", "b"]},
    }
    with pytest.raises(GloraError) as caught:
        RunSpec.from_json(json.dumps(wrong), source="form")
    places = ("name", "model.path", "policy.rounds", "policy.quorum", "evaluation.ranks")
    told, rest = sort_problems([*caught.value.message.splitlines(), "Strategy x is unknown."], places)
    assert set(told) == {"model.path", "policy.rounds", "evaluation.ranks"}
    assert told["policy.rounds"] == "must be at least 1 (you wrote 0)."
    assert rest == ["Strategy x is unknown."]


def test_the_previews_run_toml_says_the_same_run() -> None:
    spec = described(EVERYTHING)
    assert parse_run_toml(run_toml(spec)) == spec


def test_defaults_are_left_out_of_the_preview() -> None:
    assert run_toml(described({"name": "a", "model": {"path": "m"}})) == 'name = "a"\n\n[model]\npath = "m"\n'


TEXTS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)


@given(path=TEXTS, labels=st.lists(TEXTS, min_size=2, max_size=4, unique=True), extra=st.dictionaries(TEXTS, TEXTS))
@settings(max_examples=60, deadline=None)
def test_any_text_survives_the_preview(path: str, labels: list[str], extra: dict[str, str]) -> None:
    spec = described({"name": "a", "model": {"path": path, "labels": labels}, "training": {"extra": extra}})
    assert parse_run_toml(run_toml(spec)) == spec
