"""A device: what it can do and does, how reliable it is, how far it agrees with the others, and what to do with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from markupsafe import Markup
from nicegui import ui

from glora_dashboard.pages.charts import Chart, Options, finite, line, plot
from glora_dashboard.pages.device_actions import DeviceActions
from glora_dashboard.pages.device_parts import (
    agreement_table,
    device_facts,
    history_table,
    now_doing,
    outcome_counts,
    presence,
)
from glora_dashboard.pages.frame import frame, page
from glora_dashboard.pages.live import keep_fresh
from glora_dashboard.pages.pager import Pager
from glora_dashboard.pages.parts import Block, card
from glora_dashboard.pages.site import Site, may
from glora_server.coordinator.people import Role
from glora_server.coordinator.views import DeviceView
from glora_server.coordinator.views_history import Contribution, DeviceDetail, WorkView

HISTORY_SHOWN: Final = 10
CONTRIBUTIONS_LISTED: Final = 10


@page("/devices/{name}", title="Device")
async def device_page(site: Site, name: str) -> None:
    """One device."""
    detail = await site.queries.device_detail(name)
    with frame(detail.device.device.name, crumbs=(("Devices", "/devices"),), heading=False):
        shown = _Shown(site, detail)
        with card("History", note="what it was asked to do, newest first"):
            history: Pager[WorkView] = Pager(
                lambda part: site.queries.device_history(name, part), history_table, size=HISTORY_SHOWN
            )
        await history.refresh()

        async def refresh() -> None:
            shown.show(await site.queries.device_detail(name))
            await history.refresh()

        keep_fresh(site, refresh)


class _Shown:
    """All but the history."""

    def __init__(self, site: Site, detail: DeviceDetail) -> None:
        view = detail.device
        with ui.element("div").classes("head"):
            self._title = Block(_title(view)).classes("head-title")
            self._actions = DeviceActions(site, view, self.show_device) if may(Role.OPERATOR) else None
        self._doing = Block(now_doing(view), tag="p").classes("lead").props('role="status"')
        with card("Reliability", note="how its part in rounds ended"):
            self._outcomes = Block(outcome_counts(detail))
        with card("Agreement", note="cosine with the mean change, and the share of it that the consensus captured"):
            self._agreement = Block(_agreement_words(detail))
            options = agreement_options(_newest_run(detail))
            self._chart = Chart(options, label="Agreement by version", numbers=False)  # its own table says more
            self._table = Block(_contributions(detail))
        with card("What it is"):
            self._facts = Block(device_facts(view))
        self._show_agreement(detail)

    def show(self, detail: DeviceDetail) -> None:
        """Show the device as it is now."""
        self.show_device(detail.device)
        self._outcomes.show(outcome_counts(detail))
        self._show_agreement(detail)

    def show_device(self, view: DeviceView) -> None:
        """Show what does not come from its history."""
        self._title.show(_title(view))
        if self._actions is not None:
            self._actions.show(view)
        self._doing.show(now_doing(view))
        self._facts.show(device_facts(view))

    def _show_agreement(self, detail: DeviceDetail) -> None:
        made = _newest_run(detail)
        self._agreement.show(_agreement_words(detail))
        self._chart.show(agreement_options(made))
        self._chart.set_visibility(sum(item.cosine is not None for item in made) > 1)
        self._table.show(_contributions(detail))


def _title(view: DeviceView) -> Markup:
    return Markup("<h1>{}</h1>{}").format(view.device.name, presence(view))


def _newest_run(detail: DeviceDetail) -> tuple[Contribution, ...]:
    """Contributions to the run of the newest one, oldest first."""
    made = detail.agreement
    return tuple(item for item in reversed(made) if item.run_id == made[0].run_id)


def _agreement_words(detail: DeviceDetail) -> Markup:
    made = detail.agreement
    if not made:
        words = "Once an update of it was folded into a version, this shows how far it agreed with the other devices."
        return Markup('<p class="muted">{}</p>').format(words)
    far = sum(item.outlier for item in made)
    name = detail.run_names.get(made[0].run_id, "")
    remark = f"An outlier in {far} of its last {len(made)} contributions." if far else "Never an outlier of late."
    return Markup("<p>{} The chart shows {}.</p>").format(remark, name)


def _contributions(detail: DeviceDetail) -> Markup:
    if not detail.agreement:
        return Markup("")
    listed = agreement_table(detail.agreement[:CONTRIBUTIONS_LISTED], detail.run_names)
    return Markup("<details><summary>The last contributions as a table</summary>{}</details>").format(listed)


def agreement_options(made: Sequence[Contribution]) -> Options:
    """Cosine and capture by version, outliers as triangles."""
    marks: Options = {
        "name": "outlier",
        "type": "scatter",
        "symbol": "triangle",
        "symbolSize": 13,
        "itemStyle": {"color": "var(--bad)"},
        "data": [[str(item.number), finite(item.cosine)] for item in made if item.outlier],
        "z": 5,
    }
    return plot(
        [
            line("cosine", [(item.number, finite(item.cosine)) for item in made], colour="var(--c1)"),
            line("capture", [(item.number, finite(item.capture)) for item in made], colour="var(--c2)", dashed=True),
            marks,
        ],
        share=True,
    )
