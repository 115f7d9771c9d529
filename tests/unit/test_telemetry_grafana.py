"""The dashboards of deploy/grafana: fresh, and every expression one that Prometheus understands."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest
from promtool import DEPLOY, expressions, promtool, series_in

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


def test_every_metric_has_a_panel() -> None:
    shown = {name for path in DASHBOARDS for expression in expressions(path) for name in series_in(expression)}
    for metric in METRICS:
        if metric.kind is Kind.INFO or metric.name in {"glora_expiring_devices", "glora_versions_total"}:
            continue  # an alert has the one, the number of the version shows the other
        assert any(name == metric.name or name.startswith(f"{metric.name}_") for name in shown), metric.name
