"""The rules of deploy/prometheus: promtool's checks, its tests, and that nothing of them is empty."""

import re
import shutil
from pathlib import Path
from typing import Final

import pytest
from promtool import (
    DEPLOY,
    RULES,
    alert_blocks,
    alert_expressions,
    base_of,
    labels_left,
    promtool,
    series_in,
    unknown_labels,
)

from glora_server.telemetry.names import METRICS

TESTS: Final = RULES.with_name("alerts_test.yml")
GUIDE: Final = DEPLOY.parent / "docs" / "monitoring.md"
ALERTS: Final = tuple(alert_expressions())
_BLOCK: Final = r'- name: "{alert}: .*\n(?:(?!  - name).*\n)*'


def test_prometheus_takes_the_rules() -> None:
    assert f"SUCCESS: {len(ALERTS)} rules found" in promtool("check", "rules", RULES)


def test_prometheus_takes_the_configuration(tmp_path: Path) -> None:
    for path in RULES.parent.glob("*.yml"):
        shutil.copy(path, tmp_path)
    (tmp_path / "glora.token").write_text("x")
    said = promtool("check", "config", tmp_path / "prometheus.yml")
    assert "prometheus.yml is valid prometheus config file syntax" in said
    assert f"{len(ALERTS)} rules found" in said


def test_alerts_fire_when_they_should_and_only_then() -> None:
    assert "SUCCESS" in promtool("test", "rules", TESTS)


def test_the_tests_of_promtool_notice_an_alert_that_never_fires(tmp_path: Path) -> None:
    """promtool is content with a test that asks for nothing, so show that these ask."""
    shutil.copy(TESTS, tmp_path)
    broken = RULES.read_text(encoding="utf-8").replace("glora_round_overdue_seconds > 900", "vector(1) > 2")
    (tmp_path / RULES.name).write_text(broken, encoding="utf-8")
    with pytest.raises(AssertionError, match="GloraRoundStuck"):
        promtool("test", "rules", tmp_path / TESTS.name)


@pytest.mark.parametrize("alert", ALERTS)
def test_every_alert_is_tested_both_ways_and_has_a_runbook(alert: str) -> None:
    tests = "".join(re.findall(_BLOCK.format(alert=alert), TESTS.read_text(encoding="utf-8")))
    asked = f'alertname="{alert}", alertstate="firing"'
    assert asked in tests
    assert "exp_samples: []" in tests, "when it is quiet"
    assert re.search(r"exp_samples: \[\{", tests), "when it fires"
    block = alert_blocks()[alert]
    assert re.search(r"severity: (critical|warning|info)", block)
    assert "summary: " in block
    assert "description: " in block
    assert f"runbook_url: docs/monitoring.md#{alert.lower()}\n" in block
    assert f"\n### {alert}\n" in GUIDE.read_text(encoding="utf-8")


def test_alerts_ask_for_metrics_that_there_are() -> None:
    names = {metric.name for metric in METRICS} | {"up"}
    for alert, expression in alert_expressions().items():
        asked = {base_of(name) for name in series_in(expression)}
        assert asked, alert
        assert asked <= names, alert


def test_every_label_in_an_alert_or_its_text_is_one_that_the_series_has() -> None:
    blocks = alert_blocks()
    for alert, expression in alert_expressions().items():
        assert unknown_labels(expression) == set(), alert
        assert set(re.findall(r"\$labels\.(\w+)", blocks[alert])) <= labels_left(expression), alert
