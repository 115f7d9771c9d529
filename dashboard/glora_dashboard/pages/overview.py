"""The overview: which runs there are, what they wait for, whether they get better, and what needs a person."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from markupsafe import Markup

from glora_dashboard.pages import format as fmt
from glora_dashboard.pages.frame import frame, page
from glora_dashboard.pages.live import keep_fresh
from glora_dashboard.pages.parts import Block, anchor, bar, icon, join, pill, sparkline
from glora_dashboard.pages.quality import best_by_version
from glora_dashboard.pages.signs import RUN_TONES, SEVERITY_SIGNS
from glora_dashboard.pages.site import Site, may
from glora_server.coordinator.model import Page
from glora_server.coordinator.people import Role
from glora_server.coordinator.views import RunView, SystemView
from glora_server.coordinator.views_plots import Alert
from glora_server.rounds.round import GATHERING
from glora_server.rounds.run import RunPhase

SHOWN_RUNS: Final = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    system: SystemView
    runs: tuple[RunView, ...]
    more_runs: bool
    alerts: tuple[Alert, ...]


@page("/", title="Overview", nav="Overview")
async def overview(site: Site) -> None:
    """Runs, devices, alerts at one glance."""
    seen = await _look(site)
    with frame("Overview"):
        tiles = Block(_tiles(seen))
        alerts = Block(alert_list(seen.alerts)).props('aria-live="polite"')
        runs = Block(_runs(seen, operator=may(Role.OPERATOR)))

        async def refresh() -> None:
            fresh = await _look(site)
            tiles.show(_tiles(fresh))
            alerts.show(alert_list(fresh.alerts))
            runs.show(_runs(fresh, operator=may(Role.OPERATOR)))

        keep_fresh(site, refresh)


async def _look(site: Site) -> _Seen:
    listing = await site.queries.runs(Page(size=SHOWN_RUNS))
    return _Seen(
        system=await site.queries.system(),
        runs=listing.items,
        more_runs=bool(listing.next_token),
        alerts=await site.queries.alerts(),
    )


def _tiles(seen: _Seen) -> Markup:
    system = seen.system
    cells = (
        ("Active runs", Markup("{}").format(system.active_runs)),
        ("Devices online", Markup("{} <small>of {:,}</small>").format(f"{system.online_devices:,}", system.devices)),
        ("Aggregation", Markup("{}").format(system.worker_device or "starting")),
        ("Free disk", Markup("{}").format(fmt.size(system.free_disk_bytes))),
    )
    rows = join(Markup("<div><dt>{}</dt><dd>{}</dd></div>").format(name, value) for name, value in cells)
    return Markup('<dl class="tiles">{}</dl>').format(rows)


def alert_list(alerts: Sequence[Alert]) -> Markup:
    """What needs a person, the worst first; nothing when nothing does."""
    if not alerts:
        return Markup("")
    rows = []
    for alert in alerts:
        tone, word = SEVERITY_SIGNS[alert.severity]
        sentence = Markup('<span><b class="visually-hidden">{}: </b>{}</span>').format(word, alert.message)
        rows.append(
            Markup('<li class="{}" data-key="{}-{}">{}{}</li>').format(
                tone, alert.code, alert.target, icon(tone), sentence
            )
        )
    return Markup('<ul class="alerts">{}</ul>').format(join(rows))


def _runs(seen: _Seen, *, operator: bool) -> Markup:
    if not seen.runs:
        return _first_steps(seen.system, operator=operator)
    return Markup('<div class="runs">{}</div>').format(join(run_card(view) for view in seen.runs))


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
        why=view.waiting or "It is going on.",
        rounds=f"{run.rounds_done:,} of {fmt.count(total, 'round')}",
        bar=bar(run.rounds_done / total, label=f"Rounds of {run.name}", tone=_bar_tone(run.phase)),
        now=_round_line(view),
        devices=f"{view.online_devices:,} of {fmt.count(view.eligible_devices, 'device')} online",
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
    last = points[-1]
    label = f"Accuracy from {fmt.percent(points[0])} to {fmt.percent(last)} over {len(points)} versions"
    return Markup(
        '<div class="quality">{}<div class="figure"><b>{}</b><span class="muted small">accuracy</span></div></div>'
    ).format(sparkline(points, label=label), fmt.percent(last))
