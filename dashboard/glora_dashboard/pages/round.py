"""A round: what every device does or did in it, and when."""

from __future__ import annotations

import time
from typing import Final

from markupsafe import Markup

from glora_dashboard.pages import format as fmt
from glora_dashboard.pages.frame import frame, page
from glora_dashboard.pages.gantt import gantt, legend, window_of
from glora_dashboard.pages.live import keep_fresh
from glora_dashboard.pages.pager import Pager
from glora_dashboard.pages.parts import Block, anchor, bar, card, join, pill
from glora_dashboard.pages.signs import ASSIGNMENT_SIGNS, ROUND_TONES
from glora_dashboard.pages.site import Site
from glora_server.coordinator.model import Page
from glora_server.coordinator.views import AssignmentView, RoundView
from glora_server.rounds.assignment import AssignmentPhase
from glora_server.rounds.round import GATHERING

DEVICES_SHOWN: Final = 50


@page("/runs/{name}/rounds/{number}", title="Round")
async def round_page(site: Site, name: str, number: int, attempt: int | None = None) -> None:
    """One attempt at a round (the last one, unless the address names another)."""
    view = await site.queries.round(name, number, attempt)
    crumbs = (("Overview", "/"), (name, f"/runs/{name}"))
    with frame(f"Round {number} of {name}", crumbs=crumbs, heading=False):
        head = Block(_head(name, view, await _newest(site, name)))
        with card("Devices"):
            Block(legend())
            devices = Pager(
                lambda part: site.queries.assignments(name, number, part, view.round.attempt),
                lambda found: _timeline(view, found),
                size=DEVICES_SHOWN,
                newer="Previous",
                older="Next",
            )
            await devices.refresh()

        async def refresh() -> None:
            nonlocal view
            view = await site.queries.round(name, number, view.round.attempt)
            head.show(_head(name, view, await _newest(site, name)))
            await devices.refresh()

        keep_fresh(site, refresh, run=name)


async def _newest(site: Site, name: str) -> int:
    """Number of the run's newest round."""
    return (await site.queries.rounds(name, Page(size=1))).items[0].round.number


def _head(name: str, view: RoundView, newest: int) -> Markup:
    round_ = view.round
    attempt = f" <small>attempt {round_.attempt}</small>" if round_.attempt > 1 else ""
    state = pill(ROUND_TONES[round_.phase], round_.phase.value)
    return Markup(
        '<div class="head"><div class="head-title"><h1>Round {}{}</h1>{}</div><div class="actions">{}</div></div>'
        '<p class="lead">{}</p>{}{}'
    ).format(
        round_.number,
        Markup(attempt),  # noqa: S704 - a number of ours
        state,
        _neighbours(name, view.round.number, newest),
        _sentence(view),
        _updates(view),
        _counts(view),
    )


def _neighbours(name: str, number: int, newest: int) -> Markup:
    address = f"/runs/{name}/rounds"
    before = anchor("Round before", f"{address}/{number - 1}", classes="button") if number > 1 else Markup("")
    after = anchor("Round after", f"{address}/{number + 1}", classes="button") if number < newest else Markup("")
    return Markup("{}{}").format(before, after)


def _sentence(view: RoundView) -> Markup:
    round_ = view.round
    if round_.phase in GATHERING and round_.deadline_at is not None:
        since = fmt.moment(round_.opened_at, mode="since")
        return Markup("Open for {}, deadline in {}. {}").format(
            since, fmt.moment(round_.deadline_at, mode="until"), round_.message
        )
    if round_.opened_at is None:
        return Markup("Not opened yet. {}").format(round_.message)
    if round_.closed_at is None:
        return Markup("Open for {}; the updates are being aggregated.").format(
            fmt.moment(round_.opened_at, mode="since")
        )
    return Markup("Began {}, ended {}, took {}. {}").format(
        fmt.moment(round_.opened_at, mode="time"), fmt.moment(round_.closed_at), fmt.span(view.seconds), round_.message
    )


def _updates(view: RoundView) -> Markup:
    accepted = view.accepted
    wanted = view.round.target or view.devices or 1
    enough = accepted >= view.round.policy.quorum
    words = f"{accepted:,} of {fmt.count(wanted, 'update')} in, at least {view.round.policy.quorum:,} needed"
    return Markup('<div class="updates">{}<span class="small muted">{}</span></div>').format(
        bar(accepted / wanted, label="Updates", tone="good" if enough else "active"), words
    )


def _counts(view: RoundView) -> Markup:
    signs = [(phase, view.counts.get(phase, 0)) for phase in AssignmentPhase]
    return Markup('<div class="counts">{}</div>').format(
        join(
            pill(ASSIGNMENT_SIGNS[phase][0], f"{many:,} {ASSIGNMENT_SIGNS[phase][1]}") for phase, many in signs if many
        )
    )


def _timeline(view: RoundView, found: tuple[AssignmentView, ...]) -> Markup:
    round_, now = view.round, time.time()
    if round_.opened_at is None or not found:
        return Markup('<p class="muted">No device was invited yet.</p>')
    latest = max((item.assignment.closed_at or 0.0 for item in found), default=0.0)
    return gantt(found, window_of(round_.opened_at, round_.closed_at, round_.deadline_at, now, latest), now=now)
