"""The system: how the server's parts are, where it keeps things, how full that is, and what needs a person."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from markupsafe import Markup

from glora_dashboard.pages import format as fmt
from glora_dashboard.pages.frame import frame, may_see, page
from glora_dashboard.pages.live import keep_fresh
from glora_dashboard.pages.overview import alert_list
from glora_dashboard.pages.parts import Block, bar, card, facts, join, pill
from glora_dashboard.pages.site import Site
from glora_dashboard.ports import HealthCheck
from glora_server.coordinator.views import SystemView
from glora_server.coordinator.views_plots import Alert

_NEARLY_FULL: Final = 0.9
_DATABASES: Final = {"sqlite": "SQLite", "postgresql": "PostgreSQL"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    system: SystemView
    alerts: tuple[Alert, ...]
    health: tuple[HealthCheck, ...]


@page("/system", title="System", nav="System")
async def system_page(site: Site) -> None:
    """The server itself."""
    seen = await _look(site)
    with frame("System"):
        alerts = Block(alert_list(seen.alerts, leads_to=may_see)).props('aria-live="polite"')
        tiles = Block(_tiles(seen.system))
        with card("Health", note="what /readyz says"):
            health = Block(_health(seen))
        with card("Storage"):
            storage = Block(_storage(seen.system))
        with card("Addresses and certificates"):
            rest = Block(_addresses(seen.system))

        async def refresh() -> None:
            fresh = await _look(site)
            alerts.show(alert_list(fresh.alerts, leads_to=may_see))
            tiles.show(_tiles(fresh.system))
            health.show(_health(fresh))
            storage.show(_storage(fresh.system))
            rest.show(_addresses(fresh.system))

        keep_fresh(site, refresh)


async def _look(site: Site) -> _Seen:
    checks = await site.health.check() if site.health is not None else ()
    return _Seen(system=await site.queries.system(), alerts=await site.queries.alerts(), health=checks)


def _tiles(system: SystemView) -> Markup:
    cells = (
        ("Version", system.version),
        ("Up for", fmt.moment(system.started_at, mode="since")),
        ("Devices online", Markup("{:,} <small>of {:,}</small>").format(system.online_devices, system.devices)),
        ("Active runs", f"{system.active_runs:,}"),
    )
    return facts(cells, kind="tiles")


def _health(seen: _Seen) -> Markup:
    if not seen.health:
        return Markup("")
    return Markup('<ul class="checks">{}</ul>{}').format(join(map(_check, seen.health)), _worker(seen.system))


def _check(check: HealthCheck) -> Markup:
    return Markup('<li data-key="{}">{}<b>{}</b><span class="muted">{}</span></li>').format(
        check.name, pill("good", "works") if check.ok else pill("bad", "does not work"), check.name, check.message
    )


def _worker(system: SystemView) -> Markup:
    words = (
        f"{fmt.count(system.worker_restarts, 'time')} since the server started" if system.worker_restarts else "never"
    )
    return facts(
        (
            ("Aggregation runs on", system.worker_device or "starting"),
            ("Worker had to be started again", words),
        )
    )


def _storage(system: SystemView) -> Markup:
    used = system.disk_bytes - system.free_disk_bytes
    share = used / system.disk_bytes if system.disk_bytes else None
    tone = "bad" if share is not None and share > _NEARLY_FULL else "active"
    full = Markup('<div class="disk"><p>{} of {} used, {} free</p>{}</div>').format(
        fmt.size(used),
        fmt.size(system.disk_bytes),
        fmt.size(system.free_disk_bytes),
        bar(share, label="Disk", tone=tone),
    )
    rows: Sequence[tuple[str, str | Markup]] = (
        ("Database", _DATABASES.get(system.database, system.database)),
        ("Size of the database", fmt.size(system.database_bytes)),
        ("Schema", Markup('<span class="mono">{}</span>').format(system.database_revision)),
    )
    return Markup("{}{}").format(full if system.disk_bytes else "", facts(rows))


def _addresses(system: SystemView) -> Markup:
    return facts(
        (
            ("Devices work through", f"gRPC, port {system.grpc_port} (mutual TLS)"),
            ("Devices join through", f"gRPC, port {system.enrolment_port}"),
            ("This page", f"HTTP, port {system.http_port}"),
            ("The authority's certificate ends", fmt.moment(system.authority_expires_at)),
            (
                "The authority's fingerprint (SHA-256)",
                Markup('<span class="mono">{}</span>').format(system.authority_pin),
            ),
        )
    )
