"""How long every page's question takes with a long history: `python bench/queries.py --devices 1000 --rounds 1000`.

Fills a database in a temporary folder (or opens one that `--folder` names), then asks each question some times and
prints the median, the slowest, and how many rows came out of the database.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from synthetic_history import DATABASE, MAIN, Crowd, fill
from watched_queries import counted, system_at

from glora_server.coordinator.hub import Hub
from glora_server.coordinator.model import Page
from glora_server.coordinator.queries import Queries
from glora_server.coordinator.views_history import AuditFilter, DeviceFilter, DeviceOrder
from glora_server.storage.store import SqlStore

PAGE = Page(size=50)
Question = Callable[[Queries], Awaitable[object]]


def questions(rounds: int) -> dict[str, Question]:
    """Every question of a page."""
    return {
        "runs": lambda q: q.runs(PAGE),
        "run": lambda q: q.run(MAIN),
        "run: rounds": lambda q: q.rounds(MAIN, PAGE),
        "run: series": lambda q: q.series(MAIN),
        "run: spectrum": lambda q: q.spectrum(MAIN),
        "run: lineage": lambda q: q.lineage(MAIN, PAGE),
        "run: exports": lambda q: q.exports(MAIN, PAGE),
        "run: measurements": lambda q: q.measurements(MAIN, PAGE),
        "run: diagnostics": lambda q: q.diagnostics(MAIN, rounds, PAGE),
        "round (over)": lambda q: q.round(MAIN, rounds // 2),
        "round (open)": lambda q: q.round(MAIN, rounds + 1),
        "round: assignments": lambda q: q.assignments(MAIN, rounds + 1, PAGE),
        "devices": lambda q: q.devices(PAGE),
        "devices by reliability": lambda q: q.devices(PAGE, DeviceFilter(order=DeviceOrder.RELIABILITY)),
        "devices online, tagged": lambda q: q.devices(PAGE, DeviceFilter(online=True, tag="berlin")),
        "device": lambda q: q.device_detail("pi-0012"),
        "device: history": lambda q: q.device_history("pi-0012", PAGE),
        "audit": lambda q: q.audit(PAGE, AuditFilter(action="run.")),
        "alerts": lambda q: q.alerts(),
        "roster, read again": _roster,
    }


async def _roster(queries: Queries) -> object:
    queries.hub.device_changed(next(iter(await queries.roster.entries())))
    return await queries.roster.entries()


async def measure(store: SqlStore, rounds: int, repeats: int) -> None:
    """Ask and print."""
    queries = Queries(
        store=store,
        hub=Hub(),
        clock=time.time,
        catalogue=None,  # type: ignore[arg-type]  # no question here asks it
        system_view=system_at(time.time()),
    )
    (await Crowd.of(queries.hub, store)).tick()
    reading = counted(setattr)
    print(f"{'question':<26}{'median ms':>11}{'slowest ms':>12}{'rows':>8}")
    for name, ask in questions(rounds).items():
        spent = []
        for _ in range(repeats):
            reading.rows = 0
            begun = time.perf_counter()
            await ask(queries)
            spent.append(1000 * (time.perf_counter() - begun))
        print(f"{name:<26}{statistics.median(spent):>11.1f}{max(spent):>12.1f}{reading.rows:>8}")


def main() -> None:
    """Fill where that is needed, and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--per-round", type=int, default=1000, help="devices in each round that is over")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="keep the database here, or use the one that is there")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        if not (folder / DATABASE).exists():
            folder.mkdir(parents=True, exist_ok=True)
            begun = time.perf_counter()
            fill(folder, devices=given.devices, rounds=given.rounds, per_round=given.per_round)
            size = (folder / DATABASE).stat().st_size / 2**20
            print(f"filled in {time.perf_counter() - begun:.0f} s, {size:.0f} MiB")
        store = SqlStore.open(f"sqlite:///{folder / DATABASE}")
        try:
            asyncio.run(measure(store, given.rounds, given.repeats))
        finally:
            store.close_now()


if __name__ == "__main__":
    main()
