"""run.toml: what it means, and that every mistake is told with its line."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glora_server.coordinator.policy_table import POLICY_KEYS, PolicyTable
from glora_server.coordinator.run_spec import RunSpec, parse_run_toml
from glora_server.coordinator.toml_lines import key_lines, line_of
from glora_server.rounds.policy import RoundPolicy, Sampling, TooFew
from glora_wire.errors import GloraError, Reason

SMALL = 'name = "demo"\n[model]\npath = "tiny"\nlabels = ["negative", "positive"]\n'

FULL = """
name = "everything"
seed = 7

[model]
path = "models/MiniLM"
task = "causal_lm"
target_modules = ["q_proj", "v_proj"]
layers = [0, 1]

[lora]
max_rank = 12
scale = 4
dropout = 0.1
readout = "a_orthonormal"

[strategy]
name = "glora"
options = { rule = "replace", subspace = "ridge", ridge_tau = 0.2, exact = true }

[training]
steps = 10
epochs = 2.5
batch_size = 8
max_length = 64
learning_rate = 3e-3
weight_decay = 0.01
max_grad_norm = 0
optimizer = "sgd"
warmup_ratio = 0.1
schedule = "linear"
mixed_precision = true
allow_early_stop = false
extra = { mine = "yes" }

[policy]
rounds = 4
target_devices = 3
quorum = 2
over_selection = 0.5
deadline_seconds = 600
too_few = "wait"
sampling = "rank"
tags = ["lab"]
min_rank = 2

[wire]
dtype = "bfloat16"
hash = "sha256"

[limits]
max_update_norm = 100
max_training_rows = 5000
max_weight_share = 0.5
allow_own_scale = true

[evaluation]
ranks = [8, 2]
before = false
after = false

[retention]
keep_versions = 2
keep_uploads = true
"""


def refusal(text: str) -> str:
    with pytest.raises(GloraError) as caught:
        parse_run_toml(text)
    assert caught.value.reason is Reason.SPEC_INVALID
    return caught.value.message


def test_a_small_description_gets_defaults() -> None:
    spec = parse_run_toml(SMALL)
    assert spec.model.target_modules == ("query", "value")
    assert (spec.lora.max_rank, spec.lora.scale, spec.strategy.name) == (16, 2.0, "glora")
    assert spec.policy == RoundPolicy()
    assert spec.evaluation_ranks == (1, 2, 4, 8, 16)


def test_every_key_is_read() -> None:
    spec = parse_run_toml(FULL)
    assert spec.strategy.options == {"rule": "replace", "subspace": "ridge", "ridge_tau": 0.2, "exact": True}
    assert spec.policy == RoundPolicy(
        rounds=4,
        target_devices=3,
        quorum=2,
        over_selection=0.5,
        deadline_seconds=600.0,
        too_few=TooFew.WAIT,
        sampling=Sampling.RANK,
        tags=("lab",),
        min_rank=2,
    )
    assert spec.training.extra == {"mine": "yes"}
    assert spec.evaluation_ranks == (2, 8)
    written = json.loads(spec.to_json())
    for section, model in RunSpec.model_fields.items():
        keys = getattr(model.annotation, "model_fields", {})
        assert set(written[section]) == set(keys) if keys else section in written


def test_the_servers_own_rank_is_measured_also_when_it_is_no_power_of_two() -> None:
    assert parse_run_toml(f"{SMALL}[lora]\nmax_rank = 12\n").evaluation_ranks == (1, 2, 4, 8, 12)


@pytest.mark.parametrize("text", [SMALL, FULL])
def test_json_holds_everything_and_is_always_the_same(text: str) -> None:
    spec = parse_run_toml(text)
    again = RunSpec.from_json(spec.to_json())
    assert again == spec
    assert again.to_json() == spec.to_json()
    assert isinstance(again.policy, RoundPolicy)


def test_the_policy_section_is_the_policy_of_the_rounds() -> None:
    fields = {field.name: field.default for field in dataclasses.fields(RoundPolicy)}
    assert {name: field.default for name, field in PolicyTable.model_fields.items()} == fields
    assert set(POLICY_KEYS) == set(fields)


def test_every_key_says_what_it_means() -> None:
    sections = [RunSpec, PolicyTable, *(field.annotation for field in RunSpec.model_fields.values())]
    for section in sections:
        for name, field in getattr(section, "model_fields", {}).items():
            is_section = hasattr(field.annotation, "model_fields") or name == "policy"
            assert is_section or field.description, f"{section} {name}"


MISTAKES = [
    ("[training]\nbatch_size = 0", 6, "training.batch_size: must be at least 1 (you wrote 0)"),
    ('[training]\nbatch_size = "8"', 6, 'training.batch_size: must be a whole number (you wrote "8")'),
    ("[training]\nbatch_size = 8.5", 6, "training.batch_size: must be a whole number (you wrote 8.5)"),
    ("[training]\nbatch_size = true", 6, "training.batch_size: must be a whole number (you wrote true)"),
    ("[training]\n\n# here\nlearning_rate = inf", 8, "training.learning_rate: must be a finite number"),
    ('[training]\noptimizer = "adam"', 6, "training.optimizer: must be one of 'adamw' or 'sgd' (you wrote \"adam\")"),
    ("[training]\nsteps = 0\nepochs = 0", 7, "training.epochs: must be above 0 when steps is 0"),
    ("[trainig]\nsteps = 1", 5, 'trainig: is not a known key; did you mean "training"?'),
    ("[training]\nbatchsize = 1", 6, 'training.batchsize: is not a known key; did you mean "batch_size"?'),
    ("[training]\nzzz = 1", 6, "training.zzz: is not a known key; known: steps, epochs,"),
    ("[policy]\nquorom = 1", 6, 'policy.quorom: is not a known key; did you mean "quorum"?'),
    ("[policy]\nquorum = 0", 6, "policy.quorum: must be at least 1 (you wrote 0)"),
    (
        "[policy]\ntarget_devices = 2\nquorum = 3",
        7,
        "policy.quorum: must not be above target_devices (2) (you wrote 3)",
    ),
    ('[policy]\ntoo_few = "never"', 6, "policy.too_few: must be one of 'wait' or 'fail' (you wrote \"never\")"),
    ('[policy]\ntags = ["a",\n  "b",\n  3]', 8, "policy.tags[2]: must be text in quotes (you wrote 3)"),
    ("[policy]\nmin_rank = 17", 6, "policy.min_rank: must not be above lora.max_rank (16)"),
    ("policy = 3", 5, "model.policy: is not a known key"),
    (
        "[lora]\nmax_rank = 8\n[evaluation]\nranks = [4, 16]",
        8,
        "evaluation.ranks[1]: must not be above lora.max_rank (8)",
    ),
    ("[strategy]\noptions = { rule = [1] }", 6, "strategy.options.rule: must be a finite number, text in quotes"),
    ("[strategy.options]\nsince = 2024-01-01", 6, "strategy.options.since: must be a finite number"),
    ("[wire]\ndtype = 'float64'", 6, "wire.dtype: must be one of 'float32', 'bfloat16' or 'float16'"),
    ("lora = 3", 5, "model.lora: is not a known key"),
]


@pytest.mark.parametrize(("addition", "line", "sentence"), MISTAKES)
def test_a_mistake_is_told_with_its_line(addition: str, line: int, sentence: str) -> None:
    message = refusal(f"{SMALL}{addition}\n")
    assert message.startswith(f"run.toml line {line}, {sentence}")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "run.toml, name: is missing.\nrun.toml, model: is missing."),
        ('name = "x"\n[model]\n', "run.toml line 2, model.path: is missing."),
        ('name = "x y"\n[model]\npath = "p"', "run.toml line 1, name: must be letters, digits"),
        ('name = "x"\nmodel = 3', "run.toml line 2, model: must be a section with keys of its own (you wrote 3)"),
        ('name = "x"\npolicy = 3\nmodel.path = "p"', "run.toml line 2, policy: must be a section with keys of its own"),
        ('name = "x"\nmodel.path = "p"\nmodel.labels = ["a", "a"]', "run.toml line 3, model.labels: must not name"),
        ('name = "x"\nmodel.path = "p"\nmodel.labels = ["a"]', "run.toml line 3, model.labels: must name at least 2"),
        (
            'name = "x"\nmodel.path = "p"\nmodel.task = "causal_lm"\nmodel.labels = ["a", "b"]',
            "run.toml line 4, model.labels: must be left out for causal_lm",
        ),
        (
            'name = "x"\nmodel.path = "p"\nmodel.label_file = "l"\nmodel.labels = ["a", "b"]',
            "run.toml line 3, model.label_file: must be left out when labels are given",
        ),
        ("name = ", "run.toml, at its end: is not TOML"),
        ('name = "x"\nname = "y"\nseed = 1', "run.toml line 2, column 11: is not TOML: Cannot overwrite a value"),
        ("[" * 100_000, "run.toml"),
        ("x" * 1_000_001, "run.toml: must not be longer than 1000000 characters"),
    ],
)
def test_a_description_that_cannot_be_used_is_refused(text: str, sentence: str) -> None:
    assert refusal(text).startswith(sentence)


def test_all_mistakes_are_told_at_once_in_the_order_of_their_lines() -> None:
    lines = refusal(f"{SMALL}[training]\nbatch_size = 0\nstep = 3\n[lora]\nmax_rank = -1\n").splitlines()
    assert [line.split(",")[0] for line in lines] == ["run.toml line 6", "run.toml line 7", "run.toml line 9"]


def test_a_long_value_is_cut_in_the_message() -> None:
    assert len(refusal(f'{SMALL}[training]\noptimizer = "{"x" * 5000}"\n')) < 300


def test_json_that_is_none_is_refused() -> None:
    with pytest.raises(GloraError, match="is not JSON"):
        RunSpec.from_json("{")


def test_the_policy_can_be_changed_and_the_rest_stays() -> None:
    spec = parse_run_toml(SMALL)
    changed = spec.with_policy({"quorum": 2, "policy.rounds": 30, "tags": ["lab"], "too_few": "wait"})
    assert changed.policy == RoundPolicy(quorum=2, rounds=30, tags=("lab",), too_few=TooFew.WAIT)
    assert changed.model_copy(update={"policy": spec.policy}) == spec
    assert spec.policy == RoundPolicy()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"seed": 3}, "seed cannot be changed"),
        ({"lora.max_rank": 3}, "lora.max_rank cannot be changed"),
        ({"quorom": 3}, 'quorom cannot be changed (did you mean "quorum"?)'),
        ({"quorum": "3"}, "edit, policy.quorum: must be a whole number"),
        ({"quorum": 0}, "edit, policy.quorum: must be at least 1"),
        ({"quorum": 3, "target_devices": 2}, "edit, policy.quorum: must not be above target_devices (2)"),
    ],
)
def test_a_change_that_may_not_be_is_refused(changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(GloraError) as caught:
        parse_run_toml(SMALL).with_policy(changes)
    assert caught.value.message.startswith(sentence)


def test_a_refused_change_lists_what_can_be_changed() -> None:
    with pytest.raises(GloraError, match="deadline_seconds") as caught:
        parse_run_toml(SMALL).with_policy({"wire": 1})
    assert all(key in caught.value.message for key in POLICY_KEYS)


def test_a_description_cannot_be_altered() -> None:
    spec = parse_run_toml(SMALL)
    with pytest.raises(ValueError, match="frozen"):
        spec.name = "other"


# positions

TRICKY = '''"a b" = 1
c.d."e.f" = """
[not.a.table]
x = 1
"""
[t.'u']  # comment [x]
v = ['[', "]", 'a', [1,
  2], { w = 3, x.y = 4 }]
z = { k = { l = "}" } }
[[s]]
n = 1
[[s]]
n = 2
[s.deep]
m = \'\'\'
[[s]]
it''s\'\'\'
end = 2024-01-01T00:00:00Z
'''


def test_positions_in_a_document_with_everything_in_it() -> None:
    lines = key_lines(TRICKY)
    assert lines["a b",] == 1
    assert lines["c", "d", "e.f"] == 2
    assert lines["t", "u", "v", 3, 1] == 8
    assert lines["t", "u", "v", 4, "x", "y"] == 8
    assert lines["t", "u", "z", "k", "l"] == 9
    assert (lines["s", 0, "n"], lines["s", 1, "n"]) == (11, 13)
    assert lines["s", 1, "deep", "m"] == 15
    assert lines["s", 1, "deep", "end"] == 18
    assert ("not",) not in lines


def test_a_key_that_is_not_there_has_the_line_of_its_section() -> None:
    lines = key_lines(SMALL)
    assert line_of(lines, ("model", "task")) == 2
    assert line_of(lines, ("lora", "max_rank")) is None


_KEYS = st.text(st.sampled_from("ab .\"'[]{}=#\\\n"), min_size=1, max_size=6)
_VALUES = st.recursive(
    st.one_of(st.integers(), st.booleans(), st.text(st.sampled_from("ab[]{},=#\"'\\\n"), max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(_KEYS, inner, max_size=3)),
    max_leaves=6,
)


def _toml(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",\n ".join(_toml(item) for item in value) + "]"
    return json.dumps(value)


@given(st.dictionaries(_KEYS, _VALUES, max_size=5))
def test_every_top_level_key_is_found_on_its_line(document: dict[str, object]) -> None:
    text, expected, line = "", {}, 1
    for key, value in document.items():
        statement = f"{json.dumps(key)} = {_toml(value)}\n"
        expected[json.dumps(key)[1:-1]] = line
        text += statement
        line += statement.count("\n")
    found = {path[0]: line for path, line in key_lines(text).items() if len(path) == 1}
    assert found == expected
