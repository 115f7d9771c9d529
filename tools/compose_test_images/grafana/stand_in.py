"""Answers /api/health where Grafana would, once everything that Grafana would read lies where it looks."""

from __future__ import annotations

import json
import os
import re
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

PROVISIONING = Path("/etc/grafana/provisioning")
DASHBOARDS = Path("/var/lib/grafana/dashboards/glora")


class _Health(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        found = self.path == "/api/health"
        body = json.dumps({"database": "ok", "version": "stand-in", "dashboards": _titles()} if found else {}).encode()
        self.send_response(200 if found else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *_: object) -> None:  # noqa: A002 (its name there)
        pass


def _titles() -> list[str]:
    """Of the dashboards that were provisioned."""
    return sorted(json.loads(path.read_text(encoding="utf-8"))["title"] for path in DASHBOARDS.glob("*.json"))


def _main() -> None:
    password = re.fullmatch(r"\$__file\{(.+)\}", os.environ["GF_SECURITY_ADMIN_PASSWORD"])
    if password is None or not Path(password[1]).read_text(encoding="utf-8").strip():
        sys.exit("The password is not in a file, or empty.")
    provider = (PROVISIONING / "dashboards" / "glora.yml").read_text(encoding="utf-8")
    if f"path: {DASHBOARDS}" not in provider or not _titles():
        sys.exit(f"There are no dashboards in {DASHBOARDS}, or nothing that provisions them.")
    if "${GLORA_PROMETHEUS_URL}" not in (PROVISIONING / "datasources" / "prometheus.yml").read_text(encoding="utf-8"):
        sys.exit("Nothing says where Prometheus is.")
    if not os.environ["GLORA_PROMETHEUS_URL"].startswith("http"):
        sys.exit("GLORA_PROMETHEUS_URL is not an address.")
    Path("/var/lib/grafana/written").touch()
    HTTPServer(("", 3000), _Health).serve_forever()


if __name__ == "__main__":
    _main()
