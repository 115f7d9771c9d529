"""Exports: a version of a run as an adapter, at any rank, with how good it is there, downloaded as a zip."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from markupsafe import Markup
from nicegui import ui

from glora_dashboard.pages import format as fmt
from glora_dashboard.pages.assets import STATIC_PREFIX
from glora_dashboard.pages.export_form import ExportForm
from glora_dashboard.pages.forms import on_rows, row_button
from glora_dashboard.pages.frame import frame, page
from glora_dashboard.pages.lists import Cell, wide_table
from glora_dashboard.pages.live import keep_fresh
from glora_dashboard.pages.pager import Pager
from glora_dashboard.pages.parts import Block, anchor, card, empty
from glora_dashboard.pages.site import Site, may
from glora_server.coordinator.model import Listing, Page, Run
from glora_server.coordinator.people import Role
from glora_server.coordinator.views import RunView
from glora_server.coordinator.views_history import VersionScore
from glora_server.coordinator.views_plots import Exportable

VERSIONS_SHOWN: Final = 10
_RUNS_OFFERED: Final = 200
_RANKS_SHOWN: Final = 8


@page("/exports", title="Exports", nav="Exports")
async def exports_page(site: Site, run: str = "") -> None:
    """What can be exported; operators do so."""
    runs = (await site.queries.plain_runs(Page(size=_RUNS_OFFERED))).items
    started = [record for record in runs if record.version_id is not None]
    name = run or next((record.name for record in started), "")
    chosen = await site.queries.run(name) if name else None
    with frame("Exports"):
        ui.add_head_html(f'<script src="{STATIC_PREFIX}/export.js" defer></script>')
        if chosen is None:
            _nothing(operator=may(Role.OPERATOR))
            return
        _pick_run(started, chosen.run)
        if chosen.version_number is None:
            empty(
                "No version yet",
                "Starting the run makes the first one.",
                link=("Go to the run", f"/runs/{chosen.run.name}"),
            )
            return
        await _RunExports(site, chosen).build()


def _nothing(*, operator: bool) -> None:
    sentence = "As soon as a run was started, its versions can be exported here as LoRA adapters."
    empty("Nothing to export yet", sentence, link=("Create a run", "/runs/new") if operator else None)


def _pick_run(started: list[Run], chosen: Run) -> None:
    names = {run.name: f"{run.name} ({run.phase.value})" for run in [*started, chosen]}
    with ui.element("div").classes("filters narrow"):
        field = ui.select(names, value=chosen.name, label="Run", with_input=len(names) > 15)
        field.props("outlined dense options-dense").classes("find")
        field.on_value_change(lambda: ui.navigate.to(f"/exports?run={field.value}") if field.value else None)


@dataclass(slots=True)
class _RunExports:
    """The exports of one run."""

    site: Site
    view: RunView

    async def build(self) -> None:
        """Fill the page."""
        name = self.view.run.name
        current = await self.site.queries.exports(name, Page(size=1))
        form = None
        if current.items and may(Role.OPERATOR):
            with card("Export", note="a PEFT folder as a zip"):
                form = ExportForm(self.site, self.view, current.items[0])

        async def ask(part: Page) -> Listing[Exportable]:
            found = await self.site.queries.exports(name, part)
            if form is not None:
                form.renew(found.items)
            return found

        with card(
            "Versions that can be exported", note="accuracy and loss at each rank that devices measured"
        ) as section:
            pager: Pager[Exportable] = Pager(
                ask,
                lambda items: versions_table(items, operator=form is not None),
                size=VERSIONS_SHOWN,
            )
            kept = self.view.spec.retention.keep_versions
            words = f"Tensors of the newest {fmt.count(kept, 'version')} are kept (retention.keep_versions)."
            Block(Markup('<p class="muted small">{} {}</p>').format(words, anchor("The run", f"/runs/{name}")))

        async def choose(action: str, number: str) -> None:
            if form is not None and action == "choose":
                await form.choose(int(number))

        on_rows(section, choose)
        await pager.refresh()
        keep_fresh(self.site, pager.refresh, run=name)


def versions_table(items: tuple[Exportable, ...], *, operator: bool) -> Markup:
    """Versions by measured ranks."""
    if not items:
        return Markup('<p class="muted">No version has tensors any more.</p>')
    ranks = _ranks(items)
    head = ("Version", "Made", *(f"Rank {rank}" for rank in ranks), *([""] if operator else []))
    return wide_table(head, (_row(item, ranks, operator=operator) for item in items), label="Versions")


def _ranks(items: tuple[Exportable, ...]) -> list[int]:
    ranks = sorted({score.rank for item in items for score in item.scores})
    return ranks if len(ranks) <= _RANKS_SHOWN else [*ranks[: _RANKS_SHOWN - 1], ranks[-1]]


def _row(item: Exportable, ranks: list[int], *, operator: bool) -> list[Cell]:
    number = item.version.number
    scores: Mapping[int, VersionScore] = {score.rank: score for score in item.scores}
    cells: list[Cell] = [Markup("<b>{}</b>").format(f"Version {number}"), fmt.moment(item.version.created_at)]
    cells += [_score(scores.get(rank)) for rank in ranks]
    if operator:
        press = row_button("Export this", "choose", str(number), label=f"Export version {number}")
        cells.append(Markup('<span class="row-actions">{}</span>').format(press))
    return cells


def _score(score: VersionScore | None) -> Cell:
    if score is None:
        return Markup('<span class="muted">–</span>')
    return Markup("{}<small>loss {}</small>").format(fmt.percent(score.accuracy), fmt.loss(score.loss))
