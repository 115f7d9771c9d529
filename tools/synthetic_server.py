"""Serves a federation that never was: `python tools/synthetic_server.py FOLDER --devices 1000 --rounds 1000`.

Fills FOLDER unless it holds a database already, then serves it; four of five devices seem to be there, and a round
goes on. For looking at pages and for measuring, not for work. Sign in as admin with the password that is printed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from synthetic_history import DATABASE, Crowd, fill

from glora_server.config import Settings, prepare_data_dir
from glora_server.main import Server
from glora_server.telemetry.logging import configure_logging

PASSWORD = "synthetic-but-long"
"""Of a server that holds nothing."""


def settings_for(folder: Path, port: int) -> Settings:
    """Settings of a server on this machine only, with free ports for devices."""
    overrides: dict[str, object] = {
        "http.port": port,
        "http.admin_password": PASSWORD,
        "grpc.port": 0,
        "enrolment.port": 0,
        "worker.threads": 1,
    }
    return Settings.load(data_dir=folder, env={}, overrides=overrides)


async def serve(settings: Settings) -> None:
    """Serve until interrupted."""
    async with Server(settings) as server:
        crowd = await Crowd.of(server.services.hub, server.services.store)
        sys.stdout.write(f"http://127.0.0.1:{server.http_port}  user admin, password {PASSWORD}\n")
        sys.stdout.flush()
        await crowd.stay()


def main() -> None:
    """Fill and serve."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--devices", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--per-round", type=int, default=50, help="devices in each round that is over")
    parser.add_argument("--port", type=int, default=8080, help="0: any free one")
    parser.add_argument("--fill-only", action="store_true")
    given = parser.parse_args()
    prepare_data_dir(given.folder)
    if not (given.folder / DATABASE).exists():
        fill(given.folder, devices=given.devices, rounds=given.rounds, per_round=given.per_round)
    if not given.fill_only:
        settings = settings_for(given.folder, given.port)
        configure_logging("auto", "warning")
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(serve(settings))


if __name__ == "__main__":
    main()
