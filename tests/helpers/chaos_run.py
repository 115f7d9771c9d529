"""Kills a server and its devices at random moments, and keeps a ledger of what may not be lost.

What is asked of a federation that is being killed: every update that the server had on its disk when it was killed is
there after the restart and counts in its round; every update that a device was told was accepted is in a committed
round; the run ends.
"""

from __future__ import annotations

import random
import re
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from e2e_data import deal, manifest_of, minilm, run_toml
from federation import Federation, completed
from glora_processes import LOOK_SECONDS, Process

from glora_dashboard.run_models import RunAnswer

RUN: Final = "chaos"
RANKS: Final = {"device-1": 4, "device-2": 8, "device-3": 32}
_ACCEPTED: Final = re.compile(rf"Round (\d+) of {RUN}: the update was accepted")
_STALL_SECONDS: Final = 600.0
_NEWS_SECONDS: Final = 60.0
_MANY: Final = 100_000


@dataclass(slots=True, kw_only=True)
class Report:
    """What happened."""

    kills: Counter[str] = field(default_factory=Counter)
    phases: Counter[str] = field(default_factory=Counter)
    """Of the round, when something was killed."""
    rounds: int = 0
    attempts: int = 0
    uploads: int = 0

    def __str__(self) -> str:
        kills = ", ".join(f"{name} {count}" for name, count in sorted(self.kills.items()))
        phases = ", ".join(f"{name} {count}" for name, count in sorted(self.phases.items()))
        return (
            f"{self.kills.total()} kills ({kills}) in the phases: {phases}; "
            f"{self.rounds} rounds in {self.attempts} attempts, {self.uploads} uploads, none lost"
        )


@dataclass(kw_only=True)
class Chaos:
    """A run that is being harmed. `folder` must be new."""

    folder: Path
    random: random.Random
    pause: tuple[float, float] = (0.5, 6.0)
    """Between two kills, seconds."""
    report: Report = field(default_factory=Report)
    _received: dict[str, str] = field(default_factory=dict)
    _running: dict[str, Process] = field(default_factory=dict)
    _rows: dict[str, Path] = field(default_factory=dict)

    def run(self, *, kills: int, seconds: float = 0.0) -> Report:
        """Do `kills` kills (and go on for so many seconds), then let the run end; raises AssertionError for a loss."""
        self.folder.mkdir(parents=True)
        with Federation(self.folder / "federation") as federation:
            self._begin(federation)
            until = time.monotonic() + seconds
            while self.report.kills.total() < kills or time.monotonic() < until:
                self._bide(federation)
                self._harm(federation)
            self._let_it_end(federation)
            self._settle(federation)
        return self.report

    def _begin(self, federation: Federation) -> None:
        paths, _ = deal(self.folder, devices=len(RANKS), held_out=16)
        self._rows = dict(zip(RANKS, paths, strict=True))
        self._running["server"] = federation.start_server()
        token = federation.token(uses=len(RANKS), max_rank=max(RANKS.values()))
        for name, rank in RANKS.items():
            federation.join(name, rank, token)
            self._start_device(federation, name)
        toml = run_toml(
            RUN,
            minilm(),
            lora=f"max_rank = {max(RANKS.values())}",
            training="steps = 3\nbatch_size = 8\nmax_length = 48",
            policy=f"rounds = {_MANY}\nquorum = {len(RANKS)}\ndeadline_seconds = 1200.0",
            evaluation="ranks = [4]\nbefore = false\nafter = false",
        )
        federation.create_run(toml, manifest_of(toml))

    def _start_device(self, federation: Federation, name: str) -> None:
        self._running[name] = federation.start_device(name, minilm(), "--data", str(self._rows[name]))

    def _bide(self, federation: Federation) -> None:
        """Wait for a random moment, or for shortly after the next thing that happens: so that something does happen."""
        if self.random.random() < 0.5:
            time.sleep(self.random.uniform(*self.pause))
            return
        happened, deadline = self._happened(federation), time.monotonic() + _NEWS_SECONDS
        while self._happened(federation) == happened and time.monotonic() < deadline:
            time.sleep(LOOK_SECONDS)
        time.sleep(self.random.uniform(0.0, 0.3))

    def _happened(self, federation: Federation) -> int:
        return sum(len(federation.events(name)) for name in ("assignment_phase", "round_phase"))

    def _harm(self, federation: Federation) -> None:
        victim = self.random.choice(["server", self.random.choice(list(RANKS))])
        self._running[victim].kill()
        federation.processes.remove(self._running[victim])
        self.report.kills["server" if victim == "server" else "device"] += 1
        self.report.phases[self._phase(federation)] += 1
        self._compare(federation)
        time.sleep(self.random.uniform(0.0, 1.0))
        if victim == "server":
            self._running["server"] = federation.start_server()
        else:
            self._start_device(federation, victim)

    def _phase(self, federation: Federation) -> str:
        rows = federation.rows("SELECT phase FROM rounds ORDER BY created_at DESC LIMIT 1")
        return str(rows[0][0]) if rows else "none"

    def _compare(self, federation: Federation) -> None:
        """What the server had received before it still has, byte for byte."""
        found = {str(a): str(d) for a, d in federation.rows("SELECT assignment_id, digest FROM uploads")}
        lost = self._received.items() - found.items()
        assert not lost, f"the database has lost {lost}"
        self._received = found

    def _let_it_end(self, federation: Federation) -> None:
        for name, process in self._running.items():
            assert process.alive, f"{name} ended by itself:\n{process.text[-2000:]}"
        # One more round than there is, undisturbed.
        rounds = federation.show_run(RUN).rounds_done + 1
        with federation.api() as api:
            api.patch(RunAnswer, f"/runs/{RUN}/policy", {"changes": {"rounds": rounds}})
        federation.wait_run(RUN, completed, "its end", _STALL_SECONDS)

    def _settle(self, federation: Federation) -> None:
        """The ledger at the end: nothing that was received or acknowledged was left out of its round."""
        self._compare(federation)
        counted = federation.rows(
            "SELECT r.number, d.name, a.phase, r.phase, a.reason FROM uploads u "
            "JOIN assignments a ON a.id = u.assignment_id JOIN rounds r ON r.id = u.round_id "
            "JOIN devices d ON d.id = u.device_id"
        )
        assert counted
        left_out = [row for row in counted if row[2] != "accepted_update" or row[3] != "committed"]
        assert not left_out, f"received, but not in the result: {left_out}"
        accepted = {(number, name) for number, name, *_ in counted}
        for name in RANKS:
            log = self._running[name].text
            told = {(int(number), name) for number in _ACCEPTED.findall(log)}
            assert told <= accepted, f"{name} was told of more than there is: {told - accepted}"
        rounds = federation.rounds(RUN)
        self.report.rounds = len({found.number for found in rounds if found.phase == "committed"})
        self.report.attempts = len(rounds)
        self.report.uploads = len(counted)
