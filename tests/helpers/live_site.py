"""A real server with pages, people of every role, and devices written by hand at work in the background."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from federation import Federation
from hand_fleet import Manner, fleet, fleet_manifest

from glora_dashboard.access_models import UserAnswer
from glora_server.coordinator.people import Role

PASSWORD: Final = "correct horse battery staple"
RUN: Final = "demo"
DEVICES: Final = {
    "pi-kitchen": 2,
    "jetson-lab": 4,
    "laptop-ada": 8,
    "phone-7": 4,
    "nuc-attic": 16,
    "tablet-3": 8,
}
MANNERS: Final = {"phone-7": Manner.DIVERGES, "tablet-3": Manner.DECLINES}


def name_of(role: Role) -> str:
    """The user of that role."""
    return f"{role}-ada"


def add_people(federation: Federation) -> None:
    """One user for each role."""
    with federation.api() as api:
        for role in Role:
            api.post(UserAnswer, "/users", {"name": name_of(role), "role": role.value, "password": PASSWORD})


def run_text(name: str, *, rounds: int = 5000, quorum: int = 3, deadline: int = 60) -> str:
    """The description of a run of the fleet, with more rounds than tests last, and versions that outlast a test."""
    return (
        f'name = "{name}"\n[model]\npath = "tiny-encoder"\nlabels = ["negative", "positive"]\n'
        f"[policy]\nrounds = {rounds}\nquorum = {quorum}\ndeadline_seconds = {deadline}\ngrace_seconds = 5\n"
        "[retention]\nkeep_versions = 100\n"
    )


def add_run(federation: Federation, name: str, *, start: bool, **policy: int) -> None:
    """A run whose model nobody has to load."""
    manifest: dict[str, object] = json.loads(fleet_manifest().to_json())
    federation.create_run(run_text(name, **policy), manifest, start=start)


@contextlib.contextmanager
def live_site(folder: Path, *, seconds: float) -> Iterator[Federation]:
    """A federation whose run goes on while the context is open; each training takes about `seconds`."""
    with Federation(folder) as federation:
        federation.start_server()
        add_people(federation)
        token = federation.token(uses=len(DEVICES), max_rank=16)
        for name, rank in DEVICES.items():
            federation.join(name, rank, token)
        folders = {name: federation.state_dir(name) for name in DEVICES}
        with fleet(folders, manners=MANNERS, seconds=seconds):
            federation.until_online(*DEVICES)
            add_run(federation, RUN, start=True)
            yield federation
