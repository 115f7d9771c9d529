"""What the test asks of the running composition, over the ports that it publishes."""

from __future__ import annotations

import json
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any, Final

from compose_test_engine import TestFailedError

RUN: Final = "demo"
HELD: Final = frozenset({"received", "accepted_update"})
"""Phases in which the server has a device's whole update."""
_POLL_SECONDS: Final = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Ports of the composition on this machine; all of them were free."""

    http: int
    grpc: int
    enrolment: int
    prometheus: int
    grafana: int

    @classmethod
    def choose(cls) -> Site:
        """Free ports."""
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(5)]
        http, grpc, enrolment, prometheus, grafana = (found.getsockname()[1] for found in sockets)
        for found in sockets:
            found.close()
        return cls(http=http, grpc=grpc, enrolment=enrolment, prometheus=prometheus, grafana=grafana)

    @property
    def variables(self) -> dict[str, str]:
        """Those of docker-compose.yml."""
        return {
            "GLORA_HTTP_PUBLISH": f"127.0.0.1:{self.http}",
            "GLORA_GRPC_PUBLISH": f"127.0.0.1:{self.grpc}",
            "GLORA_ENROLMENT_PUBLISH": f"127.0.0.1:{self.enrolment}",
            "PROMETHEUS_PUBLISH": f"127.0.0.1:{self.prometheus}",
            "GRAFANA_PUBLISH": f"127.0.0.1:{self.grafana}",
        }

    def is_ready(self) -> bool:
        """Whether the server says that it can work."""
        return status(f"http://127.0.0.1:{self.http}/readyz") == 200

    def run(self, token: str) -> Mapping[str, Any] | None:
        """The demo's run as the API shows it; None while it is not there or nobody answers."""
        try:
            run: Mapping[str, Any] = json.loads(fetch(f"http://127.0.0.1:{self.http}/api/v1/runs/{RUN}", token))
        except (OSError, HTTPException):
            return None
        return run

    def rounds(self, token: str) -> list[Mapping[str, Any]]:
        """Every attempt at a round, with the number of updates that were accepted."""
        answer = json.loads(fetch(f"http://127.0.0.1:{self.http}/api/v1/runs/{RUN}/rounds", token))
        rounds: list[Mapping[str, Any]] = answer["items"]
        return rounds

    def login_page(self) -> str:
        """Where a browser lands that asks for the front page."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.http}/", headers={"Accept": "text/html"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return f"{answer.url}\n{answer.read().decode()}"

    def metric(self, query: str) -> float | None:
        """The newest value that Prometheus has of an expression; None while it has none."""
        question = urllib.parse.urlencode({"query": query})
        try:
            answer = json.loads(fetch(f"http://127.0.0.1:{self.prometheus}/api/v1/query?{question}"))
        except (OSError, HTTPException):
            return None
        result = answer["data"]["result"]
        return float(result[0]["value"][1]) if result else None

    def grafana_health(self) -> str:
        """What Grafana, or what stands in for it, says about itself; empty while it says nothing."""
        try:
            return fetch(f"http://127.0.0.1:{self.grafana}/api/health")
        except (OSError, HTTPException):
            return ""


def fetch(url: str, token: str = "") -> str:
    """The body of an answer; raises OSError for anything but success."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return str(answer.read(), "utf-8")


def status(url: str) -> int:
    """The status of an answer; 0 when there is none."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, HTTPException):
        return 0


def updates_held(run: Mapping[str, Any] | None) -> dict[str, str]:
    """Phases of the open round's assignments whose updates the server has, by their id."""
    if run is None or run["round"] is None:
        return {}
    return {one["id"]: one["phase"] for one in run["round"]["assignments"] if one["phase"] in HELD}


def wait_for(what: str, found: Callable[[], bool], within: float, *, poll: float = _POLL_SECONDS) -> None:
    """Return once `found` says yes; raises TestFailedError when that takes too long."""
    end = time.monotonic() + within
    while not found():
        if time.monotonic() > end:
            raise TestFailedError(f"Waited {within:.0f} s in vain: {what}.")
        time.sleep(poll)
