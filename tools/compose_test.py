"""Build the images, bring the whole composition up, watch the demo's run to its end, tear everything down.

    make compose-test          or: python tools/compose_test.py [--keep] [--no-build]

On the way the server is killed in the middle of a round, the composition is taken down and brought up again, and the
server is shown a database that is too old and one that is too new. It needs Docker, or podman; where no registry
answers, images of others are stood in for, and the output says so. Exit status: 0 all is well, 1 it is not, 3 there is
nothing to run it with.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from compose_test_engine import Engine, NoEngineError, TestFailedError
from compose_test_images import Images
from compose_test_site import RUN, Site, status, updates_held, wait_for

ROUNDS: Final = 3
STEPS: Final = 30
DEVICES: Final = 3
"""As many as there are ranks."""
ENOUGH: Final = 0.3
"""Held-out accuracy that a model has learnt something with: always the largest of the eight classes gives 0.25."""
_MINUTES: Final = 60.0
"""Generous: the machine may have other things to do, and time is not what is tested."""
_SERVICES: Final = (
    *("secrets", "postgres", "server", "scrape-token", "prometheus", "grafana"),
    *("demo-operator", "device-2", "device-4", "device-8"),
)
_DOWNGRADE: Final = """\
from glora_server.config import Settings
from glora_server.storage import database, migrate
with database.connect(Settings.load().database_url).writer.begin() as connection:
    migrate.downgrade(connection, "-1")
"""
_STARTED: Final = time.monotonic()


def say(sentence: str) -> None:
    """Write a line with the seconds since the start."""
    sys.stdout.write(f"{time.monotonic() - _STARTED:7.1f} s  {sentence}\n")
    sys.stdout.flush()


@dataclass(slots=True, kw_only=True)
class ComposeTest:
    """The steps in their order."""

    engine: Engine
    site: Site
    images: Mapping[str, str]
    _token: str = field(default="", init=False)

    @property
    def _variables(self) -> dict[str, str]:
        own = {"GLORA_DEMO_ROUNDS": str(ROUNDS), "GLORA_DEMO_STEPS": str(STEPS)}
        return {**self.images, **self.site.variables, **own}

    def run(self) -> None:
        """Do everything; raises TestFailedError at the first thing that is not as it should be."""
        self.down(volumes=True)
        self._up()
        self._check_containers()
        self._kill_server_in_round()
        self._down_and_up()
        self._finish_run()
        self._check_prometheus()
        self._check_grafana()
        self._show_older_database()
        self._show_newer_database()

    def down(self, *, volumes: bool) -> None:
        """Take the composition down; with its volumes nothing is left of it."""
        self.engine.compose("down", *(("--volumes",) if volumes else ()), variables=self._variables, check=False)

    def show_logs(self) -> None:
        """Write what the services wrote last."""
        for service in _SERVICES:
            try:
                lines = self.engine.logs(service)
            except TestFailedError as error:
                lines = str(error)
            sys.stdout.write(f"\n--- {service}\n{lines.rstrip()}\n")

    def _up(self) -> None:
        self.engine.compose("up", "--detach", "--no-build", variables=self._variables, within=10 * _MINUTES)
        wait_for("the server is ready", self.site.is_ready, 5 * _MINUTES)
        self._token = self.engine.execute("server", "cat", "/var/lib/glora/admin.token").strip()
        say("up: the server is ready, with PostgreSQL")

    def _check_containers(self) -> None:
        """What everybody should see of a container that is locked down, and of the way in."""
        for service in ("server", "device-2"):
            user = self.engine.execute(service, "id", "-u").strip()
            _demand(user == "10001", f"{service} runs as the user {user}, not as 10001")
            # Root without capabilities may still write what is root's, unless the file system may only be read.
            trial = ("exec", "--user", "0", self.engine.container(service), "sh", "-c", "touch /opt/x && echo written")
            _demand(
                "written" not in self.engine.run(*trial, check=False),
                f"the root file system of {service} can be written to",
            )
        system = self.engine.execute("server", "glora", "db", "current")
        _demand(system.startswith("postgresql"), f"the server does not use PostgreSQL: {system}")
        page = self.site.login_page()
        _demand("/login" in page and "password" in page, f"the front page does not lead to the login: {page[:300]}")
        refused = status(f"http://127.0.0.1:{self.site.http}/metrics")
        _demand(refused == 401, f"/metrics answers {refused} to somebody without a token")
        wait_for("the server's health check passes", self._is_healthy, 2 * _MINUTES)
        say("containers: not root, read-only, healthy; the front page leads to the login; /metrics wants a token")

    def _is_healthy(self) -> bool:
        """Whether the image's own check of the server passes; without a daemon nobody asks it regularly."""
        if self.engine.is_podman:
            self.engine.run("healthcheck", "run", self.engine.container("server"))
        return self.engine.inspect("server", "{{.State.Health.Status}}") == "healthy"

    def _kill_server_in_round(self) -> None:
        """Kill the server when it has some updates of a round but not all; none of them may be lost."""

        def has_some() -> bool:
            return 0 < len(updates_held(self._run())) < DEVICES

        wait_for("a round has some of its updates", has_some, 15 * _MINUTES, poll=0.05)
        before = self._require_run()
        held = updates_held(before)
        self._kill("server")
        say(f"killed the server in round {before['round']['number']}, with {len(held)} of {DEVICES} updates")
        wait_for("the killed server is back", self.site.is_ready, 5 * _MINUTES)
        rounds = self.site.rounds(self._token)
        again = next(one for one in rounds if one["id"] == before["round"]["id"])
        _demand(again["attempt"] == before["round"]["attempt"], "the round was tried again")
        now = self._require_run()
        if now["round"] is not None and now["round"]["id"] == before["round"]["id"]:
            lost = held.keys() - updates_held(now).keys()
            _demand(not lost, f"{len(lost)} updates that the server had are gone: {lost}")
        wait_for("the round ends", lambda: self._accepted(before["round"]["id"]) == DEVICES, 10 * _MINUTES)
        say("the server came back by itself; the round went on and lost no update")

    def _down_and_up(self) -> None:
        wait_for("a round is committed", lambda: self._require_run()["rounds_done"] > 0, 10 * _MINUTES)
        before = self._require_run()["rounds_done"]
        self.down(volumes=False)
        self._up()
        after = self._require_run()["rounds_done"]
        _demand(after >= before, f"{before} rounds were done before `down`, {after} are after `up`")
        say(f"down and up: the run goes on after {after} of {ROUNDS} rounds")

    def _finish_run(self) -> None:
        wait_for("the run is complete", self._is_complete, 20 * _MINUTES, poll=1.0)
        rounds = self.site.rounds(self._token)
        complete = [one for one in rounds if one["phase"] == "committed" and one["accepted"] == DEVICES]
        _demand(len(complete) == ROUNDS == len(rounds), f"not every round has {DEVICES} updates: {rounds}")
        wait_for("a device measures the last version", lambda: self._accuracy() is not None, 10 * _MINUTES, poll=1.0)
        accuracy = self._accuracy() or 0.0
        _demand(accuracy > ENOUGH, f"the model has learnt nothing: its accuracy is {accuracy:.1%}")
        say(f"the demo's run is complete: {ROUNDS} rounds of {DEVICES} updates, held-out accuracy {accuracy:.1%}")

    def _check_prometheus(self) -> None:
        wait_for("Prometheus scrapes the server", lambda: self.site.metric('up{job="glora"}') == 1, 2 * _MINUTES)
        committed = 'sum(glora_rounds_total{outcome="committed"})'
        wait_for("Prometheus has the rounds", lambda: (self.site.metric(committed) or 0) > 0, 2 * _MINUTES)
        series = self.site.metric("count({__name__=~'glora_.+'})")
        say(f"Prometheus scrapes /metrics with its token: {series:.0f} series, rounds among them")

    def _check_grafana(self) -> None:
        wait_for("Grafana answers", lambda: '"ok"' in self.site.grafana_health().replace(" ", ""), 2 * _MINUTES)
        say(f"Grafana: {' '.join(self.site.grafana_health().split())}")

    def _show_older_database(self) -> None:
        """A server must bring a database up to date that the version before it has left."""
        self.engine.execute("server", "python", "-c", _DOWNGRADE)
        before = self._sql("SELECT version_num FROM alembic_version").strip()
        self._kill("server")
        wait_for("the server has brought the database up to date", self.site.is_ready, 3 * _MINUTES)
        after = self._sql("SELECT version_num FROM alembic_version").strip()
        _demand(after != before and self._is_complete(), f"the schema is {after} after {before}, or the run is gone")
        say(f"a database of the version before ({before}) was brought up to date ({after})")

    def _show_newer_database(self) -> None:
        """A server must refuse a database that a newer one has written, and say so."""
        found = self._sql("SELECT version_num FROM alembic_version").strip()
        self._sql("UPDATE alembic_version SET version_num = 'ffff'")
        self._kill("server")
        wait_for("the server refuses a newer database", lambda: "newer glora" in self.engine.logs("server"), 120.0)
        _demand(not self.site.is_ready(), "the server works with a database that is newer than it")
        self._sql(f"UPDATE alembic_version SET version_num = '{found}'")
        wait_for("the server is back", self.site.is_ready, 3 * _MINUTES)
        _demand(self._is_complete(), "the run is not complete any more")
        say("a database that is newer than the server: it says so and stops; with the right one it is back by itself")

    def _sql(self, statement: str) -> str:
        command = ("psql", "-U", "glora", "-d", "glora", "-At", "-v", "ON_ERROR_STOP=1", "-c", statement)
        return self.engine.execute("postgres", *command)

    def _kill(self, service: str) -> None:
        """End a service's process as the kernel would: not by the engine, which takes that for an order to stop."""
        process = int(self.engine.inspect(service, "{{.State.Pid}}"))
        if os.geteuid() == 0 and process > 0:
            os.kill(process, signal.SIGKILL)
        else:
            self.engine.run("kill", "--signal", "KILL", self.engine.container(service))
            self.engine.run("start", self.engine.container(service))

    def _run(self) -> Mapping[str, Any] | None:
        return self.site.run(self._token)

    def _require_run(self) -> Mapping[str, Any]:
        run = self._run()
        if run is None:
            raise TestFailedError(f"The server does not show the run {RUN}.")
        return run

    def _is_complete(self) -> bool:
        run = self._run()
        if run is not None and run["phase"] in {"failed", "aborted"}:
            raise TestFailedError(f"The run {run['phase']}: {run['message'] or run['reason']}")
        return run is not None and run["phase"] == "completed"

    def _accuracy(self) -> float | None:
        """Of the last version, at the largest rank, on held-out rows; None while it was not measured."""
        scores = [one for one in self._require_run()["scores"] if one["version_number"] == ROUNDS]
        return max(scores, key=lambda one: int(one["rank"]))["accuracy"] if len(scores) == DEVICES else None

    def _accepted(self, round_id: str) -> int:
        return next(int(one["accepted"]) for one in self.site.rounds(self._token) if one["id"] == round_id)


def _demand(good: bool, otherwise: str) -> None:
    if not good:
        raise TestFailedError(f"{otherwise[:1].upper()}{otherwise[1:]}.")


def _guarded(test: ComposeTest, images: Images, *, keep: bool) -> int:
    """The exit status; nothing of the test is left unless it is to be kept."""
    try:
        test.run()
    except TestFailedError as error:
        test.show_logs()
        say(f"FAILED: {error}")
        return 1
    else:
        say("PASSED")
        return 0
    finally:
        if not keep:
            test.down(volumes=True)
            images.remove()


def _main() -> int:
    parser = argparse.ArgumentParser(description="Build and run the composition, and look whether it works.")
    parser.add_argument("--keep", action="store_true", help="leave containers, volumes and images")
    parser.add_argument("--no-build", action="store_true", help="take the images that an earlier --keep left")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that nothing is left then either
    keep = bool(options.keep)
    try:
        engine = Engine.find()
        say(f"with {engine.program}")
        images = Images.of(engine, say)
        try:
            variables = images.prepare(build=not options.no_build)
        except BaseException:
            if not keep:
                images.remove()
            raise
    except NoEngineError as error:
        say(str(error))
        return 3
    except TestFailedError as error:
        say(f"FAILED: {error}")
        return 1
    return _guarded(ComposeTest(engine=engine, site=Site.choose(), images=variables), images, keep=keep)


if __name__ == "__main__":
    sys.exit(_main())
