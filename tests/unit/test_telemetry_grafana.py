"""The dashboards of deploy/grafana: fresh, and every expression one that Prometheus understands."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest
from promtool import DEPLOY, expressions, labels_left, labels_of, promtool, queries, series_in, unknown_labels

from glora_server.telemetry.names import METRICS, Kind

DASHBOARDS: Final = sorted((DEPLOY / "grafana" / "dashboards").glob("*.json"))
BUILDER: Final = DEPLOY.parent / "tools" / "build_grafana.py"


def test_the_committed_dashboards_are_what_the_script_writes() -> None:
    done = subprocess.run([sys.executable, BUILDER, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_there_are_two_dashboards_and_each_has_panels_with_expressions() -> None:
    assert [path.name for path in DASHBOARDS] == ["federation.json", "server.json"]
    for path in DASHBOARDS:
        panels = [panel for panel in json.loads(path.read_text())["panels"] if panel["type"] != "row"]
        assert len(panels) > 15, path.name
        assert all(panel["targets"] and panel["title"] and panel["description"].endswith(".") for panel in panels)
        ids = [panel["id"] for panel in json.loads(path.read_text())["panels"]]
        assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_prometheus_understands_every_expression(path: Path, tmp_path: Path) -> None:
    rules = [
        {"record": f"panel:expression:{number}", "expr": expression}
        for number, expression in enumerate(expressions(path))
    ]
    written = tmp_path / "rules.yml"
    # JSON is YAML.
    written.write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))
    assert f"{len(rules)} rules found" in promtool("check", "rules", written)


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_every_label_in_an_expression_or_a_legend_is_one_that_the_series_has(path: Path) -> None:
    for expression, legend in queries(path):
        assert unknown_labels(expression) == set(), expression
        assert set(re.findall(r"\{\{(\w+)", legend)) <= labels_left(expression), f"{legend} of {expression}"


def test_runs_are_listed_by_a_label_that_there_is() -> None:
    variables = json.loads(DASHBOARDS[0].read_text())["templating"]["list"]
    found = [re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]) for variable in variables]
    asked = [match.groups() for match in found if match]
    assert asked == [("glora_run_version", "run")]
    assert all(label in labels_of(series) for series, label in asked)


def test_every_metric_has_a_panel() -> None:
    shown = {name for path in DASHBOARDS for expression in expressions(path) for name in series_in(expression)}
    for metric in METRICS:
        if metric.kind is Kind.INFO or metric.name in {"glora_expiring_devices", "glora_versions_total"}:
            continue  # an alert has the one, the number of the version shows the other
        assert any(name == metric.name or name.startswith(f"{metric.name}_") for name in shown), metric.name
