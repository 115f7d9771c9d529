"""The tables of docs/strategies.md are what the code says."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from glora_server.aggregation import STRATEGIES

ROOT = Path(__file__).parents[2]


def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("strategy_table", ROOT / "tools" / "strategy_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_document_is_current() -> None:
    text = (ROOT / "docs" / "strategies.md").read_text(encoding="utf-8")
    assert tool().document(text) == text, "run tools/strategy_table.py"


def test_every_strategy_and_option_has_a_row() -> None:
    table = tool().tables()
    for name, strategy in STRATEGIES.items():
        assert table.count(f"| `{name}` |") >= 3
        for option in strategy.options:
            assert f"| `{name}` | `{option.name}` |" in table


def test_a_document_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="needs the lines"):
        tool().document("# Strategies")


def test_a_stale_table_is_replaced_and_the_words_around_it_stay() -> None:
    module = tool()
    text = module.document(f"before\n{module.BEGIN}\nstale\n{module.END}\nafter\n")
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "stale" not in text
