"""sim.toml: what it says, and what people are told when it is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from glora_cli.simulate_spec import SimSpec, parse_sim_toml
from glora_wire.errors import GloraError, Reason

ROOT = Path(__file__).resolve().parents[2]
SMALL = """\
name = "small"

[data]
train = "train.jsonl"
held_out = "held_out.jsonl"

[[strategies]]
name = "glora"
"""


def _sentence(text: str) -> str:
    with pytest.raises(GloraError) as caught:
        parse_sim_toml(text)
    assert caught.value.reason is Reason.SPEC_INVALID
    return caught.value.message


def test_defaults_make_a_complete_simulation() -> None:
    spec = parse_sim_toml(SMALL)
    entry = spec.strategies[0]
    assert (spec.seeds, spec.rounds, spec.model.path) == ((0, 1, 2), 10, "demo")
    assert spec.ranks_of(entry) == (2, 4, 8, 16)
    assert spec.measured_ranks(entry) == (2, 4, 8, 16)


def test_an_entry_changes_its_own_run_only() -> None:
    text = SMALL + (
        '\n[[strategies]]\nname = "fedrot"\nlabel = "rotated"\nranks = [4]\nmax_rank = 8\n'
        'readout = "a_orthonormal"\nlearning_rate = 0.5\noptions = { rotation = "special" }\n'
    )
    spec = parse_sim_toml(text)
    plain, own = (spec.run_spec(entry, seed=7, labels=("no", "yes")) for entry in spec.strategies)
    assert (plain.lora.max_rank, plain.lora.readout, plain.training.learning_rate) == (16, "balanced", 1e-3)
    assert (own.lora.max_rank, own.lora.readout, own.training.learning_rate) == (8, "a_orthonormal", 0.5)
    assert (own.strategy.name, own.strategy.options, own.seed) == ("fedrot", {"rotation": "special"}, 7)
    assert spec.measured_ranks(spec.strategies[1]) == (4, 8)


@pytest.mark.parametrize(("share", "devices", "wanted"), [(1.0, 8, 8), (0.3, 8, 3), (0.5, 8, 4), (0.01, 8, 1)])
def test_participation_becomes_a_number_of_devices(share: float, devices: int, wanted: int) -> None:
    spec = parse_sim_toml(SMALL + f"\n[devices]\ncount = {devices}\nparticipation = {share}\n")
    run = spec.run_spec(spec.strategies[0], seed=0, labels=("no", "yes"))
    assert run.policy.target_devices == wanted


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (('name = "glora"', 'name = "glorra"'), "sim.toml line 8, strategies[0].name: There is no strategy 'glorra'"),
        (('name = "glora"', 'name = "glora"\nlabl = "x"'), "line 9, strategies[0].labl: is not a known key; did you"),
        (('train = "train.jsonl"', "train = 3"), "line 4, data.train: must be text in quotes (you wrote 3)"),
        (('name = "glora"', 'name = "glora"\nranks = [32]'), "line 9, strategies[0].ranks: must not be above"),
        (('name = "glora"', 'name = "glora"\nmax_rank = 8'), "line 9, strategies[0].max_rank: must not be below"),
        (('name = "glora"', 'name = "glora"\noptions = { rule = "sum" }'), "line 9, strategies[0].options: "),
        (('name = "small"', 'name = "small"\nseeds = [1, 1]'), "line 2, seeds: must not name anything twice"),
        (
            ("[data]", '[model]\ntarget_modules = ["key", "key"]\n[data]'),
            "line 4, model.target_modules: must not name anything twice",
        ),
    ],
)
def test_a_mistake_is_named_with_its_line(change: tuple[str, str], expected: str) -> None:
    assert expected in _sentence(SMALL.replace(*change))


def test_a_strategy_that_needs_one_rank_is_refused_when_the_description_is_read() -> None:
    assert _sentence(SMALL.replace('name = "glora"', 'name = "fedrot"\nlabel = "turned"')) == (
        "sim.toml line 8, strategies[0].name: fedrot needs devices of equal ranks, and these have 2, 4, 8, 16; give it "
        "`ranks` of its own, such as ranks = [2]."
    )


def test_mixed_ranks_that_such_a_strategy_was_given_are_named_where_they_stand() -> None:
    assert _sentence(SMALL.replace('name = "glora"', 'name = "fedrot"\nranks = [4, 8]')) == (
        "sim.toml line 9, strategies[0].ranks: must be one rank, for fedrot needs devices of equal ranks "
        "(you wrote [4, 8])."
    )


def test_common_ranks_above_the_servers_are_named_once_where_they_stand() -> None:
    """Two strategies have them, and neither has `ranks` of its own."""
    text = SMALL + '\n[[strategies]]\nname = "fedit"\n\n[devices]\nranks = [2, 4]\n\n[lora]\nmax_rank = 2\n'
    assert _sentence(text) == (
        "sim.toml line 14, devices.ranks: must not be above the server's rank, lora.max_rank = 2 (you wrote [2, 4])."
    )


def test_ranks_to_measure_that_no_strategy_reaches_are_refused() -> None:
    """They would be left out without a word: there is nothing to read out above R."""
    text = SMALL + "\n[measuring]\nranks = [8, 32, 64]\n"
    assert _sentence(text).splitlines() == [
        "sim.toml line 11, measuring.ranks[1]: must not be above the server's rank (16, the largest of the strategies) "
        "(you wrote 32).",
        "sim.toml line 11, measuring.ranks[2]: must not be above the server's rank (16, the largest of the strategies) "
        "(you wrote 64).",
    ]
    wide = parse_sim_toml(text.replace("32, 64", "32") + '\n[[strategies]]\nname = "flexlora"\nmax_rank = 32\n')
    assert [wide.measured_ranks(entry)[-1] for entry in wide.strategies] == [16, 32]


def test_two_strategies_need_two_labels() -> None:
    assert "must have a label that no other strategy has" in _sentence(SMALL + '\n[[strategies]]\nname = "glora"\n')


def test_odds_of_ranks_belong_to_the_ranks() -> None:
    assert "devices.rank_weights" in _sentence(SMALL + "\n[devices]\nranks = [2, 4]\nrank_weights = [1.0]\n")


def test_equal_descriptions_are_equal() -> None:
    assert parse_sim_toml(SMALL) == SimSpec.model_validate_json(parse_sim_toml(SMALL).model_dump_json())


@pytest.mark.parametrize("path", sorted((ROOT / "bench" / "accuracy").glob("*.toml")), ids=lambda path: path.stem)
def test_the_experiments_can_be_read(path: Path) -> None:
    spec = parse_sim_toml(path.read_text(encoding="utf-8"), source=str(path))
    assert spec.name == path.stem
    assert len(spec.seeds) >= 3


def test_the_example_of_the_documentation_can_be_read() -> None:
    text = (ROOT / "docs" / "accuracy.md").read_text(encoding="utf-8")
    example = text.split("```toml\n")[1].split("```")[0]
    assert [entry.title for entry in parse_sim_toml(example).strategies] == ["glora", "mean, R = 32"]
