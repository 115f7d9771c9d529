"""The overview: which runs there are, what they wait for, whether they get better, and what needs a person."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final
from urllib.parse import quote

from markupsafe import Markup
from nicegui import ui

from glora_dashboard.pages import format as fmt
from glora_dashboard.pages.frame import PAGES, frame, may_see, page
from glora_dashboard.pages.live import keep_fresh
from glora_dashboard.pages.pager import Pager
from glora_dashboard.pages.parts import Block, anchor, bar, facts, icon, join, pill, sparkline
from glora_dashboard.pages.quality import best_by_version, late_words
from glora_dashboard.pages.run_parts import sentence
from glora_dashboard.pages.signs import RUN_TONES, SEVERITY_SIGNS
from glora_dashboard.pages.site import Site, may
from glora_server.coordinator.people import Role
from glora_server.coordinator.views import RunView, SystemView
from glora_server.coordinator.views_plots import Alert
from glora_server.rounds.round import GATHERING
from glora_server.rounds.run import RunPhase

SHOWN_RUNS: Final = 20
SHOWN_ALERTS: Final = 3
"""The worst; the others are one click away, so that runs stay in sight."""


_ENDED: Final = frozenset({RunPhase.COMPLETED, RunPhase.FAILED, RunPhase.ABORTED})
_ALERT_PAGES: Final[Mapping[str, str]] = {
    "run_failed": "/runs/{name}",
    "rounds_failing": "/runs/{name}",
    "no_devices": "/runs/{name}",
    "device_rejected": "/devices/{name}",
    "devices_pending": "/enrolment",
    "certificates_expire": "/devices",
}
"""Where an alert leads to, by its code; all others lead to the system's page."""


@page("/", title="Overview", nav="Overview")
async def overview(site: Site) -> None:
    """Runs, devices, alerts at one glance."""
    system = await site.queries.system()
    found = await site.queries.alerts()
    with frame("Overview", heading=False):
        with ui.element("div").classes("head"):
            Block(Markup("Overview"), tag="h1")
            if "/runs/new" in PAGES and may(Role.OPERATOR):
                Block(anchor("New run", "/runs/new", classes="button primary"))
        tiles = Block(_tiles(system))
        alerts = Block(alert_list(found, leads_to=may_see)).props('aria-live="polite"')
        runs = Pager(site.queries.runs, lambda views: _runs(views, system), size=SHOWN_RUNS)
        await runs.refresh()

        async def refresh() -> None:
            nonlocal system
            system = await site.queries.system()
            tiles.show(_tiles(system))
            alerts.show(alert_list(await site.queries.alerts(), leads_to=may_see))
            await runs.refresh()

        keep_fresh(site, refresh)


def _tiles(system: SystemView) -> Markup:
    cells = (
        ("Active runs", str(system.active_runs)),
        ("Devices online", Markup("{:,} <small>of {:,}</small>").format(system.online_devices, system.devices)),
        ("Aggregation", system.worker_device or "starting"),
        ("Free disk", fmt.size(system.free_disk_bytes)),
    )
    return facts(cells, kind="tiles")


def alert_list(alerts: Sequence[Alert], *, leads_to: Callable[[str], bool]) -> Markup:
    """What needs a person, the worst first; nothing when nothing does. `leads_to` says which addresses one may open."""
    if not alerts:
        return Markup("")
    drawn = [_alert(alert, leads_to) for alert in alerts]
    first, rest = drawn[:SHOWN_ALERTS], drawn[SHOWN_ALERTS:]
    shown = Markup('<ul class="alerts">{}</ul>').format(join(first))
    if not rest:
        return shown
    return Markup('{}<details class="more"><summary>{} more</summary><ul class="alerts">{}</ul></details>').format(
        shown, fmt.count(len(rest), "alert"), join(rest)
    )


def _alert(alert: Alert, leads_to: Callable[[str], bool]) -> Markup:
    tone, word = SEVERITY_SIGNS[alert.severity]
    address = _ALERT_PAGES.get(alert.code, "/system").format(name=quote(alert.target, safe=""))
    link = anchor("Show", address) if leads_to(address) else Markup("")
    return Markup('<li class="{}" data-key="{}-{}">{}<span><b class="visually-hidden">{}: </b>{}</span>{}</li>').format(
        tone, alert.code, alert.target, icon(tone), word, alert.message, link
    )


def _runs(views: tuple[RunView, ...], system: SystemView) -> Markup:
    if not views:
        return _first_steps(system, operator=may(Role.OPERATOR))
    in_order = sorted(views, key=lambda view: (view.run.phase in _ENDED, view.run.phase is not RunPhase.ACTIVE))
    return Markup('<div class="runs">{}</div>').format(join(run_card(view) for view in in_order))


def _first_steps(system: SystemView, *, operator: bool) -> Markup:
    if not operator:
        return Markup('<div class="empty"><h2>No run yet</h2><p>An operator can create one.</p></div>')
    if not system.devices:
        return Markup(
            '<div class="empty"><h2>Welcome. First, let a device join</h2><p>Make a join token: it comes with the one '
            "command that you run on the device. When devices are here, create a run.</p>"
            '<a class="button primary" href="/enrolment">Make a join token</a></div>'
        )
    return Markup(
        '<div class="empty"><h2>No run yet</h2><p>{} enrolled. A run says which base model is fine-tuned, on which '
        'task, and how its rounds are staffed.</p><a class="button primary" href="/runs/new">Create a run</a></div>'
    ).format(fmt.count(system.devices, "device is", "devices are"))


def run_card(view: RunView) -> Markup:
    """A run in the list of runs."""
    run = view.run
    total = view.spec.policy.rounds
    return Markup(
        '<article class="run" data-key="{key}"><div><div class="run-name">{name}{state}</div>'
        '<p class="why">{why}</p><div class="rounds"><div><span>{rounds}</span>{bar}</div>{now}'
        "<span>{devices}</span></div></div>{quality}</article>"
    ).format(
        key=run.id,
        name=anchor(run.name, f"/runs/{run.name}"),
        state=pill(RUN_TONES[run.phase], run.phase.value),
        why=sentence(view),
        rounds=f"{run.rounds_done:,} of {fmt.count(total, 'round')}",
        bar=bar(run.rounds_done / total, label=f"Rounds of {run.name}", tone=_bar_tone(run.phase)),
        now=_round_line(view),
        devices=""
        if run.phase in _ENDED
        else f"{view.online_devices:,} of {fmt.count(view.eligible_devices, 'device')} online",
        quality=_quality(view),
    )


def _round_line(view: RunView) -> Markup:
    current = view.round
    if current is None or current.round.phase not in GATHERING:
        return Markup("")
    wanted = current.round.target or current.devices or 1
    tone = "good" if current.accepted >= current.round.policy.quorum else "active"
    return Markup("<div><span>Round {}: {} of {}</span>{}</div>").format(
        current.round.number,
        current.accepted,
        fmt.count(wanted, "update"),
        bar(current.accepted / wanted, label=f"Updates of round {current.round.number}", tone=tone),
    )


def _bar_tone(phase: RunPhase) -> str:
    return {RunPhase.COMPLETED: "good", RunPhase.FAILED: "bad", RunPhase.ABORTED: "bad"}.get(phase, "active")


def _quality(view: RunView) -> Markup:
    points = best_by_version(view)
    if not points:
        return Markup('<div class="quality muted small">Not measured yet</div>')
    first, last = points[0].accuracy, points[-1].accuracy
    label = f"Accuracy from {fmt.percent(first)} to {fmt.percent(last)} over {fmt.count(len(points), 'version')}"
    what = " of ".join(filter(None, ("accuracy", late_words(points, view.version_number))))
    return Markup(
        '<div class="quality">{}<div class="figure"><b>{}</b><span class="muted small">{}</span></div></div>'
    ).format(sparkline([point.accuracy for point in points], label=label), fmt.percent(last), what)
